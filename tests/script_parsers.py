"""The command lines of the scripts, parsed without running anything."""

import io
import runpy
import sys
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from unittest.mock import patch

from jsonargparse import ArgumentError, ArgumentParser, Namespace, capture_parser

from build_index import spell_out
from lightning_knnmt.training.parts_command_line import part_in

ROOT = Path(__file__).parents[1]
SCRIPTS = tuple(sorted(path.name for path in ROOT.glob("*.py") if path.name != "conftest.py"))


@cache
def parser_of(script: str, *args: str) -> ArgumentParser:
    """The parser that a script at the top of the repository makes, seized before it parses.

    Args:
        script: Its file name.
        args: What decides which of several parsers it makes.
    """
    path = str(ROOT / script)
    with patch.object(sys, "argv", [path, *args]):
        parser = capture_parser(runpy.run_path, path, run_name="__main__")
    parser.exit_on_error = False
    return parser


def parse(script: str, args: list[str]) -> Namespace:
    """The options of a command line.

    Raises:
        ArgumentError: The script does not take them.
    """
    messages = io.StringIO()
    if script == "build_index.py":
        args = spell_out(args)
    try:
        with redirect_stderr(messages):
            part = part_in(args) if script == "train.py" else None
            found = parser_of(script, *([] if part is None else [f"--model.{part}"])).parse_args(args)
            return found[found.subcommand] if "subcommand" in found else found
    except SystemExit as error:  # the parser of a subcommand
        raise ArgumentError(None, messages.getvalue().split("error: ")[-1]) from error
