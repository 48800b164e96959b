"""The examples are scripts, not a package: their folder goes on the path, as a worker puts it there."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
