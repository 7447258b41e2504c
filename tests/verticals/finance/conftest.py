"""Helper modules shared by the tests of fraud scoring, and payments long enough to score."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "benchmarks")]
