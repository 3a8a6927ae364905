"""Several processes of one run: joined and compared at its start, stopped together."""
