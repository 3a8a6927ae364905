"""Annotation of the first passages of the embedded sample by a server of the tests; the argument is its base URL."""

from nuner_jax.config import annotate


def get_config(base_url):
    config = annotate()
    config.source.paths = ("sample",)
    config.source.unit = "row"
    config.source.documents = 600
    config.source.duplicates = "exact"
    config.endpoint.base_url = base_url
    config.endpoint.model = "fake-model"
    config.endpoint.key_variable = "NUNER_TEST_KEY"
    config.request.max_concurrency = 4
    config.request.backoff = 0.01
    config.request.timeout = 20.0
    config.request.pilot = 5
    config.price.input, config.price.output = 0.5, 1.5
    config.build.validation_fraction = 0.1
    return config
