"""``plinth backtest``: what other settings would have decided on a history."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from plinth.engine import ConfigError, Engine, InputError, Sla
from plinth.pipelines.assembly import load_vertical, running
from plinth.pipelines.config.settings import Config
from plinth.pipelines.config.source import toml_value
from plinth.pipelines.console import err, say, show_json, show_table
from plinth.pipelines.lines import MAX_LINE, Refusals, numbered, opened
from plinth.verticals import Tally, Vertical

_CHUNK = 256
_NO_HASTE = Sla()


@dataclass(slots=True)
class Side:
    """One of the two settings that are compared."""

    vertical: Vertical[Any, Any]
    engine: Engine
    tally: Tally = field(init=False)
    refusals: Refusals = field(default_factory=Refusals, init=False)

    def __post_init__(self) -> None:
        self.tally = self.vertical.tally()

    def answer(self, lines: Sequence[tuple[str, bytes]]) -> list[str]:
        """Answer records, each with its place; what became of each, in a word."""
        read = [self._read(raw) for _, raw in lines]
        requests = [one for one in read if not isinstance(one, InputError)]
        results: Iterator[Any] = iter(
            self.engine.run(self.vertical.infer(requests), _NO_HASTE).value if requests else []
        )
        words = []
        for (where, _), one in zip(lines, read, strict=True):
            result = one if isinstance(one, InputError) else next(results)
            if isinstance(result, InputError):
                self.refusals.note(where, result)
            words.append(self.tally.add(None if result is one else one, result))
        return words

    def _read(self, raw: bytes) -> Any:
        if len(raw) > MAX_LINE:
            return InputError(f"the record has more than {MAX_LINE:,} bytes", reason="too_large")
        try:
            return self.vertical.parse_at(raw, None)
        except InputError as error:
            return error


def settings_to_try(name: str, changes: Sequence[str]) -> dict[str, Any]:
    """Overrides of the config from ``key=value``, the value as in TOML or a bare text.

    Raises:
        ConfigError: no equals sign.
    """
    overrides: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {change!r} is not KEY=VALUE", hint="--set rules=new.toml")
        overrides[f"verticals.{name}.{key.strip()}"] = toml_value(value.strip())
    return overrides


def run_backtest(
    now: Config, then: Config, name: str, history: Sequence[Path], as_json: bool
) -> int:
    """Answer a history with both settings, each with models and a state of its own.

    Args:
        now: the settings in force.
        then: the settings that are tried.
        name: of the vertical.
        history: files of records, one JSON object a line, in the order in which they came.
        as_json: print JSON, no table.

    Raises:
        ConfigError: a file is not there, or none of the records was taken.
    """
    files = [opened(path) for path in history]
    changed: Counter[tuple[str, str]] = Counter()
    bar = Progress(
        TextColumn("[bold]backtest"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        sides = [_side(stack, config, name) for config in (now, then)]
        stack.enter_context(bar)
        task = bar.add_task(
            "backtest", total=sum(os.fstat(file.fileno()).st_size for file in files)
        )
        lines = itertools.chain.from_iterable(
            numbered(path, file) for path, file in zip(history, files, strict=True)
        )
        while chunk := list(itertools.islice(lines, _CHUNK)):
            before, after = (side.answer(chunk) for side in sides)
            changed.update(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
            bar.update(task, completed=sum(file.tell() for file in files))
    if all(side.refusals.counts.total() == side.tally.records for side in sides):
        raise ConfigError(
            "\n".join(["the history holds no record that is taken", *sides[0].refusals.told()]),
            hint="one JSON object a line",
        )
    _show(sides[0].tally.figures(), sides[1].tally.figures(), changed, as_json)
    for line in sides[0].refusals.told():
        say(line)
    return 0


def _side(stack: contextlib.ExitStack, config: Config, name: str) -> Side:
    vertical = load_vertical(config, name)
    if vertical.request is None:
        raise ConfigError(f"{name} takes folders, not records", hint="name another vertical")
    return Side(vertical, stack.enter_context(running(config, {name: vertical})))


def _show(
    now: dict[str, float],
    then: dict[str, float],
    changed: Counter[tuple[str, str]],
    as_json: bool,
) -> None:
    if as_json:
        moves = [
            {"now": before, "then": after, "records": count}
            for (before, after), count in changed.most_common()
        ]
        clean = [{k: None if math.isnan(v) else v for k, v in one.items()} for one in (now, then)]
        show_json({"now": clean[0], "then": clean[1], "changed": moves})
        return
    names = list(dict.fromkeys((*now, *then)))
    rows = [(name, *_row(now.get(name, 0.0), then.get(name, 0.0))) for name in names]
    show_table("Backtest", ("", "now", "then", "difference"), rows)
    if changed:
        pairs = [(before, after, f"{n:,}") for (before, after), n in changed.most_common(20)]
        show_table("Decided otherwise", ("now", "then", "records"), pairs)


def _row(now: float, then: float) -> tuple[str, str, str]:
    difference = then - now
    same = math.isnan(difference) or not difference
    return _text(now), _text(then), "" if same else _text(difference, "+")


def _text(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    if float(value).is_integer():
        return f"{value:{sign},.0f}"
    return f"{value:{sign},.2f}" if abs(value) >= 100 else f"{value:{sign}.4g}"
