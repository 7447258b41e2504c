"""Fraud scoring of card payments: real-time features, a calibrated model, rules and reasons."""

from plinth.verticals.finance.settings import FraudSettings
from plinth.verticals.finance.vertical import FraudScoring

__all__ = ["FraudScoring", "FraudSettings"]
