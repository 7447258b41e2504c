"""Helper modules shared by the tests of fraud scoring, and payments long enough to score."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
