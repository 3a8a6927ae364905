"""The one exception whose message is meant for the user, and how a command shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class NunerError(Exception):
    """Bad input or a bad environment: the message names the thing and says what to do about it."""


def run_command(
    main: Callable[[Sequence[str]], None], parse_flags: Callable[[Sequence[str]], Sequence[str]] | None = None
) -> None:
    """Runs `main(argv)` as a command line program: a `NunerError` becomes one clear line, exit 2.

    Anything else keeps its traceback, because it is a defect of the program and not of its input. `parse_flags`
    takes the place of absl's own parsing.
    """
    from absl import app, flags, logging

    def show(error: Exception) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

    def guarded_parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            return (parse_flags or flags.FLAGS)(list(argv))
        except (NunerError, flags.Error) as error:
            return show(error)

    def guarded_main(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:  # --verbosity=0 shows what the libraries have to say
            logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except NunerError as error:
            show(error)

    app.run(guarded_main, flags_parser=guarded_parse)
