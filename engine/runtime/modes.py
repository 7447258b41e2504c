"""How the lanes of one engine share work: the modes, as one table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, nearest
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.work import BatchKey

Mode = Literal["sync", "async", "hybrid"]
_WORTH = 0.8
"""A request is shared out by ``"auto"`` if that takes at most this share of the time, and a row of
a full batch costs the lanes at least this share of what a row of its shares does."""


@dataclass(frozen=True, slots=True)
class Modes:
    """How lanes share work.

    Args:
        mode: ``"sync"``: one global round in flight, of which every lane gets a share, and whose
            answers come together, in order; ``"async"``: a request goes whole, in batches as large
            as the model takes, to whichever lanes are free first; ``"hybrid"``: a request with a
            deadline of ``sync_threshold`` items or more is shared out evenly over the lanes that
            are well, where there are two or more, and others go as in ``"async"``.
        sync_threshold: items (rows, or windows of a volume) of one request; ``"auto"``: those from
            which its share takes at most 0.8 of the time of the whole, by what batches cost, in
            as many shares as keep a row from costing the lanes more than 1.25 of what it costs
            in a full batch: under load, lanes have that much less to give.
        pipeline_depth: batches that a lane is given before the first of them is done; ``None``: 1.
        communication_backend: what the lanes of one model would talk by; ``"auto"``: what torch
            names for the device.

    Raises:
        ConfigError: a value that is none of these.
    """

    mode: Mode = "hybrid"
    sync_threshold: int | Literal["auto"] = "auto"
    pipeline_depth: int | None = None
    communication_backend: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("sync", "async", "hybrid"):
            raise ConfigError(
                f"modes.mode is {self.mode!r}, expected sync, async or hybrid",
                hint=nearest(str(self.mode), ["sync", "async", "hybrid"]),
            )
        threshold = self.sync_threshold
        whole = isinstance(threshold, int) and not isinstance(threshold, bool) and threshold >= 1
        if threshold != "auto" and not whole:
            raise ConfigError(
                f"modes.sync_threshold is {threshold!r}, expected a number of items of 1 or more, "
                "or auto"
            )
        depth = self.pipeline_depth
        if depth is not None and (type(depth) is not int or depth < 1):
            raise ConfigError(
                f"modes.pipeline_depth is {depth!r}, expected a whole number of 1 or more",
                hint="leave it out for the device's own",
            )
        if self.mode == "sync" and depth not in (None, 1):
            raise ConfigError(
                f"modes.pipeline_depth is {self.pipeline_depth}, expected 1 in mode sync: one "
                "round is in flight",
                hint="use mode hybrid or async",
            )

    @property
    def in_rounds(self) -> bool:
        """Whether lanes work in rounds."""
        return self.mode == "sync"

    @classmethod
    def of(cls, table: Modes | Mapping[str, Any] | None) -> Modes:
        """Modes from their table; none: the default.

        Raises:
            ConfigError: an unknown key, or an impossible value.
        """
        if isinstance(table, Modes):
            return table
        known = [each.name for each in fields(cls)]
        table = {} if table is None else table
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"modes is {table!r}, expected a table", hint='modes={"mode": "hybrid"}'
            )
        for key in table:
            if key not in known:
                raise ConfigError(f"modes.{key} is unknown", hint=nearest(str(key), known))
        return cls(**table)

    def units(self, costs: LatencyModel, key: BatchKey, items: int, lanes: int, most: int) -> int:
        """In how many parts a request with a deadline is given to the lanes.

        Args:
            costs: what its batches cost.
            key: its batch key.
            items: its rows or windows.
            lanes: how many are well.
            most: rows of its largest batch.
        """
        parts = min(lanes, items)
        if parts < 2 or self.mode == "async":
            return 1
        if self.mode == "sync":
            return parts
        if self.sync_threshold != "auto":
            return parts if items >= self.sync_threshold else 1

        def is_dear(rows: int) -> bool:
            return _WORTH * most * costs.predict(key, rows, 0.5) > full * rows

        full = costs.predict(key, most, 0.5)
        half = min(items // 2, most)
        if not full or is_dear(half):
            return 1
        least = bisect_left(range(1, half), True, key=lambda rows: not is_dear(rows)) + 1
        parts = min(parts, items // least)
        whole = costs.predict(key, items, 0.5)
        return parts if costs.predict(key, -(-items // parts), 0.5) <= _WORTH * whole else 1

    def backend(self, device: Device) -> str | None:
        """What the lanes of one model would talk by; ``None``: this torch has nothing.

        Raises:
            ConfigError: what was named is not there, or not for this device.
        """
        usual = _usual(device)
        if self.communication_backend == "auto":
            return usual
        name = self.communication_backend
        found = torch.distributed.is_available() and torch.distributed.is_backend_available(name)
        able = torch.distributed.Backend.backend_capability.get(name, []) if found else []
        if not found or (able and device.kind not in able):
            raise ConfigError(
                f"modes.communication_backend is {name!r}, which torch does not have for {device}",
                hint=f"use auto, which is {usual} here",
            )
        return name


def _usual(device: Device) -> str | None:
    """What torch names for a device; ``None``: nothing."""
    if not torch.distributed.is_available():
        return None
    try:
        return str(torch.distributed.get_default_backend_for_device(device.torch))
    except ValueError:  # a kind of device that none is registered for
        return None
