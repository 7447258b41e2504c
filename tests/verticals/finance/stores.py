"""Model stores with several versions, for the tests of what changes while it serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from plinth.engine import ModelStore
from plinth.engine.compression.packed_layers import unpack_layers
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.succession.champion import WINDOW


def add_version(
    folder: Path,
    version: str,
    *,
    noise: float = 0.0,
    shift: float = 0.0,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """The model that comes with Plinth under another version, made worse by noise or shifted.

    What it was trained on is not told, so that payments of any time count.
    """
    for name in ("fraud", "fraud-lite"):
        model = ModelStore(STORE).load(name)
        unpack_layers(model.module)
        dice = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.module.body.parameters():  # type: ignore[union-attr]
                weight += noise * torch.randn(weight.shape, generator=dice)
            model.module.calibration.shift += shift  # type: ignore[union-attr,operator]
        spec = model.spec.model_copy(update={"version": version})
        known = ModelStore(STORE).facts(name)
        known.pop(WINDOW, None)
        ModelStore(folder).save(spec, model.module, facts=known | dict(facts or {}))
