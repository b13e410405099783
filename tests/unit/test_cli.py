"""The command line from outside: exit status, what goes to which stream, and no traceback for a user's mistake."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from dqo import tracking
from dqo.recipe import load, parse

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def dqo(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    # A test that has read a store in this process has named it there for every process that comes after.
    stores = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    inherited = {name: value for name, value in os.environ.items() if name not in stores}
    environment = inherited | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a refusal: status 2, on stderr, starting with the program's name, no traceback anywhere."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith(("dqo: ", "usage: dqo"))
    return done.stderr


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"name: a\n{text}\n", encoding="utf-8")
    return path


# --- help ---


def test_help_lists_the_commands_and_version_is_the_packages():
    done = dqo("--help")
    assert (done.returncode, done.stderr) == (0, "")
    known = ("run", "compile", "recipe", "experiment", "calibrate", "judge", "ui", "doctor")
    assert all(re.search(rf"^    {command}\s", done.stdout, re.MULTILINE) for command in known)
    done = dqo("--version")
    assert (done.returncode, done.stderr) == (0, "")
    import dqo as library

    assert done.stdout == f"{library.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["compile", "r.yaml"], ["ui", "--port", "x"]])
def test_wrong_usage_shows_the_usage(arguments: list[str]):
    assert refused(dqo(*arguments)).startswith("usage: dqo")


# --- recipe ---


def test_recipe_check_says_what_a_valid_recipe_is():
    done = dqo("recipe", "check", QUICKSTART)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{QUICKSTART}: valid")
    assert load(QUICKSTART).digest in done.stdout


def test_recipe_check_asks_the_task_too(tmp_path: Path):
    embeds = recipe_file(tmp_path, "method: {defences: {embed: answer}}")
    said = refused(dqo("recipe", "check", embeds))
    assert said.startswith("dqo: method.defences.embed: got 'answer', but task 'story' does not say where")
    fits = recipe_file(tmp_path, "task: reasoning\nmethod: {defences: {embed: answer}}")
    assert dqo("recipe", "check", fits).returncode == 0
    embeds = recipe_file(tmp_path, "method: {defences: {embed: answer}}")
    for command in (["run"], ["calibrate"]):
        assert refused(dqo(*command, embeds, cwd=tmp_path)) == said
    done = dqo("recipe", "check", recipe_file(tmp_path, "task: not_there:TASK"))
    assert done.returncode == 0
    assert done.stderr.startswith("dqo: warning: on this machine, task: got 'not_there:TASK'")
    no_rule = recipe_file(tmp_path, "task: instruction\nreward: {kind: rule}")
    assert "reward.kind: got 'rule', but task 'instruction' has none" in refused(dqo("recipe", "check", no_rule))


def test_recipe_check_warns_on_stderr_and_still_succeeds(tmp_path: Path):
    done = dqo("recipe", "check", recipe_file(tmp_path, "method: {k: 2, advantage: centred}"))
    assert done.returncode == 0
    assert done.stderr.startswith("dqo: warning: method: with k = 2")
    assert "valid" in done.stdout


@pytest.mark.parametrize(
    "command", [["recipe", "check"], ["recipe", "show"], ["run"], ["compile", "-o", "x.yaml"], ["calibrate"]]
)
def test_every_command_refuses_a_broken_recipe_with_all_its_errors(command: list[str], tmp_path: Path):
    path = recipe_file(tmp_path, "method: {k: 1}\nsedd: 3")
    done = dqo(*command, path, cwd=tmp_path)
    message = refused(done)
    assert message.startswith(f"dqo: {path}: 2 errors")
    assert "method.k: got 1" in message and "sedd: unknown key (value 3)" in message
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "command", [["recipe", "check"], ["recipe", "show"], ["run"], ["compile", "-o", "x.yaml"], ["calibrate"]]
)
def test_every_command_refuses_a_recipe_that_is_not_there(command: list[str], tmp_path: Path):
    assert refused(dqo(*command, "none.yaml", cwd=tmp_path)) == "dqo: none.yaml: no such recipe file\n"
    assert list(tmp_path.iterdir()) == []


def test_recipe_show_prints_a_recipe_that_means_the_same():
    done = dqo("recipe", "show", QUICKSTART)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout) == load(QUICKSTART)
    assert yaml.safe_load(done.stdout)["method"]["kernel_scale"] == 1.0  # not in the file: a default


def test_recipe_schema_is_json():
    done = dqo("recipe", "schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False


# --- compile ---


@pytest.mark.slow
def test_compile_twice_gives_equal_bytes_and_leaves_nothing_else(tmp_path: Path):
    for name in ("one.yaml", "two.yaml"):
        done = dqo("compile", QUICKSTART, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert load(QUICKSTART).digest in done.stdout
    one, two = ((tmp_path / name).read_bytes() for name in ("one.yaml", "two.yaml"))
    assert one == two
    pipeline, _platform = yaml.safe_load_all(one)
    assert pipeline["pipelineInfo"]["name"] == "quickstart"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.yaml", "two.yaml"]


def test_compile_refuses_an_output_that_cannot_be(tmp_path: Path):
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    for output, expected in (
        (tmp_path / "p.txt", "expected a name that ends in .yaml"),
        (tmp_path / "no" / "p.yaml", f"the folder {tmp_path / 'no'} does not exist"),
        (folder, "is a folder; expected the name of a file"),
    ):
        assert refused(dqo("compile", QUICKSTART, "-o", output)) == f"dqo: --output {output}: {expected}\n"
    assert list(tmp_path.iterdir()) == [folder]


# --- calibrate ---


def test_calibrate_refuses_a_file_that_cannot_be_written_before_it_samples(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for options, expected in (
        (["--json", tmp_path], f"{tmp_path}: is a folder; expected the name of a file"),
        (["--out", tmp_path / "file"], f"{tmp_path / 'file'} is not a folder that can be written to"),
    ):
        assert expected in refused(dqo("calibrate", QUICKSTART, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_calibrate_says_what_makes_a_recipe_pointless(tmp_path: Path, tiny_policy: Path, tiny_encoder: Path):
    """A random policy earns 0 for everything: status 1, the tables all the same, the files written."""
    path = recipe_file(
        tmp_path,
        f"policy: {{model: {tiny_policy}}}\nencoder: {{model: {tiny_encoder}}}\nmethod: {{k: 4}}\n"
        "rl: {sampling: {max_new_tokens: 12}}",
    )
    done = dqo("calibrate", path, "--prompts", 5, "--json", "c.json", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "Loading weights" not in done.stderr
    assert all(line.startswith("dqo: problem: ") for line in done.stderr.splitlines())
    assert "every group's rewards are equal" in done.stderr
    for part in (
        "5 training prompts, 4 responses each",
        "bonus, log_volume (the recipe's)",
        "Ties: 100%",
        "Seconds of",
    ):
        assert part in done.stdout
    document = json.loads((tmp_path / "c.json").read_text())
    assert document == json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert document["scores"][0]["balanced_alpha"] is None and document["tied_groups"] == 1.0
    rows = [json.loads(row) for row in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [4] * 5
    assert not (tmp_path / "runs").exists()
    assert "prompts: got 0" in refused(dqo("calibrate", path, "--prompts", 0, cwd=tmp_path))


@pytest.mark.slow
def test_calibrate_the_quickstart(tmp_path: Path):
    """Its quality floor is above what the base model reaches: the alpha is that of a bonus that all would earn."""
    done = dqo("calibrate", QUICKSTART, "--prompts", 4, "--json", tmp_path / "c.json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads((tmp_path / "c.json").read_text())
    ungated = document["ungated"]
    assert 0.05 < document["quality"]["std"] < 0.6 and 0.01 < ungated["bonus"]["std"] < 0.3
    assert document["no_bonus"] > 0.9 and "if every response earned it" in done.stdout
    assert document["encoder"]["auc_unrelated"]["low"] > 0.9
    assert f"alpha = {ungated['balanced_alpha']:.2g} would give it 25%" in done.stdout


# --- run: what is wrong with the surroundings is said before anything is trained ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "policy: {model: /nowhere/model}",
            ["'/nowhere/model'", "no such directory", "expected a directory", "bundled:"],
        ),
        ("policy: {model: 'bundled:gpt'}", ["'bundled:gpt'", "bundled:smollm2-135m-instruct"]),
        ("encoder: {model: ./nowhere}", ["'./nowhere'", "no such directory", "expected a directory"]),
        ("data: {source: nowhere.jsonl}", ["data.source", "'nowhere.jsonl'", "no such file", "expected 'bundled'"]),
        ("tracking: {uri: 'ftp://host'}", ["tracking.uri", "'ftp://host'", "expected http(s)://"]),
    ],
)
def test_run_refuses_what_it_cannot_use_and_starts_nothing(recipe: str, said: list[str], tmp_path: Path):
    message = refused(dqo("run", recipe_file(tmp_path, recipe), cwd=tmp_path))
    assert [part for part in said if part not in message] == []
    assert list(tmp_path.rglob("pipeline.yaml")) + list(tmp_path.rglob("mlflow.db")) == []


@pytest.mark.slow
def test_run_without_an_answer_from_mlflow_says_that_nothing_was_trained(
    tmp_path: Path, tiny_policy: Path, tiny_encoder: Path
):
    path = recipe_file(tmp_path, f"policy: {{model: {tiny_policy}}}\nencoder: {{model: {tiny_encoder}}}")
    message = refused(dqo("run", path, cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9"))
    assert "'http://127.0.0.1:9'" in message and "MLFLOW_TRACKING_URI" in message
    assert "Nothing was trained." in message
    assert list(tmp_path.rglob("pipeline.yaml")) == []


def test_run_refuses_an_output_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    message = refused(dqo("run", QUICKSTART, cwd=tmp_path))
    assert message == "dqo: --out runs: cannot be created (File exists)\n"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_fresh_deletes_nothing_while_another_run_is_working(tmp_path: Path, tiny_policy: Path, tiny_encoder: Path):
    path = recipe_file(tmp_path, f"policy: {{model: {tiny_policy}}}\nencoder: {{model: {tiny_encoder}}}")
    out = tmp_path / "runs"
    stage, finished, report = (
        out / "workspace" / "stages" / "x",
        out / "workspace" / "stages" / "w",
        out / f"a-{load(path).digest[:8]}",
    )
    for folder in (stage, finished, report):
        folder.mkdir(parents=True)
        (folder / "kept").write_text(folder.name)
    with FileLock(stage / ".lock"):
        before = files(out)
        message = refused(dqo("run", path, "--out", out, "--fresh"))
        assert message.startswith(f"dqo: --fresh: another run is working in {stage};")
        assert {path: text for path, text in files(out).items() if path in before} == before
    assert list(out.rglob("pipeline.yaml")) + list(out.rglob("run.log")) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_run_refuses_vllm_where_it_is_not_installed(tmp_path: Path, tiny_policy: Path, tiny_encoder: Path):
    models = f"policy: {{model: {tiny_policy}}}\nencoder: {{model: {tiny_encoder}}}"
    path = recipe_file(tmp_path, f"{models}\nrl: {{rollout: {{engine: vllm}}}}")
    message = refused(dqo("run", path, cwd=tmp_path))
    assert message.startswith("dqo: rl.rollout.engine: got 'vllm', which is not installed here;")
    assert "dqo-pipelines[gpu]" in message and "'transformers'" in message
    assert list(tmp_path.rglob("pipeline.yaml")) + list(tmp_path.rglob("run.log")) == []


# --- ui, doctor ---


def test_ui_without_a_store_says_where_it_looked(tmp_path: Path):
    message = refused(dqo("ui", "--out", tmp_path / "runs"))
    assert str(tmp_path / "runs" / "mlflow.db") in message and "--out" in message


@pytest.fixture
def pipeline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begins and ends a pipeline run in the store of `runs`; returns the path that MLflow's page has for it."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)

    def ended(name: str) -> str:
        recipe, out = parse(f"name: {name}"), tmp_path / "runs"
        experiment = tracking.connect(recipe, tracking.default_uri(out))
        run = tracking.open_parent(recipe, experiment, out / "workspace")
        tracking.Run(run).finish()
        return f"#/experiments/{experiment}/runs/{run}"

    return ended


@contextmanager
def served(out: Path) -> Iterator[tuple[int, str]]:
    """`dqo ui` on a free port, and the first line that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "ui", "--out", str(out), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield port, process.stdout.readline()
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def status(address: str) -> int:
    """The answer to a request without a proxy; 0 where nobody listens yet."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_ui_serves_the_page_that_its_link_names(tmp_path: Path, pipeline_run):
    place = pipeline_run("a")
    with served(tmp_path / "runs") as (port, line):
        assert line == f"MLflow: http://127.0.0.1:{port}/{place}  (Ctrl-C ends it)\n"
        deadline = time.monotonic() + 300
        while status(line.split()[1]) != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        run_id = place.rpartition("/")[2]
        assert status(f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}") == 200


@pytest.mark.slow
def test_ui_names_the_run_that_ended_last(tmp_path: Path, pipeline_run):
    """A run that is continued keeps its start, so the older one may be the one that was just looked at."""
    older = pipeline_run("a")
    assert pipeline_run("b") != older
    assert pipeline_run("a") == older
    with served(tmp_path / "runs") as (_, line):
        assert line.split()[1].endswith(f"/{older}")


@pytest.mark.slow
def test_doctor_names_every_part_and_its_status_follows_its_advice(tmp_path: Path):
    done = dqo("doctor", "--out", tmp_path / "runs")
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    subjects = ("processor cores", "memory", "disk", "torch", "transformers", "trl", "mlflow", "kfp", "bundled models")
    for subject in subjects:
        assert [line for line in lines if line[2:].startswith(subject)], subject
    import torch

    assert any("torch" in line and torch.__version__ in line for line in lines)
    runs_here = lines[-1].startswith("The quickstart can run here")
    assert done.returncode == (0 if runs_here else 1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_doctor_fails_when_mlflow_does_not_answer(tmp_path: Path):
    done = dqo("doctor", "--out", tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "http://127.0.0.1:9 does not answer" in done.stdout
    assert "cannot run here yet" in done.stdout.splitlines()[-1]
