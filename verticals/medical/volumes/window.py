"""Windows that map modality values to the range 0 to 1 (PS3.3 C.11.2.1.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from plinth.engine.errors import ConfigError

Function = Literal["linear_exact", "linear", "sigmoid"]


def check_window(center: float, width: float, function: Function) -> None:
    """Raise ConfigError for a window that the standard does not allow."""
    if function not in ("linear_exact", "linear", "sigmoid"):
        raise ConfigError(f"window is {function!r}, expected 'linear_exact', 'linear' or 'sigmoid'")
    smallest = 1.0 if function == "linear" else 0.0
    if not (width >= 1 if function == "linear" else width > 0):
        raise ConfigError(
            f"window_width is {width}, expected at least {smallest:g}"
            if smallest
            else f"window_width is {width}, expected a number above 0"
        )


def apply_window_(
    values: Tensor, center: float, width: float, function: Function = "linear_exact"
) -> Tensor:
    """Map float modality values to 0 to 1, in place.

    Args:
        values: float tensor of any shape, modality units (HU for CT).
        center: Window Center.
        width: Window Width.
        function: ``"linear_exact"``: (x - c) / w + 0.5 (C.11.2.1.3.2), for computing;
            ``"linear"``: (x - (c - 0.5)) / (w - 1) + 0.5 (C.11.2.1.2.1), what displays show;
            ``"sigmoid"``: 1 / (1 + exp(-4 (x - c) / w)) (C.11.2.1.3.1).

    Returns:
        ``values``, clamped to [0, 1].
    """
    check_window(center, width, function)
    if function == "sigmoid":
        return values.sub_(center).mul_(4.0 / width).sigmoid_()
    if function == "linear":
        if width == 1:
            return values.copy_((values > center - 0.5).to(values.dtype))
        center, width = center - 0.5, width - 1
    return values.sub_(center - width / 2).div_(width).clamp_(0.0, 1.0)


def apply_window(
    values: Tensor, center: float, width: float, function: Function = "linear_exact"
) -> Tensor:
    """As :func:`apply_window_`, on a float32 copy; integers are taken too."""
    return apply_window_(torch.clone(values).float(), center, width, function)
