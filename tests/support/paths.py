"""Where things lie in this checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GOLDENS = TESTS / "data" / "goldens"
NETWORKS = TESTS / "data" / "networks"
SAMPLE = ROOT / "samples" / "tiny-stdlib"
