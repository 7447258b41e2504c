"""Converters: models of other libraries into the store, each held against its source."""

from plinth.engine.models.convert.source import Options
from plinth.engine.models.convert.sources import Converted, convert

__all__ = ["Converted", "Options", "convert"]
