"""Fraud scoring of card payments: the public names of ``plinth.verticals.finance``."""

from plinth.verticals.finance import FraudScoring, FraudSettings

__all__ = ["FraudScoring", "FraudSettings"]
