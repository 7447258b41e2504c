"""Fixtures and helper modules shared by the tests of the doors."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kafka_fixtures import clients_end, kafka_node, own_node, spare_node

__all__ = ["clients_end", "kafka_node", "own_node", "spare_node"]
