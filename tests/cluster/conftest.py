"""A test that fails tells what the cluster says about its release, before the namespace goes."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "chart")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if cluster is not None and report.when == "call" and report.failed:
        report.sections.append(("what the cluster says", cluster.evidence()))
    return report
