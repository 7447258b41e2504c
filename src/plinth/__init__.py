"""Plinth: one inference engine under pluggable verticals.

The engine's words are importable from here, each loaded when first asked for, so that
``import plinth`` costs nothing::

    from plinth import Call, Engine, Model, ModelSpec, Sla, TensorSpec

Domains have doors of their own: ``from plinth.medical import DICOMLoader``,
``from plinth.finance import FraudScoring``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from plinth.distribution import version

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

_VERTICALS = ("Item", "Settings", "Vertical", "WithArtefacts")

__version__ = version()


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'plinth' has no attribute {name!r}")
    room = "plinth.verticals" if name in _VERTICALS else "plinth.engine"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return sorted(__all__)
