"""What the commands print: one panel for an error, tables for people, JSON for scripts."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from plinth.engine.errors import ConfigError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all well; some items failed or a run broke off; a setting is wrong; Ctrl-C."""

out = Console(soft_wrap=False)
err = Console(stderr=True)


_JSON_LINES = logging.getLogger("plinth.console")


def _logs_json() -> bool:
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonLines) for handler in handlers)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the frames of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of an event."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_text:
            told["exception"] = record.exc_text
        if hint := getattr(record, "hint", None):
            told["hint"] = hint
        return json.dumps(told, ensure_ascii=False)


def visible(text: str) -> str:
    """A text as a terminal may show it: what others wrote must not steer it, nor turn its letters.

    Control characters and marks of direction stand as escapes, such as ``\\x1b``.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def show_error(message: str, hint: str | None = None) -> None:
    """One panel on stderr (plain lines when stderr is not a terminal, JSON where that is asked)."""
    if _logs_json():
        _JSON_LINES.error(message, extra={"hint": hint})
        return
    message, hint = visible(message), visible(hint) if hint else None
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
        table.add_row(*(escape(visible(str(cell))) for cell in row))
    out.print(table)


def say(text: str) -> None:
    """A line for people, on stderr, so that stdout stays for results."""
    if _logs_json():
        _JSON_LINES.info(text)
        return
    err.print(visible(text), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def written_anew(path: Path, if_there: str) -> Iterator[None]:
    """A block that makes a file or folder which a user asked for by ``--out``.

    Args:
        path: what is made.
        if_there: the hint for a path that exists.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    try:
        yield
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint=if_there) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="choose another with --out"
        ) from None


TRUSTED = ("plinth", "kafka")
"""Loggers whose messages never quote the data that Plinth reads."""

HIDDEN = "its text may quote data and is not shown"


class PlacesOnly(logging.Filter):
    """Libraries and exceptions quote what they read, names of patients included: tell the place."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let it pass: of an exception type and frames, of other loggers only where it was."""
        if record.name.partition(".")[0] not in TRUSTED:
            record.msg = f"from {record.name}, {record.filename}:{record.lineno}: {HIDDEN}"
            record.args = ()
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, frames = record.exc_info
            record.exc_text = "".join(traceback.format_tb(frames)) + f"{kind.__name__}: {HIDDEN}"
            record.exc_info = None
        return True


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A :func:`warnings.showwarning` that tells what was warned of and where, not the text."""
    place = Path(filename)
    where = f"{place.parent.name}/{place.name}:{lineno}"
    logging.getLogger("plinth.warnings").warning("%s at %s: %s", category.__name__, where, HIDDEN)


def start_logging(debug: bool, as_json: bool = False) -> None:
    """Log to stderr; our own words from INFO, others' from WARNING and without their text.

    Args:
        debug: from DEBUG.
        as_json: one JSON object a line, messages for people included.
    """
    if as_json:
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
    elif err.is_terminal:
        handler = RichHandler(console=err, show_path=debug, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(PlacesOnly())
    warnings.showwarning = show_warning
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("plinth").setLevel(logging.DEBUG if debug else logging.INFO)


def need_matplotlib() -> None:
    """Raises ConfigError if there is no matplotlib, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "a picture takes matplotlib",
            hint="pip install 'plinth-engine[benchmark]', or leave out --plot",
        ) from None
