"""What the scripts share: parsing, logging, and errors without a traceback."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from lightning_knnmt.checks import shorten
from lightning_knnmt.storage.errors import DatastoreError

log = logging.getLogger(__name__)

MOST_SHOWN = 3000  # characters of an error
USER_ERROR = 2  # as jsonargparse exits for options that it does not know
EXPECTED = (DatastoreError, ImportError, OSError, ValueError)  # errors of the user


class ScriptParser(ArgumentParser):
    """A parser that gives the reason why an option is refused, without all that it might have been instead."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and a message; the options are listed by --help."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        sys.stderr.write(f"error: {shorten(reason_of(message), MOST_SHOWN)}\nAll options are listed by --help.\n")
        sys.exit(USER_ERROR)


def reason_of(message: str) -> str:
    """A message of jsonargparse without the values given, and without the reasons why they are no null.

    >>> reason_of("tuning\\nErrors:\\n  - k is 0\\n  - Expected a <class 'NoneType'>\\nGiven value: 0")
    'tuning k is 0'
    """
    head, found, rest = message.partition("Errors:\n")
    if not found:
        return message
    reasons = re.split(r"\n?^ *- ", rest, flags=re.MULTILINE)[1:]
    kept = [reason_of(each.partition("Given value")[0].strip()) for each in reasons if "NoneType" not in each[:40]]
    head = re.sub(r"\s*(Does not validate against any of the Union subtypes|Subtypes: .*)\s*", " ", head)
    return f"{head.strip()} {'; or '.join(kept)}".strip()


def run_script(function: Callable[..., Any] | dict[str, Any], args: list[str] | None = None) -> None:
    """Call a function with options from the command line and from `--config`; progress and errors go to stderr.

    Args:
        function: Its signature is the configuration. Several are commands by their names, which take what they cannot
            do without by its place.
        args: The command line; None: that of the process.

    Raises:
        SystemExit: With 2 after an error of the user, without a traceback unless JSONARGPARSE_DEBUG is true; with what
            a shell expects after Ctrl-C and when whoever reads the output has gone.
    """
    _log_to_stderr()
    try:
        auto_cli(function, args=args, as_positional=isinstance(function, dict), parser_class=ScriptParser)
    except BrokenPipeError:
        # Python writes what is left when it ends, and would complain that it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (*EXPECTED, *_fetch_errors())) or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        sys.stderr.write(f"error: {shorten(reason_of(str(error)), MOST_SHOWN)}\n")
        sys.exit(USER_ERROR)


def log_cut(texts: int) -> None:
    """Say how many texts were longer than the model's positions and were cut, if any."""
    if texts:
        log.warning("%d texts in all were cut to the positions of the model", texts)


def _fetch_errors() -> tuple[type[Exception], ...]:
    """What a script that fetches corpora may raise; others need not load what that takes."""
    recipes = sys.modules.get("lightning_knnmt.data.recipes")
    return () if recipes is None else (recipes.FetchError,)


def _log_to_stderr() -> None:
    """Show this package's log; Hugging Face's libraries show their own, but for progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when they are imported
    package = logging.getLogger("lightning_knnmt")
    package.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.handlers[:] = [handler]
