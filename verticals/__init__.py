"""Domains on the engine: the contract, discovery through entry points, and the built-in two."""

from plinth.verticals.contract import Item, LeftOut, Settings, Tally, Vertical, WithArtefacts

__all__ = ["Item", "LeftOut", "Settings", "Tally", "Vertical", "WithArtefacts"]
