"""Fraud scoring of card payments: real-time features, a calibrated model, rules and reasons."""

from plinth.verticals.finance.vertical import FraudScoring, FraudSettings

__all__ = ["FraudScoring", "FraudSettings"]
