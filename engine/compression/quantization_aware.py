"""Training with the weights that are stored: integers of few bits, and a scale per channel.

The forward uses the quantised weight; its gradient goes to the float32 shadow as if nothing had
been rounded (straight-through: Bengio et al., arXiv:1308.3432, 2013). Scales are float16 in
training too, so that what was trained is what is stored, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plinth.engine.compression.feedback import rounded
from plinth.engine.compression.packing import Coded
from plinth.engine.compression.registry import Transform, Weight, register
from plinth.engine.errors import ConfigError, nearest

LEVELS = {"int8": 127, "even": 127, "int4": 7, "int3": 3, "ternary": 1}
"""Largest code by precision; in ``even`` all channels of a weight have one step, and codes that
come often take few bits in the file (entropy-coded scalar quantisation: Gish, Pierce, 1968)."""
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the largest value; the least error is taken
_TERNARY = 0.7  # codes are 0 up to this share of the mean magnitude (Li, Liu: TWN, 2016)
_TINY = 2.0**-14  # the smallest normal float16
_EVERY = 16  # steps between two looks at the scales
_SETTLED = 0.8  # of training, from which scales stay


@register("quantization_aware")
class QuantizationAware(Transform):
    """Weights of few bits, per channel.

    Args:
        bits: ``int8``, ``even``, ``int4``, ``int3`` or ``ternary``.
        ends: of the first and the last weight, whose errors cost most; the coarser of the two
            is never taken.
        step: of ``even``, in standard deviations of the weight: 0.35 takes about 3.6 bits, half
            of it one more.
        feedback: whether what is stored makes good the error of one weight by the next ones; see
            :mod:`plinth.engine.compression.feedback`. For weights that were not trained for it.
    """

    def __init__(
        self, bits: str = "int8", ends: str = "int8", step: float = 0.35, feedback: bool = False
    ) -> None:
        for value in (bits, ends):
            if value not in LEVELS:
                raise ConfigError(f"there are no weights of {value!r}", hint=nearest(value, LEVELS))
        if not 0.02 <= step <= 2:
            raise ConfigError(f"step is {step}, expected 0.02 to 2 standard deviations")
        self._high, self._high_ends = LEVELS[bits], max(LEVELS[bits], LEVELS[ends])
        self._step = step if bits == "even" else 0.0
        self._feedback, self._moments = feedback, dict[str, Tensor]()
        self._scales: dict[str, Tensor] = {}
        self._steps = 0
        self._stale = True

    def at(self, progress: float) -> None:
        """See :class:`Transform`."""
        self._stale = self._steps % _EVERY == 0 and (progress < _SETTLED or self._steps == 0)
        self._steps += 1

    def forward(self, weight: Weight, value: Tensor) -> Tensor:
        """The quantised weight, with the gradient of the weight."""
        with torch.no_grad():
            codes, scales = self._quantised(weight, value)
            rounded = codes * scales
        return value + (rounded - value).detach()

    @property
    def asks_moments(self) -> bool:
        """See :class:`Transform`."""
        return self._feedback

    def see(self, moments: Mapping[str, Tensor]) -> None:
        """See :class:`Transform`."""
        self._moments = dict(moments)

    def coded(self, weight: Weight, value: Tensor) -> Coded:
        """Its codes and scales, those of the last step."""
        with torch.no_grad():
            self._stale = False
            codes, scales = self._quantised(weight, value)
            high, products = self._most(weight), self._moments.get(weight.name)
            if products is not None and weight.axis == 0 and high > 1:
                flat = scales.flatten()
                codes = rounded(value.flatten(1), products, flat, high).reshape(value.shape)
            return Coded(codes.to(torch.int8), scales.flatten().half(), weight.axis)

    def _most(self, weight: Weight) -> int:
        return self._high_ends if weight.ends else self._high

    def _quantised(self, weight: Weight, value: Tensor) -> tuple[Tensor, Tensor]:
        high = self._most(weight)
        if self._stale or weight.name not in self._scales:
            self._scales[weight.name] = (
                _even(value, weight.axis, self._step)
                if self._step and not weight.ends
                else _scales(value, weight.axis, high)
            )
        scales = self._scales[weight.name]
        if high == 1:
            cut = _TERNARY * _mean(value.abs(), weight.axis)
            return torch.where(value.abs() > cut, value.sign(), 0.0), scales
        return (value / scales).round().clamp(-high, high), scales


def _scales(value: Tensor, axis: int, high: int) -> Tensor:
    """A float16 number for each channel, float32, broadcast over the weight."""
    size = value.abs()
    if high == 1:
        kept = size > _TERNARY * _mean(size, axis)
        total = _sum(size * kept, axis)
        return _half(total / _sum(kept.float(), axis).clamp_min(1))
    most = size.amax([d for d in range(value.ndim) if d != axis], keepdim=True) / high
    if high > 7:
        return _half(most)
    best, least = most, torch.full_like(most, float("inf"))
    for clip in _CLIPS:
        scales = _half(most * clip)
        error = _sum(((value / scales).round().clamp(-high, high) * scales - value) ** 2, axis)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def _even(value: Tensor, axis: int, step: float) -> Tensor:
    """The same number for each channel: so many standard deviations of all values."""
    shape = [size if d == axis else 1 for d, size in enumerate(value.shape)]
    return _half(step * value.std(correction=0)).expand(shape)


def _half(scales: Tensor) -> Tensor:
    return scales.clamp(_TINY, 60000).half().float()


def _sum(value: Tensor, axis: int) -> Tensor:
    return value.sum([d for d in range(value.ndim) if d != axis], keepdim=True)


def _mean(value: Tensor, axis: int) -> Tensor:
    return value.mean([d for d in range(value.ndim) if d != axis], keepdim=True)
