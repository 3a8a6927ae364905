"""Ahead-of-time compilation: what a config needs of hardware that is not here."""
