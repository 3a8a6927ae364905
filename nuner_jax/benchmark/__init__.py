"""How fast a config trains here, and how fast it could: `python -m nuner_jax.benchmark --config=FILE`."""
