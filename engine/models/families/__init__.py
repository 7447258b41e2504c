"""Model families that are served from a config: plain definitions of torch."""

from plinth.engine.models.families.registry import Family, families, find

__all__ = ["Family", "families", "find"]
