"""The head all benchmark scripts share: a parser, and JSON with the facts of the machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from plinth.pipelines.bench.environment import describe


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and has ``--json``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON with the facts of the machine, no table"
    )
    return parser


def print_json(results: Any) -> None:
    """The results with time, machine, its load, versions and commit."""
    print(json.dumps({**describe(), "results": results}, indent=1))
