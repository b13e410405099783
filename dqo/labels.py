"""What people call a run's models, its objective, and those who earn its bonus."""

from dqo.recipe import Defences, Method, Recipe

_LABELS = {"base": "Base", "sft": "SFT", "reward_only": "Reward-only RL"}
_SCORES = {
    "log_volume": "log-volume",
    "elliptical": "elliptical bonus",
    "cosine_distance": "cosine distance to the others",
    "vendi": "Vendi score",
    "distinct": "share of the others that mean something else",
    "similarity": "unlikeness to the others",
    "likelihood": "share of the others that are more likely",
    "entropy": "entropy",
}


def label(recipe: Recipe, name: str) -> str:
    """What a report or table calls a model of the run."""
    if name != "dqo":
        return _LABELS.get(name, name)
    alpha = f"(alpha = {recipe.method.alpha:g})"
    return f"DQO-RL {alpha}" if recipe.method.score == "log_volume" else f"RL with {recipe.method.score} {alpha}"


def objective(method: Method) -> str:
    """What RL maximises, e.g. `quality + 1.5 \u00d7 log-volume`."""
    score = _SCORES[method.score]
    if method.combine == "multiply":
        return f"quality \u00d7 (1 - {method.alpha:g} (1 - {score}))"
    return f"quality + {method.alpha:g} \u00d7 {score}"


def bonus_earners(defences: Defences) -> str:
    """Which responses earn the bonus, and what the others get."""
    asked = []
    if defences.min_quality is not None:
        of = "one of the group with" if defences.quality_gate == "group" else ""
        asked.append(f"{of} quality of at least {defences.min_quality:g}".strip())
    if defences.drop_truncated:
        asked.append("not cut at the token limit")
    if defences.max_tokens is not None:
        asked.append(f"at most {defences.max_tokens} tokens")
    if defences.min_prompt_similarity is not None:
        asked.append(f"similarity to the prompt of at least {defences.min_prompt_similarity:g}")
    if defences.embed != "response":
        asked.append("an answer found")
    if not asked:
        return "every response"
    others = "a bonus of 0" if defences.unearned == "zero" else "the advantage of their quality alone"
    return f"{', '.join(asked)}; the others get {others}"
