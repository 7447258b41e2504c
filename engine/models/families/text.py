"""Families of texts: BERT, DistilBERT, GPT-2 and decoders in the manner of LLaMA.

All take ``input_ids`` (n, length) and ``attention_mask`` (n, length), 1 where there is a token;
padding is to the right. The decoders answer every position of a text at once (prefill): there is
no cache of keys and values, and no generation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plinth.engine.models.families.layers import Attention, Residual, by_tokens, visible


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
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.positions(place)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(input_ids))
        x = self.norm(x)
        added = visible(attention_mask, x.dtype)
        for block in self.blocks:
            x = block(x, added)
        found = {"tokens": x * (attention_mask != 0)[..., None]}
        if self.pooler is not None:
            found["pooled"] = torch.tanh(self.pooler(x[:, 0]))
        return found


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
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.positions(place)
        added = visible(attention_mask, x.dtype, causal=True)
        for block in self.blocks:
            x = block(x, added)
        logits = self.head(self.norm(x))
        return {"logits": logits * (attention_mask != 0)[..., None]}


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
        place = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        angle = (place[:, None] * self.speed).repeat(1, 2)
        rotation = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        added = visible(attention_mask, x.dtype, causal=True)
        for block in self.blocks:
            x = block(x, added, rotation)
        logits = self.head(self.norm(x))
        return {"logits": logits * (attention_mask != 0)[..., None]}
