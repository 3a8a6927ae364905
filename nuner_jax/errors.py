"""The one exception whose message is meant for the user, and how a command shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class NunerError(Exception):
    """Bad input or a bad environment: the message names the thing and says what to do about it."""


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main(argv)` as a command line program: a `NunerError` becomes one clear line, exit 2.

    Anything else keeps its traceback, because it is a defect of the program and not of its input.
    """
    from absl import app, flags, logging

    def guarded(argv: Sequence[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:  # --verbosity=0 shows what the libraries have to say
            logging.set_verbosity(logging.WARNING)
        try:
            return main(argv)
        except NunerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    app.run(guarded)
