"""What the scripts share: parsing, logging, and errors without a traceback."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from lightning_knnmt.storage.errors import DatastoreError

log = logging.getLogger(__name__)

USER_ERROR = 2  # as jsonargparse exits for options that it does not know
_EXPECTED = (DatastoreError, ImportError, OSError, ValueError)


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
        auto_cli(function, args=args, as_positional=isinstance(function, dict))
    except BrokenPipeError:
        # Python writes what is left when it ends, and would complain that it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (*_EXPECTED, *_fetch_errors())) or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
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
