"""What the commands print: one panel for an error, tables for people, JSON for scripts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all well; some items failed or a run broke off; a setting is wrong; Ctrl-C."""

out = Console(soft_wrap=False)
err = Console(stderr=True)


def show_error(message: str, hint: str | None = None) -> None:
    """One panel on stderr (plain lines when stderr is not a terminal)."""
    if err.is_terminal:
        body = escape(message) + (f"\n[dim]{escape(hint)}[/]" if hint else "")
        err.print(Panel(body, title="error", title_align="left", border_style="red"))
        return
    err.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    if hint:
        err.print(f"hint: {hint}", markup=False, highlight=False, soft_wrap=True)


def show_json(data: Any) -> None:
    """Data on stdout as JSON, for scripts."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout."""
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table)


def say(text: str) -> None:
    """A line for people, on stderr, so that stdout stays for results."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def start_logging(debug: bool) -> None:
    """Log to stderr; our own words from INFO, others' from WARNING."""
    if err.is_terminal:
        handler: logging.Handler = RichHandler(console=err, show_path=debug, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("plinth").setLevel(logging.DEBUG if debug else logging.INFO)
