"""The journal of attempts: one SQLite file, in which everything is before it counts."""
