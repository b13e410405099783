"""The HTML pages in a real browser: nothing goes wrong in it, a phone needs no sideways scrolling, search finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation
from html_page import HOSTILE

from dqo.evaluation import comparison, comparison_report, report
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.comparison import Conditions
from dqo.evaluation.figures import ModelResult
from dqo.evaluation.page import Example, Response
from dqo.evaluation.statistics import Interval
from dqo.recipe import Recipe

PROMPTS = [f"subject{i}" for i in range(12)]
LONG = "an-unbroken-word-" * 30
SAME = Conditions("r", "e", "s")


def compared(*shifts: float) -> comparison.Compared:
    found = []
    for position, shift in enumerate(shifts):
        document, rows = evaluation({"dqo": shift}, PROMPTS, seed=position)
        rows[3]["responses"][0] = f"{LONG} {HOSTILE}"
        one = comparison.evaluated(document, rows, "dqo", f"a-registered-model/{position}", "here")
        found.append(replace(one, label=one.source, conditions=SAME))
    return comparison.compare(found)


def pipeline_report() -> str:
    models = [
        ModelResult(
            name,
            label,
            {metric: Interval(at, at - 0.05, at + 0.05) for metric in METRICS}
            | {"log_volume": Interval(3 + at, 2.9 + at, 3.1 + at)},
        )
        for name, label, at in (
            ("base", "Base", 0.4), ("sft", "SFT", 0.5), ("reward_only", "Reward-only RL", 0.8), ("dqo", "DQO-RL", 0.9),
        )
    ]  # fmt: skip
    history = [{"step": step, "quality": 0.5, "log_volume": 3 + step / 10, "loss": 1.0} for step in range(1, 9)]
    answers = {model.name: [Response("A dog ran.", 0.9), Response(f"{LONG} {HOSTILE}", None, True)] for model in models}
    data = report.ReportData(
        recipe=Recipe(name="a-run"), models=models, prompts=12,
        histories=dict.fromkeys(("sft", "reward_only", "dqo"), history),
        examples=[Example(f"Write about {key}. {LONG}", answers, (key,)) for key in PROMPTS],
        data_card={"licence": "CC0-1.0", "source": LONG}, environment={"torch": LONG},
        differences={metric: Interval(0.1, 0.05, 0.15) for metric in METRICS},
    )  # fmt: skip
    return report.render(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {
        "report": pipeline_report(),
        "two models": comparison_report.render(compared(0.0, 0.3)),
        "five models": comparison_report.render(compared(0.0, 0.3, -0.2, 0.1, 0.0)),
    }
    for name, text in found.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in found}


@contextmanager
def opened(chromium: Any, path: Path, width: int, script: bool = True) -> Iterator[Any]:
    """A page of this width; what the console says, what fails and what is asked of the network ends the test."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=script)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: request.url == path.as_uri() or wrong.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    yield page
    context.close()
    if wrong:
        raise AssertionError("\n".join(wrong))


def test_the_browser_reports_what_is_wrong(chromium: Any, tmp_path: Path):
    """Else the tests below could not fail."""
    page = tmp_path / "page.html"
    page.write_text("<body style='width:700px'><img src='missing.png'><script>undefined.x</script>")
    with pytest.raises(AssertionError, match=r"(?s)(?=.*request: .*missing\.png)(?=.*error: .*undefined)"):  # noqa: SIM117
        with opened(chromium, page, 390) as shown:
            assert shown.evaluate("document.scrollingElement.scrollWidth") > 390


@pytest.mark.parametrize("name", ["report", "two models", "five models"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_goes_wrong_and_nothing_is_wider_than_the_page(
    chromium: Any, pages: dict[str, Path], name: str, width: int
):
    with opened(chromium, pages[name], width) as page:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        for point in page.locator("[data-tip]:visible").all()[:2]:
            point.hover()
            assert page.locator("#tip").is_visible()
        for tab in page.locator(".tabs label").all():
            tab.click()
            assert page.locator(".panel:visible").count() == 1


def visible(page: Any) -> list[str]:
    return page.locator(".example:visible .asked").all_inner_texts()


def test_search_filters_the_examples_and_sorting_orders_them(chromium: Any, pages: dict[str, Path]):
    result = compared(0.0, 0.3)
    by_quality = [f"Write about {PROMPTS[i]}." for i in comparison.by_disagreement(result)]
    apart = comparison.disagreement(result)
    by_volume = [f"Write about {PROMPTS[i]}." for i in sorted(range(12), key=lambda i: -apart[i]["log_volume"])]
    assert by_quality != by_volume
    with opened(chromium, pages["two models"], 1280) as page:
        assert visible(page) == by_quality
        page.fill("#search", "WRITE subject1")
        assert sorted(visible(page)) == [f"Write about subject{i}." for i in (1, 10, 11)]
        assert page.locator("#matches").inner_text() == "3 of 12"
        page.fill("#search", "an-unbroken-word")  # in a response alone
        assert visible(page) == ["Write about subject3."]
        page.press("#search", "Enter")  # submits nothing
        page.fill("#search", "nowhere at all")
        assert visible(page) == []
        page.fill("#search", "")
        page.select_option("#sort", "volume")
        assert visible(page) == by_volume
        page.select_option("#sort", "order")
        assert visible(page) == [f"Write about {key}." for key in PROMPTS]


@pytest.mark.parametrize("name", ["report", "two models"])
def test_without_scripts_everything_but_search_is_there(chromium: Any, pages: dict[str, Path], name: str):
    with opened(chromium, pages[name], 1280, script=False) as page:
        assert page.locator(".example:visible").count() == 12
        assert page.locator("form.search:visible").count() == 0
        page.locator(".example summary").nth(1).click()
        assert page.locator(".example").nth(1).locator(".answers").is_visible()
        page.locator(".tabs label").nth(1).click()
        assert page.locator(".panel:visible svg:visible").count() == 1
