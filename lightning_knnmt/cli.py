"""What the scripts share: parsing, logging, and errors without a traceback."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli
from transformers.utils import logging as transformers_logging

from lightning_knnmt.data.readers import MalformedCorpusError
from lightning_knnmt.data.recipes import FetchError
from lightning_knnmt.datastore import DatastoreError


def run_script(function: Callable[..., Any], args: list[str] | None = None) -> None:
    """Call a function with options from the command line and from `--config`; progress and errors go to stderr.

    Args:
        function: Its signature is the configuration.
        args: The command line; None: that of the process.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        auto_cli(function, args=args, as_positional=False)
    except (DatastoreError, FetchError, FileNotFoundError, MalformedCorpusError, ValueError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")
