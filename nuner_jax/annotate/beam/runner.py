"""How a pipeline is run: Beam's flags, and what its workers complain about as this program's own errors."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nuner_jax.errors import NunerError

Run = Callable[[Callable[[Any], None]], None]
"""Runs, to its end, what a function adds to a pipeline that it is given."""

LOCAL_RUNNER = "FnApiRunner"
"""Beam's runner in this process, taken if no --runner is given. Its "DirectRunner" fetches a program from GitHub."""

_WITH_OWN_FLAGS = ("portable", "flink", "spark")  # these ask a job service, which may know more flags


def pipeline_options(flags: Sequence[str]) -> Any:
    """Beam's PipelineOptions of command line flags.

    Raises:
      NunerError: apache_beam is missing; a flag that Beam does not know, or a value that it does not take.
    """
    _import_beam()
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions, TypeOptions

    for flag in flags:
        if not flag.startswith("--"):
            raise NunerError(
                f"unexpected argument {flag!r}: after -- come Beam's flags, such as -- --runner=FlinkRunner"
            )
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints), _warnings("apache_beam.options.pipeline_options") as warnings:
            options = PipelineOptions(list(flags))
            options.get_all_options()
    except SystemExit as error:  # argparse has told why, after a page of usage
        reason = complaints.getvalue().strip().rpartition("error: ")[2]
        raise NunerError(f"Beam's flags {' '.join(flags)}: {reason}") from error
    standard = options.view_as(StandardOptions)
    standard.runner = standard.runner or LOCAL_RUNNER
    if warnings and not standard.runner.lower().startswith(_WITH_OWN_FLAGS):
        raise NunerError(f"Beam's flags {' '.join(flags)}: {warnings[0]}; {standard.runner} knows no such flag")
    # What workers hand on is told apart by tags, of several types each.
    options.view_as(TypeOptions).pipeline_type_check = False
    FileSystems.set_options(options)
    return options


def runner(options: Any) -> Run:
    """The function that runs pipelines with these options.

    It raises `NunerError` for what a worker says with one, and for a runner that cannot be used; anything else that
    fails keeps Beam's own error.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import StandardOptions

    if options.view_as(StandardOptions).runner == LOCAL_RUNNER:
        # It logs an error, with pages of its own calls, besides raising it.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)

    def run(add: Callable[[Any], None]) -> None:
        with worker_errors():
            pipeline = beam.Pipeline(options=options)
            add(pipeline)
            state = pipeline.run().wait_until_finish()
        if state != beam.runners.runner.PipelineState.DONE:
            raise NunerError(f"the pipeline ended as {state}; the runner's own log tells why")

    return run


def is_dataflow(options: Any) -> bool:
    """Whether the workers are Google's, which see no folder of this machine."""
    from apache_beam.options.pipeline_options import StandardOptions

    return "dataflow" in options.view_as(StandardOptions).runner.lower()


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Brings back the `NunerError` of a worker, which Beam wraps in text of its own."""
    try:
        yield
    except Exception as error:  # Beam's runners have no common one
        told = re.search(
            r"NunerError: (.*?)(?: \[while running .*)?$", f"{type(error).__name__}: {error}", re.MULTILINE
        )
        if told:
            raise NunerError(told[1]) from error
        raise


def _import_beam() -> None:
    # It warns of a Google library that is missing, which only those who need it want to know.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise NunerError("apache_beam is missing; install the extra: pip install 'nuner_jax[beam]'") from error
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _warnings(name: str) -> Iterator[list[str]]:
    """The warnings of a logger, which are not shown meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger(name)
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
