"""nuner_jax: named-entity encoders (NuNER) in JAX, from raw text to a model in use.

Importing the package is quick and touches no device: import the module that you need.
"""

__version__ = "0.1.0"
