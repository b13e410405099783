"""The command `experiment` on tiny random models: expanding, running, resuming, and what is wrong with a file."""

import json
import math
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from pipeline.tiny_runs import ROOT, environment, write_recipe

from dqo.errors import DQOError
from dqo.evaluation.catalogue import METRICS
from dqo.files import write_jsonl
from pipelines.grid import Results, expand, measured, read

PARTS = [
    {"name": "methods", "title": "Methods", "seeds": [0, 1], "against": "reward-only",
     "runs": {"reward-only": {"method.alpha": 0}, "dqo": {}}},
    {"name": "alpha", "title": "Alpha", "grid": {"method.alpha": [0.0, 1.0], "rl.steps": [2]}},
]  # fmt: skip


def write(folder: Path, parts: list[dict], **changes) -> Path:
    path = folder / "grid.yaml"
    document = {"name": "grid", "title": "A grid", "recipes": {"story": "tiny.yaml"}, "parts": parts, **changes}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tmp_path / "no-policy", tmp_path / "no-encoder", rl={"steps": 2})


def test_expansion_sets_fields_seeds_and_finds_equal_recipes(recipe, tmp_path):
    cells = expand(read(write(tmp_path, PARTS)), tmp_path / "grid.yaml")
    assert [(c.part, c.run, c.recipe.method.alpha, c.seed) for c in cells] == [
        ("methods", "reward-only", 0.0, 0), ("methods", "dqo", 1.0, 0),
        ("methods", "reward-only", 0.0, 1), ("methods", "dqo", 1.0, 1),
        ("alpha", "dqo", 0.0, 0), ("alpha", "dqo", 1.0, 0),
    ]  # fmt: skip
    assert [c.recipe.seed for c in cells] == [c.seed for c in cells]
    assert all(c.recipe.variants == ["dqo"] for c in cells)
    assert cells[4].key == cells[0].key and cells[5].key == cells[1].key
    assert len({c.key for c in cells}) == 4
    assert cells[5].title == "story · dqo · alpha 1.0 · steps 2 · seed 0"


@pytest.mark.parametrize(
    ("setting", "same"),
    [({"gate.max_quality_loss": 0.2}, True), ({"registry.name": "other"}, True), ({"method.alpha": 0.3}, False)],
)
def test_a_result_is_found_again_by_what_is_measured(recipe, tmp_path, setting, same):
    parts = [{"name": "p", "title": "P", "runs": {"one": {}, "other": setting}}]
    one, other = expand(read(write(tmp_path, parts)), tmp_path / "grid.yaml")
    assert one.recipe != other.recipe and (one.key == other.key) == same


def test_a_result_of_another_recipe_does_not_count(recipe, tmp_path):
    """A default that has changed leaves the key as it was: what a row's own recipe says is compared."""
    (cell,) = expand(read(write(tmp_path, [{"name": "p", "title": "P"}])), tmp_path / "grid.yaml")
    results = Results(tmp_path / "results", "grid")
    for changes, said in (
        ({}, []),
        ({"rl": {"max_grad_norm": 0.7}}, ["rl.max_grad_norm 0.7, now 1.0"]),
        ({"rl": {"a_field_of_then": 1}, "seed": 5}, ["seed 5, now 0"]),
        ({"policy": {"lora": None}}, [f"policy.lora None, now {measured(cell.recipe)['policy']['lora']}"]),
        ({"judge": {"n": 1}}, ["judge {'n': 1}, now None"]),
    ):
        then = measured(cell.recipe)
        for section, fields in changes.items():
            then[section] = then[section] | fields if isinstance(then[section], dict) else fields
        results.add({"key": cell.key, "recipe": then}, [])
        rows, outdated = results.current([cell])
        assert outdated == ({cell.key: said} if said else {}) and (cell.key in rows) == (not said)
    # What no response can fail is measured alike whatever it would get; a row without a recipe tells nothing.
    assert "unearned" not in measured(cell.recipe)["method"]["defences"]
    results.add({"key": cell.key}, [])
    assert results.current([cell])[1] == {}


def test_the_narrower_setting_wins(recipe, tmp_path):
    """Of all parts, of a part, of a run."""
    runs = {"part's": {}, "own": {"rl.steps": 5}}
    parts = [{"name": "p", "title": "P", "set": {"rl.steps": 4}, "runs": runs}, {"name": "q", "title": "Q"}]
    cells = expand(read(write(tmp_path, parts, set={"rl.steps": 3})), tmp_path / "grid.yaml")
    assert [cell.recipe.rl.steps for cell in cells] == [4, 5, 3]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"set": {"rl.stesp": 4}}, "part 'p', run 'dqo': 'rl.stesp' is no field of a recipe"),
        ({"runs": {"dqo": {"method.alhpa": 1}}}, "part 'p', run 'dqo': 'method.alhpa' is no field of a recipe"),
        ({"runs": {"dqo": {"method.alpha": -1}}}, "method.alpha: got -1"),
        ({"grid": {"method.k": [1]}}, "method.k: got 1"),
        ({"recipes": ["poem"]}, "parts.p.recipes: got 'poem'; expected one of: story"),
        ({"against": "base"}, "parts.p.against: got 'base'; expected one of: dqo"),
        ({"runs": {"sft": {}}}, "parts.p.runs: got 'sft', which the page shows beside every run"),
        ({"seeds": []}, "parts.0.seeds: got []"),
        ({"claim": {"run": "dqo", "higher": ["bleu"]}}, "parts.0.claim.higher.0: got 'bleu'"),
        ({"claim": {"run": "dqo", "not_lower": {"quality": -1}}}, "parts.0.claim.not_lower.quality: got -1"),
        ({"claim": {"run": "dqo", "higher": ["quality"]}}, "parts.p.claim: got a part without `against`"),
        (
            {"claim": {"run": "dqo", "higher": ["quality"]}, "against": "dqo", "grid": {"method.alpha": [1]}},
            "parts.p.claim: got a part with a grid",
        ),
        (
            {"claim": {"run": "a", "higher": ["quality"]}, "against": "a", "runs": {"a": {}, "b": {}}},
            "parts.p.claim.run: got 'a'; expected one of: b",
        ),
        ({"claim": {"run": "b"}, "against": "a", "runs": {"a": {}, "b": {}}}, "parts.p.claim: claims nothing"),
        ({"claim": {"run": "b", "not_lower": {"quality": math.inf}}}, "parts.0.claim.not_lower.quality: got inf"),
        (
            {
                "claim": {"run": "b", "higher": ["quality"], "not_lower": {"quality": 0}},
                "against": "a",
                "runs": {"a": {}, "b": {}},
            },
            "parts.p.claim: got 'quality' in `higher` and in `not_lower`",
        ),
        ({"sedes": [1]}, "parts.0.sedes: got [1]"),
    ],
)
def test_a_wrong_file_names_place_value_and_expectation(recipe, tmp_path, change: dict, expected: str):
    path = write(tmp_path, [{"name": "p", "title": "P"} | change])
    with pytest.raises(DQOError) as caught:
        expand(read(path), path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_a_part_twice_a_missing_recipe_and_no_mapping(recipe, tmp_path):
    part = {"name": "p", "title": "P"}
    with pytest.raises(DQOError, match="got 'p' twice"):
        expand(read(write(tmp_path, [part, part])), tmp_path / "grid.yaml")
    with pytest.raises(DQOError, match=r"none\.yaml: no such recipe file"):
        expand(read(write(tmp_path, [part], recipes={"story": "none.yaml"})), tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text("- a")
    with pytest.raises(DQOError, match=r"expected a mapping .* got list"):
        read(tmp_path / "grid.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_experiments_expand(path: Path):
    assert len(expand(read(path), path)) > 1


def test_kept_results_are_those_of_the_shipped_experiment():
    """A change of a recipe or of a default that orphans results has to say so: hours of training hang on their keys."""
    path = ROOT / "recipes" / "experiments" / "smollm2.yaml"
    rows = Results(ROOT / "docs" / "results-data", "smollm2").rows()
    cells = {cell.key: cell for cell in expand(read(path), path)}
    assert rows and rows.keys() <= cells.keys()
    for key, row in rows.items():
        recipe = cells[key].recipe
        assert (row["seed"], row["task"], row["n"]) == (recipe.seed, recipe.task, recipe.evaluation.n)
        assert (row["method"]["alpha"], row["method"]["k"]) == (recipe.method.alpha, recipe.method.k)
        assert len(row["history"]) == recipe.rl.steps
        if recipe.method.defences.conditional and recipe.method.alpha > 0:
            trained = row["method"]["defences"]
            assert {name: trained[name] for name in ("min_quality", "unearned")} == {
                "min_quality": recipe.method.defences.min_quality, "unearned": recipe.method.defences.unearned,
            }  # fmt: skip


def test_responses_are_kept_as_they_are_whatever_was_sampled(tmp_path):
    responses = [{"model": "dqo", "text": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"}, {"model": "dqo", "text": ""}]
    results = Results(tmp_path, "grid")
    results.add({"key": "a"}, responses)
    assert results.responses("a") == responses


def test_a_damaged_results_file_is_named(tmp_path):
    (tmp_path / "grid.jsonl").write_text('{"no": "key"}\n')
    with pytest.raises(DQOError, match=r"grid.jsonl: not a results file"):
        Results(tmp_path, "grid").rows()


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "experiment", *map(str, arguments)],
        capture_output=True, text=True, timeout=400, env=environment(), cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_grid_runs_once_continues_and_names_what_failed(tiny_policy, tiny_encoder, tmp_path):
    write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, rl={"steps": 2})
    path = write(
        tmp_path, [PARTS[1], {"name": "broken", "title": "Broken", "runs": {"none": {"rl.prompts_per_step": 999}}}]
    )
    out, results = tmp_path / "runs", Results(tmp_path / "results", "grid")
    planned = command(path, "--out", out, "--plan")
    assert planned.stdout.count("to do ") == 3 and not out.exists()

    done = command(path, "--out", out, "--results", results.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 runs failed" in done.stdout and "999" in done.stdout and "Traceback" not in done.stdout + done.stderr
    rows = list(results.rows().values())
    assert [row["method"]["alpha"] for row in rows] == [0.0, 1.0]
    for row in rows:
        assert row["prompts"] == 6 and row["n"] == 4 and len(row["history"]) == 2
        assert {"base", "sft", "dqo"} == set(row["models"])
        assert set(row["models"]["dqo"]) == set(METRICS)
        responses = [one for one in results.responses(row["key"]) if one["model"] == "dqo"]
        means = [sum(one["qualities"]) / 4 for one in responses]
        assert row["models"]["dqo"]["quality"] == pytest.approx(means, abs=1e-5)
    assert rows[0]["models"]["sft"] == rows[1]["models"]["sft"]  # one SFT checkpoint for both

    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dqo"]
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [run for run in found if run.data.tags.get("dqo.stage") == "experiment"]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} >= {
        f"story · dqo · alpha {a} · steps 2 · seed 0" for a in (0.0, 1.0)
    }
    assert sorted(row["mlflow_run"] for row in rows) == sorted(
        run.info.run_id for run in children if run.info.status == "FINISHED"
    )

    assert parent.info.status == "FAILED"  # with one of its runs
    for row in rows:
        assert row["recipe"]["rl"]["steps"] == 2 and row["stopped"] is None
    before = results.path.read_bytes()
    again = command(path, "--out", out, "--results", results.folder, "--part", "alpha")
    assert again.returncode == 0 and "0 to do" in again.stdout
    assert results.path.read_bytes() == before
    # A row that says that its run was made otherwise is run again.
    other = [row | {"recipe": row["recipe"] | {"seed": 9}} for row in rows[:1]] + rows[1:]
    write_jsonl(results.path, other)
    renewed = command(path, "--out", out, "--results", results.folder, "--part", "alpha")
    assert renewed.returncode == 0 and "1 to do" in renewed.stdout
    assert "has a result of another recipe, which does not count: seed 9, now 0" in renewed.stdout
    rows_now = results.rows()
    assert [rows_now[row["key"]]["recipe"]["seed"] for row in rows] == [0, 0]
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    assert json.loads(before.splitlines()[0])["label"] == "story"
