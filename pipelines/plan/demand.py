"""What is asked of the lanes, and what batches cost them: checked before anything is planned."""

from __future__ import annotations

import csv
import io
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from plinth.engine.errors import ConfigError, nearest
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.simulate import Arrivals
from plinth.engine.tables import Table
from plinth.pipelines.config.source import Origin, places, validated
from plinth.pipelines.lines import json_of, toml, whole

MAX_TRACE = 256 << 20
"""Bytes of a file of arrivals."""
_PERIODS = {"second": 1.0, "s": 1.0, "minute": 60.0, "hour": 3600.0, "h": 3600.0, "day": 86400.0}
_AMOUNT = re.compile(r"\s*([\d_,]*\.?\d+)\s*([a-z]*)\s*/\s*([a-z]+)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Patient:
    """Background work: so many jobs in a period of so many seconds."""

    jobs: float
    seconds: float
    noun: str


def parse_patient(text: str, night_hours: float) -> Patient:
    """``"300 studies/night"`` as numbers; a night has the hours that are given.

    Raises:
        ConfigError: it does not read so.
    """
    match = _AMOUNT.fullmatch(text)
    periods = {**_PERIODS, "night": night_hours * 3600}
    if match is None or match[3].lower() not in periods:
        raise ConfigError(
            f"--background is {text!r}, expected a number and a period",
            hint=f"write it as '300 studies/night'; periods are {', '.join(periods)}",
        )
    jobs = float(re.sub(r"[_,]", "", match[1]))
    return Patient(jobs, periods[match[3].lower()], match[2] or "jobs")


def parse_lanes(text: str) -> range:
    """``"1..16"`` or ``"4"`` as numbers of lanes.

    Raises:
        ConfigError: it does not read so.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", text)
    low = int(match[1]) if match else 0
    high = int(match[2] or low) if match else 0
    if not 1 <= low <= high <= 10_000:
        raise ConfigError(
            f"--lanes is {text!r}, expected 1 to 10000", hint="write it as 4, or as 1..16"
        )
    return range(low, high + 1)


def read_trace(path: Path) -> Arrivals:
    """Arrival times from the first column of a CSV file, in seconds, the first at 0.

    Raises:
        ConfigError: names the line that is not a time, or comes before the one above it.
    """
    times: list[float] = []
    try:
        text = whole(path, MAX_TRACE).decode()
        for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
            if not row or not row[0].strip():
                continue
            try:
                at = float(row[0])
            except ValueError:
                if number == 1:
                    continue  # a heading
                raise ConfigError(
                    f"{path}:{number}: {row[0][:40]!r} is not a time",
                    hint="the first column holds arrival times in seconds",
                ) from None
            if not np.isfinite(at) or (times and at < times[-1]):
                raise ConfigError(
                    f"{path}:{number}: {row[0][:40]} comes before the line above it",
                    hint="sort the arrivals by time",
                )
            times.append(at)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if len(times) < 2 or times[-1] == times[0]:
        raise ConfigError(
            f"{path} has {len(times)} arrivals", hint="two at different times or more"
        )
    return np.array(times) - times[0]


class Costs(Table):
    """What batches of one model cost: seconds by rows, measured."""

    seconds: dict[int, float] = Field(min_length=1, description="seconds of a batch, by its rows")
    delays: tuple[float, ...] = Field(
        default=(0.0,), min_length=1, description="what single batches took beyond that, seconds"
    )
    turns: tuple[float, ...] = Field(
        default=(0.0,),
        min_length=1,
        description="what passed from the end of a batch until its lane had begun the next, "
        "seconds: answers handed out, the next batch formed, the interpreter waited for",
    )
    outside: tuple[float, ...] = Field(
        default=(0.0,),
        min_length=1,
        description="what requests take beside their batches: network, door, encoding; seconds, in "
        "the order of the time that they took in the engine",
    )
    again: float = Field(
        default=0.0, ge=0, le=1, description="share of requests that ask a second time, after that"
    )
    again_rows: int = Field(default=1, ge=1, description="rows of what they ask then")
    followed: tuple[float, ...] = Field(
        default=(),
        description="seconds from an answer of the engine until its caller asks for more; none "
        "known: half of the median of ``outside``",
    )
    max_rows: int | None = Field(
        default=None, ge=1, description="rows of the largest batch; none: the largest measured"
    )
    rows: int = Field(default=1, ge=1, description="rows of one request, or of one job")
    at_once: int | None = Field(
        default=None, ge=1, description="background jobs in work at a time; none: always enough"
    )
    between: float = Field(
        default=0.0,
        ge=0,
        description="seconds from the end of a job's batches to the first of the job after it, of "
        "those in work at a time: reading, steps, outputs",
    )

    @property
    def most(self) -> int:
        """Rows of the largest batch."""
        return self.max_rows or max(self.seconds)

    def curve(self) -> LatencyModel:
        """The costs as the batcher has them, under the key ``"a"``."""
        model = LatencyModel()
        for rows, seconds in sorted(self.seconds.items()):
            model.seed("a", rows, seconds)
        return model


class CostFile(Table):
    """A table of costs: urgent work, and background work if there is any."""

    urgent: Costs
    background: Costs | None = None


def read_costs(
    path: Path, urgent: str | None, background: str | None, rows: int | None
) -> CostFile:
    """Costs from a table of one's own (TOML), or from what an engine has measured (JSON).

    Args:
        path: ``.json``: what ``engine.latency_file`` names; else TOML.
        urgent: the model of urgent work, in a file of the engine's.
        background: the model of background work, likewise.
        rows: of one background job; ``None``: as the table says.

    Raises:
        ConfigError: names the file and the key at fault.
    """
    try:
        raw = whole(path)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if path.suffix == ".json":
        data: dict[str, Any] = _measured(path, raw, urgent, background)
        origin = Origin(path, {}, {})
    else:
        try:
            data = toml(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}") from None
        origin = Origin(path, dict(places(text)), {})
    if rows is not None and isinstance(data.get("background"), dict):
        data["background"] = data["background"] | {"rows": rows}
    return validated(CostFile, data, (), origin)


def read_outside(path: Path) -> tuple[float, ...]:
    """What requests took outside of the engine, in what ``plinth benchmark`` has measured.

    Seconds, in the order of the time that they took in the engine.

    Args:
        path: of what ``plinth benchmark URL --json`` printed.

    Raises:
        ConfigError: there is none of it.
    """
    try:
        found = next(_outsides(json_of(whole(path))), None)
        seconds = () if found is None else tuple(float(each) / 1e3 for each in found)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no result of a benchmark: {type(error).__name__}") from None
    if not seconds or not np.isfinite(seconds).all():
        raise ConfigError(
            f"{path} does not say what requests took outside of the engine",
            hint="run plinth benchmark URL --json against a server of Plinth",
        )
    return seconds


def _outsides(value: Any) -> Iterator[list[Any]]:
    """The lists under ``outside_by_engine_ms``, at any depth, that are not empty."""
    if isinstance(value, dict):
        own = value.get("outside_by_engine_ms")
        if isinstance(own, list) and own:
            yield own
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _outsides(each)


def _measured(path: Path, raw: bytes, urgent: str | None, background: str | None) -> dict[str, Any]:
    try:
        file = json_of(raw)
        seconds: Mapping[str, Any] = dict(file["seconds"])
        delays, turns = dict(file.get("delays", {})), dict(file.get("turns", {}))
        followed = dict(file.get("followed", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a latency file: {type(error).__name__}") from None

    def of(name: str | None, option: str) -> dict[str, Any]:
        found = sorted(key for key in seconds if name is None or key.split("@")[0] == name)
        if len(found) != 1:
            names = sorted({key.split("@")[0] for key in seconds})
            what = "no costs" if not found else f"{len(found)} batch keys"
            raise ConfigError(
                f"{path} has {what} of {name or 'one model'}",
                hint=f"name one by {option}: {nearest(name or '', names)}",
            )
        key = found[0]
        return {
            "seconds": seconds[key],
            "delays": delays.get(key) or [0.0],
            "turns": turns.get(key) or [0.0],
            "followed": followed.get(key) or [],
        }

    found = {"urgent": of(urgent, "--model")}
    return found | ({} if background is None else {"background": of(background, "--study-model")})
