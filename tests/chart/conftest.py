"""Skip, saying why, where Helm can't be had."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helm import MAJORS, ToolMissing, helm


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    try:
        for major in MAJORS:
            helm(major)
    except ToolMissing as reason:
        pytest.skip(f"Helm: {reason}")
