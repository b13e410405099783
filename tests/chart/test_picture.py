"""The picture of the cluster in docs/operations.md is the chart's."""

import picture
from helm import render


def test_the_picture_is_todays():
    old = picture.PAGE.read_text(encoding="utf-8")
    assert picture.page(old, render(picture.SCENARIO).objects) == old, "run tests/chart/update_golden.py"


def test_the_picture_shows_what_runs_and_who_may_talk_to_whom():
    """By hand, from full-values.yaml and templates/networkpolicies.yaml."""
    lines = [line.strip() for line in picture.text(render("full").objects).splitlines()]
    arrows = {line for line in lines if "-->" in line}
    assert {line for line in arrows if line.endswith("> postgresql")} == {"mlflow -- 5432 --> postgresql"}
    assert {line for line in arrows if line.endswith("> seaweedfs")} == {"mlflow -- 8333 --> seaweedfs"}
    assert {line for line in arrows if line.startswith("register")} == {"register -- 8888 --> kubeflow"}
    assert "tasks -- 5000 --> mlflow" in arrows and "training -- 8000 --> judge" in arrows
    assert not any("53" in line.split("--")[1] for line in arrows)
    assert 'mlflow["Deployment dqo-mlflow x 2"]' in lines
    assert 'training["pods of training jobs<br>TrainingRuntime dqo-torch"]' in lines
    assert "training --- dqo_workspace" in lines and "judge --- dqo_model_cache" in lines


def test_a_part_that_is_off_is_not_drawn():
    text = picture.text(render("minimal").objects)
    assert "mlflow" in text and not any(name in text for name in ("postgresql", "seaweedfs", "judge", "register"))
