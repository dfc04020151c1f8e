"""Where tests find things: the repository, its tests, and the material beside it that may be absent."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"
