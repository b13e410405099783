"""The comparison of model versions, on MLflow with sqlite and on a server with passwords."""

import json
from pathlib import Path

import pytest
from evaluations import Store
from html_page import Page

from pipelines import compare

PROMPTS = [f"p{i:02d}" for i in range(20)]


def test_versions_are_compared_and_the_comparison_is_kept(
    mlflow_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    store = Store(tmp_path, PROMPTS, None if mlflow_uri.startswith("sqlite") else mlflow_uri, "compared")
    given = ["compared/1:reward_only", "compared@champion", "compared/2"]
    assert compare.run(given, tmp_path, store.uri, tmp_path / "c.html", tmp_path / "c.json") == 0
    assert "compared/1 is more diverse than compared/1:reward_only on all 9 measures" in capsys.readouterr().out
    document = json.loads((tmp_path / "c.json").read_text())
    (run,) = store.comparisons()
    expected = document["differences"]["log_volume"][2]
    assert run.data.metrics["compare/3/log_volume_difference"] == pytest.approx(expected["interval"]["mean"])
    # What was kept comes back from the store: the page, a table and the figures.
    kept = store.client.download_artifacts(run.info.run_id, "comparison.html", str(tmp_path))
    assert document["findings"][0][0] in Page(Path(kept).read_text(encoding="utf-8")).words
    table = store.client.load_table(store.experiment, "comparison_metrics.json", [run.info.run_id])
    rows = table[(table.metric == "log_volume") & (table.model == "compared/2")]
    assert rows.difference.item() == pytest.approx(expected["interval"]["mean"])
    figure = store.client.download_artifacts(run.info.run_id, "plane.png", str(tmp_path))
    assert Path(figure).read_bytes().startswith(b"\x89PNG")
