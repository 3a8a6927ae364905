"""Encoders, towers and heads (Flax NNX modules)."""
