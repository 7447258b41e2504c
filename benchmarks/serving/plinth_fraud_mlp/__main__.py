"""Put the weights into a model store, from where the vertical loads them.

python -m plinth_fraud_mlp build/serving/fraud-mlp.safetensors build/serving/models
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fraud_mlp

from plinth.engine import ModelStore
from plinth_fraud_mlp import SPEC

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("store", type=Path)
    given = parser.parse_args()
    ModelStore(given.store).save(SPEC, fraud_mlp.load(given.weights))
