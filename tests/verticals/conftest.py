"""Helper modules shared by the tests of verticals."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
