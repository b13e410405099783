"""Pipelines that stop halfway and go on: out of disk, interrupted, killed, or with unusable data."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from small_disk import mount_small, resize, unmount
from tiny import write_policy

from dqo.recipe import load

STEPS = 60


@dataclass(frozen=True)
class Try:
    """One call of `dqo run`, the same each time."""

    status: int
    printed: str
    happened: list[dict]
    """What the stages reported meanwhile."""
    ended: dict[str, str]
    """How the runs in MLflow stood afterwards, by their names."""


@dataclass(frozen=True)
class Interrupted:
    """A run that was called four times until it was through."""

    recipe: Path
    out: Path
    disk_full: Try | None
    """At the first checkpoint; `None` where no small file system may be mounted."""
    no_mount: str
    """Why none may be; empty where one is."""
    ctrl_c: Try
    """In the reward-only stage, behind a checkpoint."""
    killed: Try
    """In the DQO stage, behind a checkpoint."""
    through: Try


def try_until(recipe: Path, out: Path, stage: str | None = None, how: int = 0) -> Try:
    """Call `dqo run`, and send it a signal as soon as a stage has written a checkpoint."""
    before = len(events(out)) if list(out.glob("workspace/progress/*")) else 0
    process = subprocess.Popen(
        command("run", recipe, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        if stage is not None:
            deadline = time.time() + 300
            while time.time() < deadline and process.poll() is None:
                if list(out.glob(f"workspace/stages/{stage}-*/checkpoints/*/complete")):
                    break
                time.sleep(0.1)
            assert process.poll() is None, process.communicate()[0]
            process.send_signal(how)
        printed, _ = process.communicate(timeout=450)
    finally:
        process.kill()
    # The stage of a killed command line ends by itself, a moment later.
    return Try(process.returncode, printed, events(out)[before:], {n: r.info.status for n, r in runs_of(out).items()})


@pytest.fixture(scope="module")
def interrupted(tiny_encoder, tmp_path_factory) -> Iterator[Interrupted]:
    """Full fine-tuning, whose checkpoints of 9 MB fill a file system of 6 MiB; a real one, in memory."""
    folder = tmp_path_factory.mktemp("interrupted")
    mount = folder / "disk"
    mount.mkdir()
    policy = write_policy(folder / "policy", width=192)
    recipe = write_recipe(
        folder / "tiny.yaml", policy, tiny_encoder, policy={"lora": None}, rl={"steps": STEPS, "save_every": 10}
    )
    out, disk_full = mount / "runs", None
    no_mount = mount_small(mount, "6m")
    try:
        if not no_mount:
            disk_full = try_until(recipe, out)
            resize(mount, "512m")
        ctrl_c = try_until(recipe, out, "rl-reward_only", signal.SIGINT)
        # A half-written checkpoint must not be taken.
        (stage,) = out.glob("workspace/stages/rl-reward_only-*")
        (stage / "checkpoints" / f"checkpoint-{STEPS - 1}").mkdir()
        killed = try_until(recipe, out, "rl-dqo", signal.SIGKILL)
        yield Interrupted(recipe, out, disk_full, no_mount, ctrl_c, killed, try_until(recipe, out))
    finally:
        if not no_mount:
            # This process has MLflow's store on it open.
            unmount(mount)


@pytest.mark.slow
def test_full_disk_at_a_checkpoint(interrupted):
    """The run stops with a clear message that says how to continue."""
    if interrupted.no_mount:
        pytest.skip(interrupted.no_mount)
    assert interrupted.disk_full is not None
    status, printed = interrupted.disk_full.status, interrupted.disk_full.printed
    assert status == 2, printed
    assert "disk is full" in printed and "Traceback" not in printed
    assert "while writing a checkpoint or result" in printed
    assert f"dqo run {interrupted.recipe}" in printed
    assert started(interrupted.disk_full.happened) == ["prepare", "sft"]
    assert started(interrupted.ctrl_c.happened) == ["sft", "rl-reward_only"]


@pytest.mark.slow
def test_ctrl_c_stops_the_stage_and_says_how_to_continue(interrupted):
    stop = interrupted.ctrl_c
    assert stop.status == 130, stop.printed
    assert f"dqo run {interrupted.recipe} --out {interrupted.out}" in stop.printed and "Traceback" not in stop.printed
    stops = [(event["stage"], event["message"]) for event in stop.happened if event["event"] == "error"]
    assert stops == [("rl-reward_only", "interrupted")]
    expected = {"prepare": "FINISHED", "sft": "FINISHED", "rl-reward_only": "KILLED", "tiny": "KILLED"}
    assert stop.ended == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rl-reward_only", "rl-dqo"], ids=["ctrl-c", "kill"])
def test_the_same_command_starts_at_the_checkpoint(interrupted, stage):
    """It repeats no finished stage, and training shows no gap."""
    then, rest = {
        "rl-reward_only": (interrupted.killed, ["rl-reward_only", "rl-dqo"]),
        "rl-dqo": (interrupted.through, ["rl-dqo", "evaluate", "register"]),
    }[stage]
    assert interrupted.killed.status == -signal.SIGKILL
    assert interrupted.through.status == 0, interrupted.through.printed
    assert started(then.happened) == rest
    reported = [event for event in then.happened if event["stage"] == stage]
    first = next(event for event in reported if "total" in event and event["step"] > 0)
    assert 10 <= first["step"] < STEPS
    assert any("continuing from checkpoint-" in event.get("message", "") for event in reported)
    (history,) = interrupted.out.glob(f"workspace/stages/{stage}-*/output/history.jsonl")
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_full_fine_tuning_registers_a_model_that_generates(interrupted):
    assert interrupted.through.status == 0, interrupted.through.printed
    assert runs_of(interrupted.out)["rl-dqo"].data.params["policy.lora"] == "full fine-tuning"
    (group,) = registered_model(interrupted.out).predict(
        pandas.DataFrame({"prompt": ["Write about a boat."]}), params={"n": 3, "max_new_tokens": 5, "seed": 1}
    )
    assert len(group) == 3 and all(isinstance(response, str) for response in group)


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
