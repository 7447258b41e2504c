"""Fraud scoring of card payments: real-time features, a calibrated model, rules and reasons."""

from typing import TYPE_CHECKING

from plinth.faces import loads_on_demand

if TYPE_CHECKING:
    from plinth.verticals.finance.settings import FraudSettings
    from plinth.verticals.finance.vertical import FraudScoring

__all__ = ["FraudScoring", "FraudSettings"]

__getattr__ = loads_on_demand(__name__, {"settings": "FraudSettings", "vertical": "FraudScoring"})
