"""Families of texts: BERT, DistilBERT, GPT-2 and decoders in the manner of LLaMA.

All take ``input_ids`` (n, length) and ``attention_mask`` (n, length), 1 where there is a token;
padding is to the right. The decoders answer every position of a text at once (prefill): there is
no cache of keys and values, and no generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.models.families.layers import Attention, Residual, by_tokens, visible


class Step(nn.Module):
    """A part of a text model that takes and gives what travels between its parts.

    Args:
        work: what it takes, the mask and the modules by name, to what it gives.
        parts: modules by name; they stay those of the model.
        last: it gives the outputs alone, else the mask goes on too.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        parts: Mapping[str, nn.Module | None],
        *,
        last: bool = False,
    ) -> None:
        super().__init__()
        self._work, self._last = work, last
        self._names = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        """Ids or tokens and the mask, to tokens and the mask, or the outputs by name."""
        found = self._work(x, mask, **{name: getattr(self, name) for name in self._names})
        return found if self._last else (found, mask)


def _attends(x: Tensor, mask: Tensor, block: Any, *, causal: bool = False) -> Tensor:
    found: Tensor = block(x, visible(mask, x.dtype, causal=causal))
    return found


class Bert(nn.Module):
    """An encoder with positions, segments and a pooled first token (Devlin et al., 2018)."""

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        inner: int = 3072,
        positions: int = 512,
        segments: int = 2,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.segments = nn.Embedding(segments, width) if segments else None
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(
            Residual(width, heads, inner, 1e-12, pre=False, activation=nn.GELU())
            for _ in range(depth)
        )
        self.pooler = nn.Linear(width, width) if segments else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``tokens`` (n, length, width), 0 where there is none; ``pooled`` (n, width) of BERT."""
        x = _bert_words(
            input_ids, attention_mask, self.words, self.positions, self.norm, self.segments
        )
        added = visible(attention_mask, x.dtype)
        for block in self.blocks:
            x = block(x, added)
        return _bert_found(x, attention_mask, self.pooler)

    def steps(self) -> list[nn.Module]:
        """The same one after the other: words, blocks, outputs; tokens and mask travel between."""
        first = {"words": self.words, "positions": self.positions, "norm": self.norm}
        return [
            Step(_bert_words, first | {"segments": self.segments}),
            *(Step(_attends, {"block": block}) for block in self.blocks),
            Step(_bert_found, {"pooler": self.pooler}, last=True),
        ]


class DistilBert(Bert):
    """BERT without segments and pooled token, half as deep (Sanh et al., 2019)."""

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 768,
        depth: int = 6,
        heads: int = 12,
        inner: int = 3072,
        positions: int = 512,
    ) -> None:
        super().__init__(vocabulary, width, depth, heads, inner, positions, segments=0)


def _bert_words(
    ids: Tensor, _: Tensor, words: Any, positions: Any, norm: Any, segments: Any
) -> Tensor:
    x = words(ids) + positions(torch.arange(ids.shape[1], device=ids.device))
    if segments is not None:
        x = x + segments(torch.zeros_like(ids))
    found: Tensor = norm(x)
    return found


def _bert_found(x: Tensor, mask: Tensor, pooler: Any) -> dict[str, Tensor]:
    found = {"tokens": x * (mask != 0)[..., None]}
    if pooler is not None:
        found["pooled"] = torch.tanh(pooler(x[:, 0]))
    return found


class Gpt2(nn.Module):
    """A decoder with learned positions and tied words (Radford et al., 2019); prefill only."""

    def __init__(
        self,
        vocabulary: int = 50257,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        positions: int = 1024,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(
            Residual(width, heads, 4 * width, 1e-5, pre=True, activation=nn.GELU("tanh"))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``logits`` (n, length, vocabulary) of the token after each; 0 where there is none."""
        x = _placed(input_ids, attention_mask, self.words, self.positions)
        added = visible(attention_mask, x.dtype, causal=True)
        for block in self.blocks:
            x = block(x, added)
        return _logits(x, attention_mask, self.norm, self.head)

    def steps(self) -> list[nn.Module]:
        """The same one after the other: words, blocks, outputs; tokens and mask travel between."""
        return [
            Step(_placed, {"words": self.words, "positions": self.positions}),
            *(Step(partial(_attends, causal=True), {"block": block}) for block in self.blocks),
            Step(_logits, {"norm": self.norm, "head": self.head}, last=True),
        ]


def _placed(ids: Tensor, _: Tensor, words: Any, positions: Any) -> Tensor:
    found: Tensor = words(ids) + positions(torch.arange(ids.shape[1], device=ids.device))
    return found


def _logits(x: Tensor, mask: Tensor, norm: Any, head: Any) -> dict[str, Tensor]:
    # Zeros before the head, which has no bias: the logits then need no second tensor of their size.
    return {"logits": head(norm(x) * (mask != 0)[..., None])}


class LlamaBlock(nn.Module):
    """Attention with rotary positions, then a gated layer; RMS norms before each."""

    def __init__(self, width: int, heads: int, key_heads: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, key_heads, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.activation = nn.SiLU()
        self.norm_1 = nn.RMSNorm(width, eps=1e-6)
        self.norm_2 = nn.RMSNorm(width, eps=1e-6)
        self.tokens_at_once = 0  # of the gated layer; 0: all

    def forward(self, x: Tensor, added: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens (n, length, width) to tokens."""
        x = x + self.attention(self.norm_1(x), added, rotation)
        return x + by_tokens(self._gated, self.norm_2(x), self.tokens_at_once)

    def _gated(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return found


class Llama(nn.Module):
    """A decoder with rotary positions and shared key heads (Touvron et al., 2023); prefill only."""

    def __init__(
        self,
        vocabulary: int = 32000,
        width: int = 2048,
        depth: int = 16,
        heads: int = 32,
        key_heads: int = 8,
        inner: int = 8192,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, heads, key_heads, inner) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        size = width // heads
        speed = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        self.register_buffer("speed", speed, persistent=False)
        self.speed: Tensor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``logits`` (n, length, vocabulary) of the token after each; 0 where there is none."""
        x = self.words(input_ids)
        rotation = _rotation(x, self.speed)
        added = visible(attention_mask, x.dtype, causal=True)
        for block in self.blocks:
            x = block(x, added, rotation)
        return _logits(x, attention_mask, self.norm, self.head)

    def steps(self) -> list[nn.Module]:
        """The same one after the other: words, blocks, outputs; tokens and mask travel between."""
        turned = partial(_turned, speed=self.speed)
        return [
            Step(_words, {"words": self.words}),
            *(Step(turned, {"block": block}) for block in self.blocks),
            Step(_logits, {"norm": self.norm, "head": self.head}, last=True),
        ]


def _words(ids: Tensor, _: Tensor, words: Any) -> Tensor:
    found: Tensor = words(ids)
    return found


def _turned(x: Tensor, mask: Tensor, block: Any, speed: Tensor) -> Tensor:
    found: Tensor = block(x, visible(mask, x.dtype, causal=True), _rotation(x, speed))
    return found


def _rotation(x: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    angle = (place[:, None] * speed).repeat(1, 2)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
