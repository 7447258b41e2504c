"""Plinth: one inference engine under pluggable verticals.

The engine's words are importable from here, each loaded when first asked for, so that
``import plinth`` costs nothing::

    from plinth import Call, Engine, Model, ModelSpec, Sla, TensorSpec

Domains have doors of their own: ``from plinth.medical import DICOMLoader``,
``from plinth.finance import FraudScoring``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plinth.distribution import version
from plinth.faces import loads_on_demand

if TYPE_CHECKING:
    from plinth.engine import (
        Answer,
        Call,
        Cancelled,
        Closed,
        Compute,
        ComputeError,
        ConfigError,
        DeadlineRefused,
        DeviceError,
        Engine,
        EngineFailed,
        Flow,
        InputError,
        Model,
        ModelError,
        ModelSpec,
        ModelStore,
        Pause,
        PlinthError,
        QueueFull,
        Refused,
        Sla,
        TensorSpec,
        Tiling,
        Timing,
        architecture,
        from_pretrained,
    )
    from plinth.verticals import Item, Settings, Vertical, WithArtefacts

__all__ = [
    "Answer",
    "Call",
    "Cancelled",
    "Closed",
    "Compute",
    "ComputeError",
    "ConfigError",
    "DeadlineRefused",
    "DeviceError",
    "Engine",
    "EngineFailed",
    "Flow",
    "InputError",
    "Item",
    "Model",
    "ModelError",
    "ModelSpec",
    "ModelStore",
    "Pause",
    "PlinthError",
    "QueueFull",
    "Refused",
    "Settings",
    "Sla",
    "TensorSpec",
    "Tiling",
    "Timing",
    "Vertical",
    "WithArtefacts",
    "__version__",
    "architecture",
    "from_pretrained",
]

_HOMES = {
    "engine": "Answer Call Cancelled Closed Compute ComputeError ConfigError DeadlineRefused "
    "DeviceError Engine EngineFailed Flow InputError Model ModelError ModelSpec "
    "ModelStore Pause PlinthError QueueFull Refused Sla TensorSpec Tiling Timing "
    "architecture from_pretrained",
    "verticals": "Item Settings Vertical WithArtefacts",
}

__version__ = version()
__getattr__ = loads_on_demand(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
