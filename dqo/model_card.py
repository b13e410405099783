"""The card of a trained model, README.md beside its weights, in the form that the Hugging Face hub reads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo import __version__
from dqo.bundled import origin
from dqo.checkpoint import CheckpointCard
from dqo.evaluation.catalogue import METRICS
from dqo.labels import bonus_earners, label
from dqo.recipe import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TABLE = ("quality", "log_volume", "distinct_4", "self_bleu_diversity", "semantic_clusters", "best_of_n")


def render(recipe: Recipe, card: CheckpointCard, document: Mapping[str, Any]) -> str:
    """Write the card of a checkpoint.

    Args:
        recipe: What it was trained by.
        card: The checkpoint's.
        document: Content of `evaluation.json`.

    Returns:
        Markdown with a YAML header.
    """
    from huggingface_hub import ModelCardData

    base, licence = _base(card)
    settings: dict[str, Any] = {"model_name": recipe.registry.name, "eval_results": _results(recipe, card, document)}
    if licence is not None:
        settings["license"] = licence
    if base is not None:
        settings |= {"base_model": base, "base_model_relation": "adapter" if card.weights == "adapter" else "finetune"}
    dataset = _dataset(recipe)
    if dataset is not None:
        settings["datasets"] = [dataset]
    header = ModelCardData(
        library_name="peft" if card.weights == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["dqo", "trl", "grpo", *(["lora"] if card.weights == "adapter" else [])],
        **settings,
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {recipe.registry.name}",
        _what(recipe, card, base),
        "## Training\n\n" + _training(recipe, card),
        "## Evaluation\n\n" + _evaluation(recipe, document),
        "## Gate\n\n" + _gate(document),
        "## Loading\n\n" + _loading(recipe, card, base),
        "## Limits\n\n" + _limits(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _base(card: CheckpointCard) -> tuple[str | None, str | None]:
    """Hub id and licence of the base model; `None` for what is not known. A path says nothing to other readers."""
    known = origin(card.base_model)
    if known is not None:
        return known.hub, known.licence
    if not Path(card.base_model).expanduser().is_dir():
        return card.base_model, None
    return None, _licence_of(Path(card.base_model).expanduser())


def _licence_of(folder: Path) -> str | None:
    """The licence that a local model's own card states."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return stated if isinstance(stated, str) else None


def _dataset(recipe: Recipe) -> str | None:
    """Hub id of the training data; `None` for files and bundled data."""
    from dqo.tasks import get_task

    if recipe.data.source.startswith("hub:"):
        return recipe.data.source.removeprefix("hub:")
    public = get_task(recipe.task).public if recipe.data.source == "public" else None
    return None if public is None else public.dataset


def _results(recipe: Recipe, card: CheckpointCard, document: Mapping[str, Any]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    metrics = document["models"][card.model]["metrics"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset(recipe) or recipe.task,
            dataset_name=f"{recipe.task}, {document['prompts']} evaluation prompts",
            dataset_revision=document["data_digest"],
            metric_type=name,
            metric_name=METRICS[name].label,
            metric_value=round(interval["mean"], 4),
            metric_args={"n": document["n"]},
        )
        for name, interval in metrics.items()
        if name in METRICS and interval["mean"] is not None
    ]


def _what(recipe: Recipe, card: CheckpointCard, base: str | None) -> str:
    form = "A LoRA adapter for" if card.weights == "adapter" else "A model trained from"
    named = f"[{base}](https://huggingface.co/{base})" if base is not None else "a local base model"
    known = origin(card.base_model)
    note = f" {known.note}" if known is not None and known.note else ""
    if card.model != "dqo":
        return (
            f"{form} {named}, post-trained on the task `{recipe.task}` as `{card.model}`: the baseline that a model "
            "trained with Diversity Quality Optimization (DQO, [arXiv 2509.04784](https://arxiv.org/abs/2509.04784)) "
            f"is compared with. It had the same prompts, steps and SFT checkpoint, and no reward for diversity.{note}"
        )
    return (
        f"{form} {named}, post-trained with Diversity Quality Optimization (DQO, "
        f"[arXiv 2509.04784](https://arxiv.org/abs/2509.04784)) on the task `{recipe.task}`: a group of responses is "
        "rewarded for its quality and for the volume that its members' embeddings span, so that responses to a prompt "
        f"stay different.{note}"
    )


def _training(recipe: Recipe, card: CheckpointCard) -> str:
    method, known = recipe.method, origin(recipe.encoder.model)
    encoder = known.hub if known is not None else recipe.encoder.model
    if known is None and Path(encoder).expanduser().is_dir():
        encoder = "a local model"
    rows = {
        "recipe": f"`{recipe.name}`, digest `{card.recipe_digest}`",
        "data": f"task `{recipe.task}`, digest `{card.data_digest[:16]}`",
        "steps": f"{recipe.sft.steps} of SFT, {card.steps} of RL",
        "alpha (nats to quality), k": f"{method.alpha if card.model == 'dqo' else 0:g}, {method.k}",
        "score, advantage": f"{method.score}, {method.advantage}",
        "bonus for": bonus_earners(method.defences),
        "reward": _reward(recipe),
        "encoder": encoder,
        "seed": str(recipe.seed),
        "base revision": f"`{card.base_revision}`" if card.base_revision else "not pinned",
        "library": f"dqo-pipelines {__version__}",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    if card.stopped is not None:
        table += f"\n\nTraining was stopped by a health rule: {card.stopped['reason']}"
    return table


def _reward(recipe: Recipe) -> str:
    from dqo import rewards
    from dqo.tasks import get_task

    return rewards.kind(recipe, get_task(recipe.task))


def _evaluation(recipe: Recipe, document: Mapping[str, Any]) -> str:
    models = document["models"]
    shown = [name for name in _TABLE if any(name in model["metrics"] for model in models.values())]
    lines = [
        f"{document['prompts']} prompts of the held-out split, {document['n']} responses each, the same seeds for each "
        f"model. Means with {100 * document['confidence']:g} % bootstrap intervals over prompts.",
        "",
        "| model | " + " | ".join(METRICS[name].label for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for name, model in models.items():
        cells = " | ".join(_cell(model["metrics"].get(metric)) for metric in shown)
        lines.append(f"| {label(recipe, name)} | {cells} |")
    return "\n".join(lines)


def _cell(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return "not measured"
    low, high = interval["low"], interval["high"]
    bounds = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None and math.isfinite(high - low) else ""
    return f"{interval['mean']:.2f}{bounds}"


def _gate(document: Mapping[str, Any]) -> str:
    gate = document["gate"]
    lines = ["Passed:" if gate["passed"] else "Not passed:", "", *(f"- {reason}" for reason in gate["reasons"])]
    return "\n".join(lines)


def _loading(recipe: Recipe, card: CheckpointCard, base: str | None) -> str:
    name = recipe.registry.name
    download = (
        "```python\n"
        "import mlflow  # MLFLOW_TRACKING_URI names the server\n\n"
        f'version = "models:/{name}/VERSION"  # the version that this card came with\n'
        'folder = mlflow.artifacts.download_artifacts(version) + "/artifacts/checkpoint"\n'
        "```"
    )
    if card.weights != "adapter":
        return (
            f"{download}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n```"
        )
    revision = f', revision="{card.base_revision}"' if base == card.base_model and card.base_revision else ""
    return (
        f"{download}\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base or "FOLDER OF THE BASE MODEL"}"\n'
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}), folder)\n```"
    )


def _limits(recipe: Recipe) -> str:
    return (
        f'"Quality" is the reward of the recipe (`{_reward(recipe)}` on the task `{recipe.task}`) and nothing more; '
        "log-volume is a property of the encoder's embeddings. Both can be gamed: read responses before relying on "
        "them. The figures are of one training run and of prompts like these. The model has the limits and biases of "
        "its base model."
    )
