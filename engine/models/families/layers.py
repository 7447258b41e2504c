"""Layers that several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def visible(mask: Tensor, dtype: torch.dtype, *, causal: bool = False) -> Tensor:
    """What is added to the scores of attention.

    Args:
        mask: (n, length), not 0 where there is a token.
        dtype: of the scores.
        causal: whether a token sees only itself and those before it.

    Returns:
        (n, 1, length or 1, length): 0 where a token is seen, else the smallest number of the
        dtype, so that a row without tokens gives numbers too.
    """
    seen = (mask != 0)[:, None, None, :]
    if causal:
        length = mask.shape[1]
        place = torch.arange(length, device=mask.device)
        seen = seen & (place[None, :] <= place[:, None])[None, None]
    nothing = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(seen, nothing, nothing + torch.finfo(dtype).min)


class Attention(nn.Module):
    """Multi-head attention; heads of keys and values may be fewer than those of queries.

    Args:
        width: of the tokens.
        heads: of the queries.
        key_heads: of keys and values; by default as many.
        bias: whether the projections have one.
    """

    def __init__(
        self, width: int, heads: int, key_heads: int | None = None, *, bias: bool = True
    ) -> None:
        super().__init__()
        if width % heads or heads % (key_heads or heads):
            raise ValueError(f"width {width} and heads {heads}, {key_heads} do not divide")
        self.heads, self.key_heads, self.size = heads, key_heads or heads, width // heads
        self.query = nn.Linear(width, heads * self.size, bias=bias)
        self.key = nn.Linear(width, self.key_heads * self.size, bias=bias)
        self.value = nn.Linear(width, self.key_heads * self.size, bias=bias)
        self.out = nn.Linear(heads * self.size, width, bias=bias)

    def forward(
        self, x: Tensor, added: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Tokens (n, length, width); ``added`` from :func:`visible`; cosines and sines."""
        n, length, _ = x.shape
        query = self.query(x).view(n, length, self.heads, self.size).transpose(1, 2)
        key = self.key(x).view(n, length, self.key_heads, self.size).transpose(1, 2)
        value = self.value(x).view(n, length, self.key_heads, self.size).transpose(1, 2)
        if rotation is not None:
            query, key = turned(query, *rotation), turned(key, *rotation)
        if self.key_heads != self.heads:
            times = self.heads // self.key_heads
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=added)
        whole: Tensor = self.out(found.transpose(1, 2).reshape(n, length, self.heads * self.size))
        return whole


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021), with the halves of a head as pairs."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


def by_tokens(layer: Callable[[Tensor], Tensor], x: Tensor, at_once: int) -> Tensor:
    """A layer that takes each token by itself, on so many of (n, length) at once; 0: on all."""
    if not at_once or x.shape[0] * x.shape[1] <= at_once:
        return layer(x)
    tokens = x.flatten(0, 1)
    found = torch.empty_like(tokens)
    for given, made in zip(torch.split(tokens, at_once), torch.split(found, at_once), strict=True):
        made.copy_(layer(given))
    return found.view(x.shape)


class Residual(nn.Module):
    """A block of a transformer with its norms before (``pre``) or after its parts.

    Attributes:
        tokens_at_once: how many, of all rows, the fully connected layers take at once; 0: all.

    Args:
        width: of the tokens.
        heads: of attention.
        inner: width between the two fully connected layers.
        eps: of the norms.
        pre: whether each part normalises what it is given, else its sum.
        activation: between the layers.
    """

    def __init__(
        self, width: int, heads: int, inner: int, eps: float, *, pre: bool, activation: nn.Module
    ) -> None:
        super().__init__()
        self.pre = pre
        self.tokens_at_once = 0
        self.attention = Attention(width, heads)
        self.norm_1 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, inner)
        self.activation = activation
        self.down = nn.Linear(inner, width)
        self.norm_2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Tokens (n, length, width) to tokens."""
        if self.pre:
            x = x + self.attention(self.norm_1(x), added)
            return x + by_tokens(self._full, self.norm_2(x), self.tokens_at_once)
        x = self.norm_1(x + self.attention(x, added))
        after: Tensor = self.norm_2(x + by_tokens(self._full, x, self.tokens_at_once))
        return after

    def _full(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.activation(self.up(x)))
        return found


def convolved(dims: int, inside: int, outside: int, size: int, **options: Any) -> nn.Sequential:
    """A convolution without bias, kept in size, and its batch norm; ``relu`` follows if asked."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    eps, last = options.pop("eps", 1e-5), options.pop("relu", None)
    parts: list[nn.Module] = [
        conv(inside, outside, size, padding=size // 2, bias=False, **options),
        norm(outside, eps=eps),
    ]
    return nn.Sequential(*parts, *([last] if last is not None else []))
