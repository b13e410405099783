"""A stage on two nodes: two of torchrun's agents on this machine, with the variables that Kubeflow Trainer sets."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_stages_in_processes import STEPS, events, history, prepared, run_of

from components import trainjob
from dqo.errors import DQOError
from dqo.recipe import parse
from dqo.stages import sft
from dqo.stages.context import Context, NodesJob

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(job: NodesJob) -> list[subprocess.Popen[bytes]]:
    """The pods of the job: command, arguments and variables of its manifest, one agent a node."""
    trainer = trainjob.manifest(job)["spec"]["trainer"]
    command = [str(Path(sys.executable).with_name(trainer["command"][0])), *trainer["command"][1:], *trainer["args"]]
    port = free_port()
    pods = []
    for node in range(trainer["numNodes"]):
        variables = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        variables |= {one["name"]: one["value"] for one in trainer["env"]} | {"OMP_NUM_THREADS": "1"}
        pods.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables))
    return pods


def wait(pods: list[subprocess.Popen[bytes]]) -> None:
    """As a job of Kubernetes: a pod that fails ends the others."""
    while any(pod.poll() is None for pod in pods):
        if any(pod.poll() for pod in pods):
            end(pods)
        time.sleep(0.1)
    if any(pod.returncode for pod in pods):
        raise DQOError(f"training job failed: exit codes {[pod.returncode for pod in pods]}")


def end(pods: list[subprocess.Popen[bytes]]) -> None:
    for pod in pods:
        pod.send_signal(signal.SIGTERM)
    for pod in pods:
        pod.wait(60)


def wide(context: Context, launcher) -> Context:
    """The same run on two nodes with a process each."""
    values = context.recipe.model_dump()
    values["distributed"] |= {"nodes": 2, "processes": 1}
    values["resources"] |= {"workspace_claim": "checkpoints"}
    recipe = parse(context.recipe.model_validate(values).to_json())
    return replace(context, recipe=recipe, launcher=launcher)


@pytest.fixture
def anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(trainjob, "_WORKSPACE", str(tmp_path))


def test_two_preempted_nodes_train_what_one_process_trains(anywhere, tiny_policy, tiny_encoder, tmp_path):
    """SFT without rollouts draws nothing, so that losses and weights are those of one process to rounding."""
    alone = prepared(tmp_path / "one", tiny_policy, tiny_encoder, 1)
    jobs = []

    def launcher(job: NodesJob) -> None:
        jobs.append(job)
        # The task's own disk is out of the nodes' reach.
        (tmp_path / "one/data").rename(tmp_path / "elsewhere")
        pods = start(job)
        while not any(event.get("step", 0) >= 2 for event in events(context, "sft")):
            assert all(pod.poll() is None for pod in pods)
            time.sleep(0.02)
        workers = [child for pod in pods for child in psutil.Process(pod.pid).children()]
        assert len(workers) == 2
        end(pods)  # Kueue takes the nodes away, and gives them back
        psutil.wait_procs(workers, 10)
        assert not any(worker.is_running() for worker in workers)
        wait(start(job))
        (tmp_path / "elsewhere").rename(tmp_path / "one/data")

    context = wide(alone, launcher)
    sft.run(context, tmp_path / "one/data", tmp_path / "sft-two")
    (job,) = jobs
    assert job.output.name == "history.jsonl" and job.name == "sft"
    (resumed,) = [e for e in events(context, "sft") if "continuing from checkpoint-" in e.get("message", "")]
    assert 1 <= resumed["step"] < STEPS
    assert not list(context.workspace.glob("stages/*/processes")) + list(context.workspace.glob("stages/*/checkpoints"))
    params = run_of(context, "sft").data.params
    assert params["distributed.processes"] == "2"

    shutil.rmtree(context.workspace / "progress")
    other = prepared(tmp_path / "alone", tiny_policy, tiny_encoder, 1)
    sft.run(other, tmp_path / "alone/data", tmp_path / "sft-one")
    one, two = history(tmp_path / "sft-one"), history(tmp_path / "sft-two")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for single, both in zip(one, two, strict=True):
        for name in ("loss", "demonstration_nll", "grad_norm", "learning_rate"):
            assert both[name] == pytest.approx(single[name], rel=1e-4)
    single, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft-one", "sft-two"))
    assert single.keys() == both.keys()
    assert max(value.abs().max() for name, value in single.items() if "lora_B" in name) > 5e-4
    for name, value in single.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=2e-5)


def test_a_node_without_the_workspace_says_so(anywhere, tiny_policy, tiny_encoder, tmp_path):
    def launcher(job: NodesJob) -> None:
        path = Path(job.arguments[0])
        path.rename(path.with_name("hidden.json"))
        wait(start(job))

    context = wide(prepared(tmp_path / "one", tiny_policy, tiny_encoder, 1), launcher)
    with pytest.raises(DQOError, match=r"job.json: no such job; .*resources.workspace_claim.*\(process [01] of 2\)"):
        sft.run(context, tmp_path / "one/data", tmp_path / "sft")
    assert run_of(context, "sft").info.status == "FAILED"


def test_without_a_cluster_several_nodes_are_refused(anywhere, tiny_policy, tiny_encoder, tmp_path):
    context = wide(prepared(tmp_path / "one", tiny_policy, tiny_encoder, 1), None)
    with pytest.raises(DQOError, match=r"distributed.nodes: got 2; several nodes train on a cluster"):
        sft.run(context, tmp_path / "one/data", tmp_path / "sft")
