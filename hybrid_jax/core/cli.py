"""Runs commands: exit code 0 done, 2 the user's mistake in one line, 130 Ctrl-C, 141 a closed pipe."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.secrets import text_without_secrets

MOST_SHOWN = 500  # characters of an error message
# What the system says of a path that a user gave, wherever it is first looked at.
_OF_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_OF_FULL_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Ended(SystemExit):
    """Ends a command as the program itself has decided; any other `SystemExit` comes from a user's code."""


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose mistakes are `UserError`s: one line instead of the whole usage.

    An epilog keeps its line breaks. An option that takes one value may be given only once, since the first of
    two values would be dropped in silence.
    """

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.register("action", None, _StoreOnce)  # for options that name no action

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the command, as after ``--help``."""
        if message:
            self._print_message(message, sys.stderr)
        raise Ended(status)

    def error(self, message: str) -> NoReturn:
        """Raises a mistake in the arguments as a `UserError`."""
        raise UserError(f"{message}; see {self.prog} --help")


class _StoreOnce(argparse._StoreAction):
    """Stores the value of an option, which must not come twice; an empty path would be this folder."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._is_given = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.option_strings and self._is_given:
            raise argparse.ArgumentError(self, "given twice, takes one value")
        if values == "" and self.metavar in ("DIR", "FILE"):
            raise argparse.ArgumentError(self, "needs a path, got an empty text")
        self._is_given = True
        super().__call__(parser, namespace, values, option_string)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that read a run, whose config a stranger may have written."""
    parser.add_argument(
        "--trust", action="store_true", help="let the run's config name code (module:thing), which then runs"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a config of your own: what it names, the run's config may name, too"
    )


def set_up_logging() -> None:
    """Sends the log of the package to stderr, one line each, and of other packages only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hybrid_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs ``main`` on the command line's arguments and ends the process with the right exit code.

    A `UserError` becomes ``error: <one line>`` on stderr and exit code 2. Any other exception is a defect of
    ours and keeps its traceback; an `Ended` (143 after SIGTERM) passes through. Another `SystemExit` is a
    component that ended the program, and counts as a failure.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the calling program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the whole process
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal may lack a character
    sys.exit(_exit_code(main, sys.argv[1:]))


def _one_line(text: str) -> str:
    """Puts a text on one line and cuts it, since what a user gave may be a megabyte long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN * 2 // 3]} … {text[-MOST_SHOWN // 3 :]}"


def _drop_stdout() -> None:
    """Points stdout at nothing, since the interpreter flushes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    try:
        main(arguments)
        sys.stdout.flush()  # here, so that a closed pipe is met inside the try
    except UserError as error:
        print("error:", _one_line(text_without_secrets(str(error))), file=sys.stderr)
        return 2
    except Ended:
        raise
    except SystemExit as error:
        print(f"error: a component ended the program by sys.exit({error.code!r})", file=sys.stderr)
        return 2
    except MemoryError as error:
        print("error: the machine is out of memory:", _one_line(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except OSError as error:
        if error.filename is None and error.errno in _OF_FULL_DISKS:
            _drop_stdout()
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            return 2
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        print("error:", _one_line(f"{str(error.filename)!r} cannot be used: {error.strerror}"), file=sys.stderr)
        return 2
    return 0
