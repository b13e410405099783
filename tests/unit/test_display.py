"""What a user sees while a pipeline runs: progress files made by hand, drawn on consoles that keep what they show."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dqo.progress import Progress
from dqo.recipe import parse
from pipelines.display import Display, Follower, StageState, summary

RECIPE = parse("name: a")


def line(event: str, stage: str = "sft", at: float = 100.0, **fields: object) -> str:
    return json.dumps({"time": at, "stage": stage, "event": event, **fields}) + "\n"


def step(number: int, total: int, stage: str = "sft", at: float = 100.0, **fields: object) -> str:
    return line("step", stage, at, step=number, total=total, **fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


@pytest.fixture
def append(path: Path) -> Callable[..., None]:
    def write(*lines: str) -> None:
        with path.open("a") as stream:
            stream.write("".join(lines))

    return write


@pytest.fixture
def follower(path: Path) -> Follower:
    return Follower(RECIPE, path)


# --- the follower ---


def test_the_stages_stand_in_the_order_in_which_they_run(follower: Follower):
    assert list(follower.stages) == ["prepare", "sft", "rl-reward_only", "rl-dqo", "evaluate", "register"]
    assert {state.status for state in follower.stages.values()} == {"waiting"}
    alone = parse("name: a\nmethod: {baselines: []}\ngate: {against: sft}")
    assert "rl-reward_only" not in Follower(alone, Path("none")).stages


def test_a_file_that_is_not_there_yet_holds_no_events(follower: Follower, append):
    assert follower.update() == []
    append(line("start"))
    assert [name for name, _ in follower.update()] == ["sft"]


def test_a_stage_goes_from_waiting_over_running_to_done(follower: Follower, append):
    state = follower.stages["sft"]
    append(line("start", at=100.0))
    follower.update()
    assert (state.status, state.started) == ("running", 100.0)
    append(step(3, 8, at=120.0, message="early", metrics={"quality": 0.5, "log_volume": 2.0}))
    append(step(4, 8, at=121.0, metrics={"quality": 0.6}))
    follower.update()
    assert (state.status, state.step, state.total, state.message) == ("running", 4, 8, "early")
    assert state.metrics == {"quality": 0.6, "log_volume": 2.0}
    append(line("done", at=160.0))
    follower.update()
    assert (state.status, state.ended - state.started) == ("done", 60.0)
    assert follower.stages["rl-dqo"].status == "waiting" and follower.error is None


def test_a_stage_that_was_finished_before_stays_reused_at_its_end(follower: Follower, append):
    append(line("cached"), line("done", at=101.0))
    follower.update()
    assert follower.stages["sft"].status == "cached"


def test_the_reason_of_a_failed_stage_is_kept(follower: Follower, append):
    append(line("start"), line("error", at=130.0, message="the disk is full"))
    follower.update()
    state = follower.stages["sft"]
    assert (state.status, state.ended, state.message) == ("error", 130.0, "")
    assert follower.error == "the disk is full"


def test_a_half_written_line_is_read_once_it_is_complete(follower: Follower, append):
    whole = step(5, 8)
    append(line("start"), whole[:20])
    assert [event["event"] for _, event in follower.update()] == ["start"]
    append(whole[20:-1])
    assert follower.update() == []  # the line's end is still missing
    append("\n")
    assert [event["step"] for _, event in follower.update()] == [5]
    assert follower.update() == []


def test_events_of_an_earlier_run_are_not_shown(path: Path, append):
    append(line("start"), line("error", message="old"))
    follower = Follower(RECIPE, path)
    assert follower.update() == []
    assert follower.stages["sft"].status == "waiting" and follower.error is None
    append(line("start", "prepare"))
    assert [name for name, _ in follower.update()] == ["prepare"]


def test_what_a_stage_reports_is_what_the_follower_reads(path: Path, follower: Follower):
    progress = Progress(path, "rl-dqo")
    progress("start")
    progress("step", 2, 4, "a message", {"quality": 0.25, "log_volume": math.nan})
    follower.update()
    state = follower.stages["rl-dqo"]
    assert (state.status, state.step, state.total, state.message) == ("running", 2, 4, "a message")
    assert state.metrics == {"quality": 0.25}  # NaN is no figure


def test_stages_that_no_process_reported_were_reused(follower: Follower, append):
    append(line("start", "evaluate"), line("done", "evaluate"), line("start", "register"), line("error", "register"))
    follower.update()
    follower.finish()
    statuses = {name: state.status for name, state in follower.stages.items()}
    assert statuses == dict.fromkeys(follower.stages, "cached") | {"evaluate": "done", "register": "error"}


# --- the time left ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda now: monkeypatch.setattr("pipelines.display.time.time", lambda: now)


@pytest.mark.parametrize(
    ("first", "done", "total", "seconds", "left"),
    [(0, 1, 10, 3.0, 27.0), (0, 4, 10, 8.0, 12.0), (40, 42, 100, 10.0, 290.0), (0, 10, 10, 99.0, 0.0)],
)
def test_the_time_left_follows_the_mean_pace_so_far(first, done, total, seconds, left, clock):
    state = StageState("x", "running", step=done, first_step=first, first_step_time=1000.0, total=total)
    clock(1000.0 + seconds)
    assert state.seconds_left == pytest.approx(left)


@pytest.mark.parametrize("status", ["waiting", "done", "cached", "error"])
def test_only_a_running_stage_has_time_left(status: str):
    assert StageState("x", status, step=4, total=10).seconds_left is None


def test_before_a_step_is_done_the_time_left_is_not_known():
    assert StageState("x", "running", total=10).seconds_left is None
    assert StageState("x", "running", step=40, first_step=40, total=100).seconds_left is None


def test_the_time_that_a_stage_took_to_start_does_not_count(follower: Follower, append, clock):
    append(line("start", at=0.0), *(step(number, 10, at=500.0 + 2 * number) for number in range(5)))
    follower.update()
    clock(508.0)
    assert follower.stages["sft"].seconds_left == pytest.approx(12.0)


def test_steps_in_front_of_a_checkpoint_do_not_count(follower: Follower, append, clock):
    append(line("start", at=0.0), step(40, 100, at=50.0), step(41, 100, at=53.0), step(42, 100, at=56.0))
    follower.update()
    clock(56.0)
    assert follower.stages["sft"].seconds_left == pytest.approx(58 * 3.0)


# --- plain lines ---


def plain(follower: Follower, width: int = 120) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, force_terminal=False, width=width), follower), text


@pytest.mark.parametrize("total", [1, 2, 3, 5, 7, 20, 23, 120])
def test_every_fifth_of_a_stage_is_a_line_and_the_last_step_always(total: int, follower: Follower, append):
    display, text = plain(follower)
    for number in range(total + 1):
        append(step(number, total))
        display.refresh()
    fifths = sorted({math.ceil(total * part / 5) for part in range(1, 6)})
    shown = [int(row.strip().split()[1].partition("/")[0]) for row in text.getvalue().splitlines()]
    assert shown == fifths
    assert shown[-1] == total


def test_a_last_step_that_comes_alone_is_a_line(follower: Follower, append):
    display, text = plain(follower)
    append(step(19, 20))
    display.refresh()
    append(step(20, 20, message="12 train, 3 evaluation prompts"))
    display.refresh()
    assert text.getvalue().splitlines() == [
        "  DQO-SFT: 19/20",
        "  DQO-SFT: 20/20    12 train, 3 evaluation prompts",
    ]


def test_plain_lines_tell_starts_ends_reuse_and_failure(follower: Follower, append):
    append(line("start", "prepare", 10.0), line("done", "prepare", 17.2), line("cached", "sft"))
    append(line("start", "rl-dqo", 20.0), step(4, 4, "rl-dqo", metrics={"quality": 0.5, "log_volume": 2.346}))
    append(line("done", "rl-dqo", 145.0), line("start", "evaluate"), line("error", "evaluate", message="full"))
    display, text = plain(follower)
    with display:
        display.refresh()
    assert text.getvalue().splitlines() == [
        "Prepare data",
        "  Prepare data: done in 7 s",
        "DQO-SFT (finished before, reused)",
        "DQO-RL",
        "  DQO-RL: 4/4  quality 0.50  log-volume 2.35",
        "  DQO-RL: done in 2 min 05 s",
        "Evaluate",
        "  Evaluate: failed",
    ]


def test_a_plain_line_is_neither_wrapped_nor_read_as_markup(follower: Follower, append):
    display, text = plain(follower, width=20)
    append(step(1, 1, message="[bold]a long message with /a/path/of/a/file.jsonl[/] 7/8"))
    display.refresh()
    (row,) = text.getvalue().splitlines()
    assert row.endswith("[bold]a long message with /a/path/of/a/file.jsonl[/] 7/8")


@pytest.mark.parametrize(("rate", "shown"), [(0.0, False), (0.25, True), (1.0, True)])
def test_responses_that_nothing_could_score_are_shown_where_there_are_some(rate, shown, follower: Follower, append):
    display, text = plain(follower)
    append(step(1, 1, metrics={"quality": 0.5, "unscorable_rate": rate}))
    display.refresh()
    assert ("unscorable" in text.getvalue()) is shown
    assert ("unscorable 0.25" in text.getvalue()) is (rate == 0.25)
    assert "quality 0.50" in text.getvalue()


def test_a_warning_is_a_line_and_hides_nothing(follower: Follower, append):
    display, text = plain(follower)
    append(line("start", "rl-dqo"), step(4, 20, "rl-dqo", message="continuing", metrics={"quality": 0.5}))
    append(line("warning", "rl-dqo", message="entropy: 0.01 below 0.05, at steps 2 to 4"))
    display.refresh()
    assert text.getvalue().splitlines()[2] == "  DQO-RL: warning: entropy: 0.01 below 0.05, at steps 2 to 4"
    state = follower.stages["rl-dqo"]
    assert (state.status, state.message, state.step) == ("running", "continuing", 4)


# --- a terminal ---


def drawn(follower: Follower) -> list[str]:
    """The table that stays on a terminal, a row a stage."""
    console = Console(force_terminal=True, record=True, width=120, file=io.StringIO())
    with Display(console, follower) as display:
        display.refresh()
    return [row.rstrip() for row in console.export_text().splitlines() if row.strip()][-len(follower.stages) :]


def test_a_terminal_shows_every_stage_with_its_mark(follower: Follower, append):
    append(line("start", "prepare", 10.0), line("done", "prepare", 17.0), line("cached", "sft", 18.0))
    append(line("done", "sft", 19.0), line("start", "rl-reward_only", 20.0), line("error", "rl-reward_only", 95.0))
    append(line("start", "rl-dqo"))
    rows = [row.split() for row in drawn(follower)]
    assert rows == [
        ["✓", "Prepare", "data", "7", "s"],
        ["✓", "DQO-SFT", "reused"],
        ["✗", "RL", "reward-only", "1", "min", "15", "s"],
        ["▶", "DQO-RL", "starting"],
        ["·", "Evaluate"],
        ["·", "Register"],
    ]


def test_a_terminal_shows_the_steps_figures_and_time_left_of_the_running_stage(follower: Follower, append, clock):
    append(line("start", at=0.0))
    append(step(0, 10, at=100.0), *(step(number, 10, at=100.0 + 20 * number) for number in range(1, 4)))
    append(step(4, 10, at=180.0, metrics={"quality": 0.5, "log_volume": 2.0, "unscorable_rate": 0.0}))
    clock(180.0)
    (row,) = [row for row in drawn(follower) if "DQO-SFT" in row]
    for expected in ("▶", "4/10", "quality 0.50  log-volume 2.00", "2 min 00 s left", "━"):
        assert expected in row
    assert "unscorable" not in row


def test_a_terminal_shows_warnings_below_the_stages_until_the_end(follower: Follower, append):
    append(line("start", "rl-dqo"), step(4, 4, "rl-dqo", metrics={"quality": 0.5}))
    append(line("warning", "rl-dqo", message="first"), line("warning", "rl-dqo", message="second"))
    append(line("done", "rl-dqo", at=160.0))
    lines = drawn(follower)
    assert lines[-2:] == ["! DQO-RL: first", "! DQO-RL: second"]
    assert [row for row in lines if row.startswith("✓ ") or "✓" in row][-1].split()[1] == "DQO-RL"


def test_a_terminal_shows_the_message_where_there_are_no_figures(follower: Follower, append):
    append(line("start", "evaluate"), step(1, 4, "evaluate", message="Reward-only RL"))
    assert [row for row in drawn(follower) if "Evaluate" in row and row.endswith("Reward-only RL")]


# --- the table at the end ---


def cell(mean: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "low": low, "high": high}


def table(confidence: float = 0.95, width: int = 80, **changed: dict[str, float | None]) -> list[str]:
    values = {
        "quality": cell(0.9612, 0.951, 0.972),
        "log_volume": cell(3.704, 3.651, 3.769),
        "self_bleu_diversity": cell(0.834, 0.812, 0.853),
        "best_of_n": cell(0.996, 0.99, 1.0),
        "duplicate_rate": cell(0.0, 0.0, 0.01),
        "vendi_score": cell(7.77, 7.0, 8.0),
    } | changed
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    labels = {"reward_only": "Reward-only RL", "dqo": "DQO-RL (alpha = 0.7)"}
    summary(console, labels, dict.fromkeys(("base", "reward_only", "dqo"), values), confidence)
    return [row.rstrip() for row in console.file.getvalue().splitlines()]


def test_the_table_shows_each_model_with_its_figures_and_three_intervals():
    title, header, base, reward_only, dqo = table()
    assert title == "Means over the evaluation prompts [95% interval]"
    assert header.split() == ["model", "quality", "log-volume", "1", "-", "self-BLEU", "best", "dupl."]
    figures = "0.96 [0.95, 0.97] 3.70 [3.65, 3.77] 0.83 [0.81, 0.85] 1.00  0.00"
    assert [base, reward_only, dqo] == [f"{name:<14} {figures}" for name in ("base", "Reward-only RL", "DQO-RL")]


@pytest.mark.parametrize(("confidence", "shown"), [(0.9, "90%"), (0.95, "95%"), (0.975, "97.5%"), (0.999, "99.9%")])
def test_the_title_names_the_recipes_confidence(confidence: float, shown: str):
    assert table(confidence)[0] == f"Means over the evaluation prompts [{shown} interval]"


def test_a_figure_without_an_interval_stands_alone_and_one_that_is_not_known_is_na():
    row = table(quality=cell(0.5), log_volume=cell(None), best_of_n=cell(None))[-1]
    assert row.split() == ["DQO-RL", "0.50", "n/a", "0.83", "[0.81,", "0.85]", "n/a", "0.00"]


def test_figures_of_two_digits_are_whole_on_a_terminal_of_80_columns():
    """16 orthogonal responses have a log-volume of 16 log 2 = 11.09."""
    row = table(log_volume=cell(16 * math.log(2), 11.05, 11.12))[-1]
    assert row.split()[1:4] == ["0.96", "[0.95,", "0.97]"]
    assert row.split()[4:7] == ["11.09", "[11.05,", "11.12]"]
    assert row.split()[7:] == ["0.83", "[0.81,", "0.85]", "1.00", "0.00"]
