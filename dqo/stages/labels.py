"""Names of models for people."""

from dqo.recipe import Recipe

_LABELS = {"base": "Base", "sft": "SFT", "reward_only": "Reward-only RL"}


def label(recipe: Recipe, name: str) -> str:
    """What a report or table calls a model of the run."""
    if name != "dqo":
        return _LABELS.get(name, name)
    alpha = f"(alpha = {recipe.method.alpha:g})"
    return f"DQO-RL {alpha}" if recipe.method.score == "log_volume" else f"RL with {recipe.method.score} {alpha}"
