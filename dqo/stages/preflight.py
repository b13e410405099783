"""Stage 0 on a cluster: everything that a run needs and that can be asked without a GPU, in a minute."""

import importlib.util
import json
import math
import os
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dqo import defences, judges, rewards, tracking
from dqo.bundled import identity
from dqo.errors import DQOError
from dqo.judges.labelled import labelled_of
from dqo.judges.prompt import load_prompt
from dqo.recipe import Policy, Recipe, Resources, Reward
from dqo.stages.context import Context
from dqo.tasks import get_task

DEADLINE = 60.0
"""Seconds for all checks together."""
PATIENCE = 20.0
"""Seconds for one check."""
_STAGE = "preflight"
_QUOTAS = ("requests.{}", "limits.{}", "{}")


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked.
        state: `unknown` where it could not be found out, which stops nothing.
        message: What was found, or what is wrong and what to do.
    """

    name: str
    state: Literal["ok", "failed", "unknown"]
    message: str


def run(
    context: Context,
    report: Path,
    nodes: list[dict[str, Any]] | str = "not asked",
    quotas: list[dict[str, Any]] | str = "not asked",
    further: Sequence[tuple[str, Callable[[], str]]] = (),
) -> list[Check]:
    """Check everything, print a line each, and stop with all problems at once.

    Args:
        context: The pipeline run.
        report: Markdown file to write.
        nodes: The cluster's nodes as Kubernetes writes them, or why they could not be listed.
        quotas: The namespace's ResourceQuotas, or why they could not be listed.
        further: Checks that only the cluster's client can make, as `carry_out` takes them.

    Returns:
        The checks, none of which failed.

    Raises:
        DQOError: Naming every check that failed.
    """
    recipe = context.recipe
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Secrets", lambda: _secrets(recipe)),
        ("Workspace", lambda: _workspace(context.workspace)),
        ("Libraries", lambda: _libraries(recipe)),
        ("MLflow", lambda: _tracking(context)),
        ("Data", lambda: _data(recipe)),
        *further,
    ]
    if recipe.judge is not None:
        checks.append(("Judge", lambda: _judge(recipe)))
    if recipe.rl.rollout.server_base_url:
        checks.append(("vLLM server", lambda: _vllm(recipe)))
    checks += [
        ("Tokenizer", lambda: _tokenizer(recipe.policy)),
        ("Policy", lambda: _configuration("policy.model", recipe.policy.model, recipe.policy.revision)),
        ("Encoder", lambda: _encoder(recipe)),
        ("Reward", lambda: _reward(recipe)),
        ("Defences", lambda: _defences(recipe)),
    ]
    # On a slow node the libraries that read models take longer to import than a check may: that is no check's fault.
    import dqo.policy  # noqa: F401

    found = [*carry_out(checks), capacity(recipe.resources, nodes, quotas, recipe.distributed.nodes)]
    marks = {"ok": "ok", "failed": "FAILED", "unknown": "not checked"}
    for check in found:
        sys.stdout.write(f"{check.name}: {marks[check.state]}: {check.message}\n")
    sys.stdout.flush()
    failed = [check for check in found if check.state == "failed"]
    if failed:
        count = "one problem" if len(failed) == 1 else f"{len(failed)} problems"
        lines = "\n".join(f"  {check.name}: {check.message}" for check in failed)
        raise DQOError(f"the pipeline cannot run: {count}, nothing was trained\n{lines}")
    rows = [f"| {check.name} | {marks[check.state]} | {_cell(check.message)} |" for check in found]
    report.write_text("\n".join(["| check | outcome | |", "|---|---|---|", *rows, ""]), encoding="utf-8")
    return found


def carry_out(
    checks: Iterable[tuple[str, Callable[[], str]]], deadline: float = DEADLINE, patience: float = PATIENCE
) -> list[Check]:
    """Run checks one after another; one that hangs costs its patience, not the run.

    Args:
        checks: Name, and what returns what it found or raises what is wrong.
        deadline: Seconds for all; what is not begun by then is `unknown`.
        patience: Seconds for one.
    """
    found, end = [], time.monotonic() + deadline
    for name, check in checks:
        left = min(patience, end - time.monotonic())
        if left <= 0:
            found.append(Check(name, "unknown", f"{deadline:g} s were over"))
            continue
        outcome: list[Check] = []
        thread = threading.Thread(target=_carried_out, args=(name, check, outcome), daemon=True)
        thread.start()
        thread.join(left)
        found.append(outcome[0] if outcome else Check(name, "failed", f"no answer within {left:.0f} s"))
    return found


def _carried_out(name: str, check: Callable[[], str], outcome: list[Check]) -> None:
    try:
        outcome.append(Check(name, "ok", check()))
    except DQOError as error:
        outcome.append(Check(name, "failed", str(error)))
    except Exception as error:  # a library's own: the other checks are still worth their answer
        reason = next(iter(str(error).strip().splitlines()), "")
        outcome.append(Check(name, "failed", f"{type(error).__name__}: {reason[:300]}"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def secret_variables(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Section of `resources.secrets` that is set -> key of the Secret -> environment variable that takes it."""
    judge = recipe.judge.api_key_env if recipe.judge is not None else None
    variables = {
        "tracking": {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
        "storage": {"access-key-id": "AWS_ACCESS_KEY_ID", "secret-access-key": "AWS_SECRET_ACCESS_KEY"},
        "hub": {"token": "HF_TOKEN"},
        "judge": {"api-key": judge} if judge else {},
    }
    return {name: keys for name, keys in variables.items() if getattr(recipe.resources.secrets, name) is not None}


def _secrets(recipe: Recipe) -> str:
    """Names every Secret, key and variable that is missing; never a value."""
    expected = secret_variables(recipe)
    missing = []
    for section, keys in expected.items():
        secret = getattr(recipe.resources.secrets, section)
        lacking = [key for key, variable in keys.items() if not os.environ.get(variable, "").strip()]
        if lacking:
            missing.append(
                f"resources.secrets.{section}: the Secret {secret!r} does not exist in this namespace, or its "
                f"{', '.join(lacking)} is missing or empty"
            )
    variable = recipe.judge.api_key_env if recipe.judge is not None else None
    if variable and "judge" not in expected and not os.environ.get(variable, "").strip():
        missing.append(f"judge.api_key_env: {variable} is not set; name a Secret in resources.secrets.judge")
    if missing:
        raise DQOError("; ".join(missing))
    names = [getattr(recipe.resources.secrets, section) for section in expected]
    return f"set: {', '.join(names)}" if names else "none asked for"


def _workspace(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"dqo")
            stream.flush()
            os.fsync(stream.fileno())
        stat = os.statvfs(folder)
    except OSError as error:
        raise DQOError(
            f"{folder}: cannot be written by user {os.getuid()}, group {os.getgid()} ({error.strerror}); give the "
            "volume to them, or mount another one (resources.workspace_claim)"
        ) from None
    kept = "" if on_a_volume(folder) else "; no volume is mounted there (resources.workspace_claim): nothing is resumed"
    return f"{folder} can be written, {stat.f_bavail * stat.f_frsize / 2**30:.1f} GiB free{kept}"


def on_a_volume(folder: Path) -> bool:
    """Whether a folder lies below a mount other than the container's root."""
    folder = folder.resolve()
    return any(os.path.ismount(place) for place in (folder, *folder.parents) if place != place.parent)


def _libraries(recipe: Recipe) -> str:
    """What the image holds of the libraries that only some recipes need: all tasks run in the same image."""
    import torch

    rollout, strategy, accelerator = recipe.rl.rollout, recipe.distributed.strategy, recipe.resources.accelerator
    held, missing = [], []
    if rollout.engine == "vllm":  # with a server too, whose weights TRL's client updates by means of vLLM
        if importlib.util.find_spec("vllm") is None:
            missing.append("rl.rollout.engine: got 'vllm', and vLLM is not installed")
        held.append("vLLM")
    if strategy.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            missing.append(f"distributed.strategy: got {strategy!r}, and DeepSpeed is not installed")
        held.append("DeepSpeed")
    if accelerator is not None and accelerator.startswith("nvidia.com/"):  # `nvidia.com/mig-1g.5gb` too
        if torch.version.cuda is None:
            missing.append(f"resources.accelerator: got {accelerator!r}, and torch {torch.__version__} is without CUDA")
        held.append(f"torch with CUDA {torch.version.cuda}")
    if missing:
        raise DQOError(
            f"resources.image {recipe.resources.image!r}: {'; '.join(missing)}; build the trainer's image from a BASE "
            "with CUDA and with EXTRAS=gpu (docs/operations.md, Images), and name it in resources.image"
        )
    return f"the image has {', '.join(held)}" if held else "nothing asked for beyond what every image has"


def _tracking(context: Context) -> str:
    """Write a tag and a small file, and read them back.

    One run `preflight` an experiment holds them: deleting a run takes more rights in MLflow than writing to it.
    """
    import mlflow

    experiment = tracking.connect(context.recipe, context.mlflow_uri)
    client = mlflow.MlflowClient()
    tracking.check_registered_name(client, context.recipe.registry.name)
    public = tracking.public(context.mlflow_uri)
    token = uuid.uuid4().hex
    try:
        known = client.search_runs([experiment], f"tags.`{tracking.STAGE_TAG}` = '{_STAGE}'", max_results=1)
        made = known or [client.create_run(experiment, run_name=_STAGE, tags={tracking.STAGE_TAG: _STAGE})]
        run_id = made[0].info.run_id
        client.set_tag(run_id, "dqo.preflight", token)
        client.set_terminated(run_id, "FINISHED")
    except mlflow.exceptions.MlflowException as error:
        raise DQOError(
            f"{public}: runs cannot be written to experiment {context.recipe.tracking.experiment!r} ({_first(error)}); "
            "check the user in resources.secrets.tracking and what MLflow allows it"
        ) from None
    name = f"{_STAGE}/{token}.txt"
    try:
        client.log_text(run_id, token, name)
        with tempfile.TemporaryDirectory() as folder:
            got = Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except Exception as error:  # boto3's, requests' and the file system's own
        raise DQOError(
            f"{public}: files cannot be written to and read from the artifact store at {made[0].info.artifact_uri} "
            f"({type(error).__name__}: {_first(error)}); check the store, its keys and resources.secrets.storage"
        ) from None
    if got != token:
        raise DQOError(f"{public}: the artifact store gave back {got[:40]!r} for {token!r}")
    return f"{public}: a tag and a file were written and read"


def _data(recipe: Recipe) -> str:
    from dqo.data import hub_dataset, source_fingerprint

    task = get_task(recipe.task)
    fingerprint = source_fingerprint(recipe.data, task)
    hub = hub_dataset(recipe.data, task)
    if hub is None:
        return f"{recipe.data.source}: {fingerprint}"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return f"{fingerprint}: the hub is switched off; preparation reads the cache"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = hub
    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DQOError(
            f"data.source {recipe.data.source!r}: {name} cannot be reached on the hub ({_first(error)})"
        ) from None
    return fingerprint


def _judge(recipe: Recipe) -> str:
    judge = recipe.judge
    assert judge is not None
    if judge.reward is not None:
        judges.check(judge)
        return _reward_model(judge.reward.as_reward, "judge.reward")
    load_prompt(judge.prompt)
    labelled_of(judge)
    key = os.environ.get(judge.api_key_env, "").strip() if judge.api_key_env else ""
    status, body = _get(f"{judge.endpoint}/models", "judge.endpoint", {"Authorization": f"Bearer {key}"} if key else {})
    if status in (401, 403):
        raise DQOError(f"judge.endpoint {judge.endpoint}: answers {status}; the key in judge.api_key_env is refused")
    if status != 200:
        return f"{judge.endpoint} answers, but lists no models (status {status})"
    try:
        names = [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return f"{judge.endpoint} answers, but lists no models"
    if judge.model not in names:
        raise DQOError(f"judge.model: {judge.endpoint} has no {judge.model!r}; it has: {', '.join(names[:10])}")
    return f"{judge.endpoint} has {judge.model}"


def _vllm(recipe: Recipe) -> str:
    address = str(recipe.rl.rollout.server_base_url).rstrip("/")
    status, _ = _get(f"{address}/health", "rl.rollout.server_base_url", {})
    if status != 200:
        raise DQOError(f"rl.rollout.server_base_url {address}: /health answers {status}; expected 200")
    return f"{address} is up"


def _get(url: str, field: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body of a request; a server's error (5xx) and silence are problems.

    Raises:
        DQOError: Naming the field of the recipe.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
            return response.status, response.read(2**20)
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise DQOError(f"{field}: {url} answers {error.code} ({error.reason})") from None
        return error.code, b""
    except (OSError, ValueError) as error:
        raise DQOError(f"{field}: {url} does not answer ({getattr(error, 'reason', error)})") from None


def _tokenizer(policy: Policy) -> str:
    from dqo.policy import load_tokenizer

    if policy.model.startswith("bundled:"):
        return _bundled("policy.model", policy.model)
    tokenizer = load_tokenizer(policy)
    return f"policy.model {policy.model!r}: {len(tokenizer)} tokens, with a chat template"


def _bundled(field: str, model: str) -> str:
    """A bundled model's package is all that can be missing; to unpack it would take longer than a check may."""
    return f"{field} {model!r}: {identity(model)}"


def _configuration(field: str, model: str, revision: str | None) -> str:
    from transformers import AutoConfig

    from dqo.bundled import locate

    if model.startswith("bundled:"):
        return _bundled(field, model)
    location = locate(model, revision)
    try:
        kind = AutoConfig.from_pretrained(location.load, revision=location.hub_revision).model_type
    except (OSError, ValueError) as error:
        raise DQOError(f"{field} {model!r}: its config.json cannot be read ({_first(error)})") from None
    return f"{field} {model!r}: {kind}"


def _encoder(recipe: Recipe) -> str:
    return _configuration("encoder.model", recipe.encoder.model, recipe.encoder.revision)


def _reward(recipe: Recipe) -> str:
    task = get_task(recipe.task)
    rewards.check(recipe, task)
    kind = rewards.kind(recipe, task)
    if kind != "model":
        return kind
    return _reward_model(recipe.reward, "reward")


def _defences(recipe: Recipe) -> str:
    defences.check(recipe, get_task(recipe.task))
    return f"what is embedded of a response: {recipe.method.defences.embed}"


def _reward_model(spec: Reward, field: str) -> str:
    assert spec.model is not None
    from transformers import AutoTokenizer

    from dqo.bundled import locate

    location = locate(spec.model, spec.revision)
    try:
        AutoTokenizer.from_pretrained(location.load, revision=location.hub_revision)
    except (OSError, ValueError) as error:
        raise DQOError(f"{field}.model {spec.model!r}: its tokenizer cannot be loaded ({_first(error)})") from None
    return f"{field}.model {spec.model!r}: one label"


def capacity(
    resources: Resources, nodes: list[dict[str, Any]] | str, quotas: list[dict[str, Any]] | str, pods: int = 1
) -> Check:
    """Say whether a cluster can ever hold what trains a stage: on its nodes, and in the namespace's quota.

    Nodes count by what they have, not by what is free now: a task may wait.

    Args:
        resources: The recipe's section.
        nodes: As Kubernetes lists them, or why they are not known.
        quotas: ResourceQuotas of the namespace, or why they are not known.
        pods: How many train at once (`distributed.nodes`), each with the accelerators of the recipe.
    """
    name = "Accelerators"
    kind, count = resources.accelerator, resources.accelerator_count
    if kind is None:
        return Check(name, "ok", "none asked for")
    field = "resources.accelerator_count" if pods == 1 else "resources.accelerator_count, distributed.nodes"
    asked = f"a task asks for {count} {kind}" if pods == 1 else f"{pods} nodes ask for {count} {kind} each"
    unknown = []
    if isinstance(quotas, str):
        unknown.append(f"quotas: {quotas}")
    else:
        for quota in quotas:
            hard = quota.get("status", {}).get("hard") or quota.get("spec", {}).get("hard") or {}
            limits = {key.format(kind): hard[key.format(kind)] for key in _QUOTAS if key.format(kind) in hard}
            for key, limit in limits.items():
                if _whole(limit) < count * pods:
                    return Check(
                        name,
                        "failed",
                        f"{field}: {asked}, and the ResourceQuota {quota['metadata']['name']!r} allows this namespace "
                        f"{limit} ({key})",
                    )
    if isinstance(nodes, str):
        unknown.append(f"nodes: {nodes}")
    else:
        labels = resources.node_selector
        wanted = [n for n in nodes if labels.items() <= (n["metadata"].get("labels") or {}).items()]
        held = [_whole(n["status"].get("allocatable", {}).get(kind, "0")) for n in wanted]
        room = sum(math.inf if math.isinf(one) else one // count for one in held)
        if room < pods:
            which = f" with the labels {labels}" if labels else ""
            found = (
                f"no node{which} has more than {max(held, default=0)}"
                if pods == 1
                else f"the nodes{which} have room for {room:g}: {', '.join(f'{one:g}' for one in held) or 'none'}"
            )
            return Check(
                name,
                "failed",
                f"{field}: {asked}, and {found} ({len(wanted)} of {len(nodes)} nodes looked at); a cluster that adds "
                "nodes by itself may still have them: then forbid this task to list nodes",
            )
    if unknown:
        return Check(name, "unknown", "; ".join(unknown))
    where = f"{count} {kind} fit on a node" if pods == 1 else f"{pods} times {count} {kind} fit on the nodes"
    return Check(name, "ok", f"{where} and into the quota")


def _whole(quantity: str) -> float:
    """A count of devices as Kubernetes writes it; infinite where it has a suffix such as `k`, which is enough."""
    return int(quantity) if quantity.isdigit() else math.inf


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
