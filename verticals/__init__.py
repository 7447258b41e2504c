"""Domains on the engine: the contract, discovery through entry points, and the built-in two."""

from plinth.verticals.contract import Item, LeftOut, Query, Settings, Tally, Vertical, WithArtefacts

__all__ = ["Item", "LeftOut", "Query", "Settings", "Tally", "Vertical", "WithArtefacts"]
