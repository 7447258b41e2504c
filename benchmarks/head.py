"""What benchmark scripts share: a parser, JSON with the facts of the machine, a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


def fresh_process(*words: object, limit: float | None = None) -> Any:
    """What a script prints as the JSON of its last line, run in a process of one thread.

    Args:
        words: the script and its words.
        limit: seconds after which it is ended.

    Raises:
        subprocess.TimeoutExpired: it was.
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_found(found: Mapping[str, Any], as_json: bool) -> None:
    """A line for each name, or all as JSON."""
    if as_json:
        print_json(found)
        return
    for name, facts in found.items():
        print(name, facts)


def print_json(results: Any) -> None:
    """The results with time, machine, its load, versions and commit."""
    print(json.dumps({**describe(), "results": results}, indent=1))


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table in Markdown, numbers at the right."""
    first = rows[0] if rows else headings
    rules = ["---:" if isinstance(value, int | float) else "---" for value in first]
    for row in (headings, rules, *rows):
        print("| " + " | ".join(map(str, row)) + " |")
