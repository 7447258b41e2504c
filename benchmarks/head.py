"""What benchmark scripts share: a parser, JSON with the facts of the machine, a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table in Markdown, numbers at the right."""
    first = rows[0] if rows else headings
    rules = ["---:" if isinstance(value, int | float) else "---" for value in first]
    for row in (headings, rules, *rows):
        print("| " + " | ".join(map(str, row)) + " |")
