"""Draw the figures of docs/method.md: `python docs/figures.py`. All in them is computed here, nothing is measured."""

import itertools
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dqo.advantage import group_advantages
from dqo.determinant import leave_one_out_bonus, log_volume
from dqo.diversity import Group, group_score

IMAGES = Path(__file__).parent / "images"
_COLOURS = ("#1464b4", "#c2540a", "#0b7d62", "#a2448f", "#8a6d00", "#333b47")
_FORMS = ("every member the whole log det", "paper", "centred", "decoupled")


def equally_similar(k: int, similarity: float) -> Tensor:
    """K unit vectors of which any two have the given cosine similarity in [0, 1), float64, shape `(k, k)`."""
    gram = torch.full((k, k), similarity, dtype=torch.float64).fill_diagonal_(1.0)
    return torch.linalg.cholesky(gram)


def bonus_figure() -> Figure:
    """The bonus against how alike the responses of a group are: by group size, and beside the other scores."""
    figure = Figure(figsize=(9.6, 3.8), dpi=160, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    similarities = np.linspace(0, 0.999, 120)
    for k, colour in zip((2, 4, 8, 16), _COLOURS, strict=False):
        values = [leave_one_out_bonus(equally_similar(k, s))[0].item() for s in similarities]
        left.plot(similarities, values, color=colour, label=f"k = {k}", linewidth=2)
    left.set_title("Bonus of the log-volume, nats", loc="left", fontsize=11, fontweight="bold")
    names = ("log_volume", "elliptical", "cosine_distance", "vendi", "similarity")
    for name, colour in zip(names, _COLOURS, strict=False):
        score = group_score(name, 8)
        values = np.array([score.bonus(Group(equally_similar(8, s)))[0].item() for s in similarities])
        right.plot(
            similarities, (values - values[-1]) / (values[0] - values[-1]), color=colour, label=name, linewidth=2
        )
    right.set_title("Scores at k = 8, each from 0 to 1", loc="left", fontsize=11, fontweight="bold")
    for axes in (left, right):
        _finish(axes, "cosine similarity of any two responses")
    return figure


def spread_of_forms(k: int = 3) -> dict[str, tuple[float, float]]:
    """Length of the expected gradient, and root of the summed variance of one group's gradient, for each form.

    A softmax policy over five answers of reward 0, alpha = 1; all groups of k are enumerated, so both are exact.
    """
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 3, generator=draw, dtype=torch.float64) + 0.5, dim=-1)
    chance = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    groups = torch.tensor(list(itertools.product(range(5), repeat=k)))
    weights = chance[groups].prod(1)
    vectors, rewards = embeddings[groups], torch.zeros(groups.shape, dtype=torch.float64)
    bonus = leave_one_out_bonus(vectors)
    # As from other prompts: the expectation over all groups.
    middle = (weights[:, None] * bonus).sum(0).mean().item()
    found = {}
    for form in _FORMS:
        if form == _FORMS[0]:
            advantages = log_volume(vectors)[:, None].expand_as(rewards)
        else:
            one = [
                group_advantages(r[None], b[None], 1.0, form, middle=middle)  # type: ignore[arg-type]
                for r, b in zip(rewards, bonus, strict=True)
            ]
            advantages = torch.cat(one)
        scores = torch.eye(5, dtype=torch.float64)[groups] - chance
        gradients = (advantages.unsqueeze(-1) * scores).sum(1)
        mean = (weights[:, None] * gradients).sum(0)
        variance = (weights[:, None] * (gradients - mean).square()).sum()
        found[form] = (mean.norm().item(), variance.sqrt().item())
    return found


def forms_figure() -> Figure:
    """How noisy each form of the advantage is where only the diversity counts."""
    figure = Figure(figsize=(7.2, 3.0), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    found = spread_of_forms()
    positions = np.arange(len(found))
    axes.barh(
        positions - 0.19, [spread for _, spread in found.values()], 0.36, color=_COLOURS[1], label="noise of one group"
    )
    axes.barh(
        positions + 0.19, [mean for mean, _ in found.values()], 0.36, color=_COLOURS[0], label="expected gradient"
    )
    axes.set_yticks(positions, list(found))
    axes.invert_yaxis()
    _finish(axes, "length of the gradient, k = 3")
    return figure


def _finish(axes: Axes, across: str) -> None:
    axes.set_xlabel(across, fontsize=9)
    axes.grid(color="#e4e4df", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def main() -> None:
    """Write the pictures."""
    for name, figure in (("bonus", bonus_figure()), ("forms", forms_figure())):
        figure.savefig(IMAGES / f"method-{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
