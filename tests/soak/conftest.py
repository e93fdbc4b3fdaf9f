"""Lets the soak tests make the same small files as the tests of the sources."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "sources"))
