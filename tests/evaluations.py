"""Evaluations with known values, as the stage `evaluate` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqo.evaluation.catalogue import METRICS

RECIPE = """\
task: story
reward: {model: null}
encoder: {model: an-encoder}
evaluation: {sampling: {temperature: 1.0}}
"""


def evaluation(
    models: Mapping[str, float], prompts: Sequence[str], n: int = 4, seed: int = 0, **shared: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluation whose diversity metrics are all shifted by a number a model, over shared noise of the prompts.

    Returns:
        The contents of `evaluation.json`, and the rows of `responses.jsonl`.
    """
    document: dict[str, Any] = {
        "models": {}, "n": n, "prompts": len(prompts), "confidence": 0.95, "data_digest": "d" * 64,
        "recipe_digest": "r" * 12, "gate": {"passed": True, "reasons": []},
    } | shared  # fmt: skip
    rows = []
    for name, shift in models.items():
        noise = np.random.default_rng(seed)
        own = np.random.default_rng(seed + len(name))
        per_prompt = {
            metric: (noise.normal(0.5, 0.2, len(prompts)) + shift + own.normal(0, 0.02, len(prompts))).tolist()
            for metric in METRICS
        }
        qualities = own.uniform(0.0, 1.0, (len(prompts), n)).round(2)
        per_prompt["quality"] = qualities.mean(axis=1).tolist()
        per_prompt["log_volume"] = [1.6 + value for value in per_prompt["log_volume"]]  # within its bounds for n = 4
        per_prompt["best_of_n"] = qualities.max(axis=1).tolist()
        document["models"][name] = {"metrics": {}, "per_prompt": per_prompt}
        rows += [
            {
                "id": key, "prompt": f"Write about {key}.", "model": name,
                "responses": [f"{name} says {'very ' * count}much of {key}" for count in own.integers(0, 5, n)],
                "qualities": quality.tolist(), "truncated": [False] * n, "tokens": [5] * n,
            }
            for key, quality in zip(prompts, qualities, strict=True)
        ]  # fmt: skip
    return document, rows


def write(
    folder: Path, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], recipe: str | None = RECIPE
) -> Path:
    """Write the files of an evaluation; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder
