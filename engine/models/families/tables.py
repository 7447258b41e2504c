"""Families of tables and series: GRU and LSTM, a gated MLP, the FT-Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plinth.engine.models.families.layers import Residual


class Recurrent(nn.Module):
    """A GRU or LSTM over steps, read after the last one that the mask shows."""

    def __init__(
        self,
        cell: str = "gru",
        features: int = 32,
        width: int = 64,
        depth: int = 1,
        outputs: int = 1,
        steps: int = 20,
    ) -> None:
        super().__init__()
        if cell not in ("gru", "lstm"):
            raise ValueError(f"cell is {cell!r}, expected gru or lstm")
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.steps = steps
        self.layers = kind(features, width, depth, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, series: Tensor, mask: Tensor) -> Tensor:
        """``series`` (n, steps, features), ``mask`` (n, steps), shown first; (n, outputs)."""
        states, _ = self.layers(series)
        last = ((mask != 0).long().sum(1) - 1).clamp(min=0)
        found: Tensor = self.head(
            states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
        )
        return found


class GatedMlp(nn.Module):
    """Layers of which one half opens the other (GLU), added to what they were given."""

    def __init__(
        self, features: int = 64, width: int = 256, depth: int = 3, outputs: int = 1
    ) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.head = nn.Linear(width, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, features) to (n, outputs)."""
        x = self.first(features)
        for norm, gate in zip(self.norms, self.gates, strict=True):
            x = x + nn.functional.glu(gate(norm(x)))
        found: Tensor = self.head(x)
        return found


class FtTransformer(nn.Module):
    """Each feature a token, read by one of its own (Gorishniy et al., 2021)."""

    def __init__(
        self,
        features: int = 32,
        width: int = 192,
        depth: int = 3,
        heads: int = 8,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features, width) / width**0.5)
        self.shift = nn.Parameter(torch.randn(features, width) / width**0.5)
        self.first = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.blocks = nn.ModuleList(
            Residual(width, heads, 2 * width, 1e-5, pre=True, activation=nn.ReLU())
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, features) to (n, outputs)."""
        tokens = features[..., None] * self.scale + self.shift
        x = torch.cat([self.first.expand(features.shape[0], -1, -1), tokens], 1)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(torch.relu(self.norm(x[:, 0])))
        return found
