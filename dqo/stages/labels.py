"""Names of models for people."""

from dqo.recipe import Recipe

_LABELS = {"base": "Base", "sft": "SFT", "reward_only": "Reward-only RL"}


def label(recipe: Recipe, name: str) -> str:
    """What a report or table calls a model of the run."""
    return f"DQO-RL (alpha = {recipe.method.alpha:g})" if name == "dqo" else _LABELS.get(name, name)
