"""Ahead-of-time compilation: what a config needs of hardware that is not here, or is about to run it."""
