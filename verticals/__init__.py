"""Domains on the engine: the contract, discovery through entry points, and the built-in two."""

from plinth.verticals.contract import Item, Settings, Vertical, WithArtefacts

__all__ = ["Item", "Settings", "Vertical", "WithArtefacts"]
