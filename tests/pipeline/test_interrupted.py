"""Pipelines that stop halfway and go on: killed, interrupted, out of disk, with unusable data or repeated in part."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas
import pytest
from pipeline.tiny_runs import (
    command,
    environment,
    events,
    registered_model,
    run,
    runs_of,
    started,
    write_recipe,
)

from dqo.recipe import load


@pytest.mark.slow
def test_a_registration_that_is_repeated_alone_ends_with_the_table(tiny_policy, tiny_encoder, tmp_path):
    """As after a failed registration: Kubeflow's cache holds every task but that one, whose run evaluates nothing."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, rl={"steps": 1})
    out = tmp_path / "runs"
    first = run(recipe, out)
    assert first.returncode == 0, first.stdout + first.stderr
    before = len(events(out))
    (folder,) = out.glob("tiny-*")
    (entry,) = [path for path in folder.glob("cache/*.json") if "registration" in json.loads(path.read_text())]
    entry.unlink()
    (stage,) = out.glob("workspace/stages/register-*")
    shutil.rmtree(stage)
    done = run(recipe, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert started(events(out)[before:]) == ["register"]
    assert [path.name for path in max(folder.glob("artifacts/*")).iterdir()] == ["register"]
    begin = "Means over the evaluation prompts"
    table, expected = (text[text.index(begin) : text.index("Report:")] for text in (done.stdout, first.stdout))
    assert table == expected and "registered tiny-stories version 1 as challenger" in table


@pytest.mark.slow
def test_full_fine_tuning_registers_a_model_that_generates(tiny_policy, tiny_encoder, tmp_path):
    out = tmp_path / "runs"
    done = run(write_recipe(tmp_path / "full.yaml", tiny_policy, tiny_encoder, policy={"lora": None}), out)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert runs_of(out)["rl-dqo"].data.params["policy.lora"] == "full fine-tuning"
    (group,) = registered_model(out).predict(
        pandas.DataFrame({"prompt": ["Write about a boat."]}), params={"n": 3, "max_new_tokens": 5, "seed": 1}
    )
    assert len(group) == 3 and all(isinstance(response, str) for response in group)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_killed_during_rl_it_continues(tiny_policy, tiny_encoder, tmp_path, how):
    """Killed behind a checkpoint, the same command repeats no finished stage and starts at the checkpoint."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, rl={"steps": 120, "save_every": 10})
    out = tmp_path / "runs"
    process = subprocess.Popen(
        command("run", recipe, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip
    deadline = time.time() + 300
    while time.time() < deadline:
        time.sleep(0.2)
        marks = list(out.glob("workspace/stages/rl-reward_only-*/checkpoints/*/complete"))
        if marks or process.poll() is not None:
            break
    assert process.poll() is None, process.stdout.read()
    process.send_signal(how)
    printed, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"dqo run {recipe} --out {out}" in printed and "Traceback" not in printed
        stops = [(e["stage"], e["message"]) for e in events(out) if e["event"] == "error"]
        assert stops == [("rl-reward_only", "interrupted")]
        ended = {name: run.info.status for name, run in runs_of(out).items()}
        assert ended == {"prepare": "FINISHED", "sft": "FINISHED", "rl-reward_only": "KILLED", "tiny": "KILLED"}
    before = len(events(out))
    (path,) = (out / "workspace" / "stages").glob("rl-reward_only-*")
    # The runner ends by itself when the command line is gone; a half-written checkpoint must not be taken.
    (path / "checkpoints" / "checkpoint-119").mkdir()
    done = subprocess.run(
        command("run", recipe, "--out", out), capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = events(out)[before:]
    assert started(again) == ["rl-reward_only", "rl-dqo", "evaluate", "register"]
    first = next(e for e in again if e["stage"] == "rl-reward_only" and "total" in e and e["step"] > 0)
    assert 10 <= first["step"] < 120
    assert any("continuing from checkpoint-" in e.get("message", "") for e in again)
    history = next(out.glob("workspace/stages/rl-reward_only-*/output/history.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 121))


@pytest.fixture
def bad_rows(tiny_policy, tiny_encoder, tmp_path) -> Path:
    """A recipe whose data cannot be used."""
    rows = ['{"concepts": ["dog"], "references": ["A dog ran."]}', "{broken", '{"concepts": [], "references": ["x"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return write_recipe(tmp_path / "bad.yaml", tiny_policy, tiny_encoder, data={"source": str(tmp_path / "rows.jsonl")})


def test_a_bad_row_share_stops_with_the_reason(bad_rows, tmp_path):
    done = run(bad_rows, tmp_path / "runs")
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert str(bad_rows) in done.stderr  # how to continue


@pytest.mark.slow
def test_a_fresh_run_shows_its_stages_and_reason_too(bad_rows, tmp_path):
    """What an earlier run of the recipe reported is deleted while the new one is already being followed."""
    old = tmp_path / "runs" / "workspace" / "progress" / f"tiny-{load(bad_rows).digest}.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"time": 1.0, "stage": "sft", "event": "step", "step": 1, "total": 2}) + "\n")
    old.write_text(old.read_text() * 100)
    done = run(bad_rows, tmp_path / "runs", "--fresh")
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == ["Prepare data", "  Prepare data: failed"]
    assert "rows.jsonl" in done.stderr.splitlines()[0] and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_at_a_checkpoint(tiny_policy, tiny_encoder, tmp_path):
    """A real file system of 6 MiB: the run stops with a clear message that says how to continue, and that works."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        recipe = write_recipe(
            tmp_path / "full.yaml", tiny_policy, tiny_encoder, policy={"lora": {"r": 512, "alpha": 8}}
        )
        done = run(recipe, mount / "runs")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "while writing a checkpoint or result" in done.stderr
        assert f"dqo run {recipe}" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        done = run(recipe, mount / "runs")
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(["umount", mount], check=True)
