"""`dqo submit` and `dqo schedule` against a server that keeps Kubeflow's state in memory (tests/kfp_server.py)."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import kfp_server_api as api
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kfp_server import KubeflowServer, run_of, serve, task, wrong_cron

from dqo.errors import DQOError
from dqo.recipe import load
from pipelines import cli, schedule, submit
from pipelines.kubeflow import Access
from pipelines.pipeline import compile_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    monkeypatch.setattr(submit, "_SECONDS", 0.05)
    with serve() as (state, host):
        state.host = host
        yield state


def dqo(monkeypatch, *arguments: object) -> int:
    """The command line as typed; returns its status."""
    monkeypatch.setattr(sys, "argv", ["dqo", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


# --- submit ---


@pytest.mark.slow
def test_a_pipeline_is_uploaded_once_and_run_twice(server, monkeypatch, capsys, tmp_path):
    for _ in range(2):
        assert dqo(monkeypatch, "submit", RECIPE, "--host", server.host, "--mlflow-uri", "http://mlflow:5000") == 0
    compile_recipe(load(RECIPE), tmp_path / "p.yaml")
    (pipeline,) = server.pipelines
    (version,) = server.versions
    digest = hashlib.sha256((tmp_path / "p.yaml").read_bytes()).hexdigest()
    assert version.name == f"quickstart-{digest[:16]}" and pipeline.display_name == "quickstart"
    assert version.pipeline_spec["pipeline_spec"] == next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    assert len(server.runs) == 2
    assert server.runs[0].runtime_config.parameters == {
        "recipe_json": load(RECIPE).to_json(),
        "mlflow_uri": "http://mlflow:5000",
    }
    out = capsys.readouterr().out
    for run in server.runs:
        assert f"{server.host}/#/runs/details/{run.run_id}" in out
    assert out.count("(uploaded)") == 1 and out.count("(there already)") == 1


@pytest.mark.slow
def test_a_changed_recipe_is_another_version_of_the_same_pipeline(server, tmp_path):
    for seed in (1, 2, 3):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | {"seed": seed}))
        assert submit.run(load(tmp_path / "r.yaml"), Access(server.host), start=False) == 0
    assert len(server.pipelines) == 1 and len(server.versions) == 3 and server.runs == []


@pytest.mark.parametrize("meeting", ["/pipelines", "/versions"])
def test_two_that_submit_at_once_leave_one_version(server, meeting: str):
    """Both are told that there is nothing before either makes it."""
    server.meet, server.meeting = threading.Barrier(2), meeting
    recipe, results = load(RECIPE), []
    threads = [
        threading.Thread(target=lambda: results.append(submit.run(recipe, Access(server.host)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0]
    assert len(server.pipelines) == len(server.versions) == 1 and len(server.runs) == 2
    made = "POST /apis/v2beta1/pipelines" + ("/upload_version" if meeting == "/versions" else "")
    assert server.requests.count(made) == 2  # one of them was refused


def test_the_token_comes_from_a_file_or_the_environment(server, monkeypatch, tmp_path):
    server.token = "abc"
    (tmp_path / "token").write_text("abc\n")
    submit.run(load(RECIPE), Access(server.host, tmp_path / "token"))
    monkeypatch.setenv("KFP_TOKEN", "abc")
    submit.run(load(RECIPE), Access(server.host))
    assert len(server.runs) == 2


def test_the_experiment_is_found_by_name(server):
    for name in ("one", "two", "three"):
        server.experiments.append(server._experiment(name, None))
    submit.run(load(RECIPE), Access(server.host, experiment="three"))
    assert server.runs[0].experiment_id == server.experiments[3].experiment_id


@pytest.mark.slow
def test_another_image_is_put_into_every_task(server, monkeypatch, capsys):
    words = ("submit", RECIPE, "--host", server.host, "--no-run", "--image")
    assert dqo(monkeypatch, *words, "registry.example.com/trainer:2") == 0
    (version,) = server.versions
    executors = version.pipeline_spec["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {"registry.example.com/trainer:2"}
    assert server.runs == []


# --- watching ---


def follow(server, monkeypatch, *states: object) -> int:
    server.states = list(states)
    return dqo(monkeypatch, "submit", RECIPE, "--host", server.host, "--watch")


def test_watching_shows_the_stages_and_ends_with_the_run(server, monkeypatch, capsys):
    loop = [
        task("for-loop-1", "RUNNING"),
        task("iteration-item(1)", "RUNNING", 3),
        task("iteration-item(0)", "RUNNING", 4),
    ]
    # The second variant was made first.
    variants = [
        task("dqo-rl", "SUCCEEDED", 3, "iteration-item(1)-3"),
        task("dqo-rl", "RUNNING", 4, "iteration-item(0)-4"),
    ]
    begun = [task("prepare", "SKIPPED", 1), task("dqo-sft", "SUCCEEDED", 2)]
    status = follow(
        server,
        monkeypatch,
        run_of("PENDING"),
        run_of("RUNNING", task("prepare", "RUNNING", 1)),
        run_of("RUNNING", *begun, *loop, *variants),
        run_of("SUCCEEDED", *begun, task("evaluate", "SUCCEEDED", 9), task("register", "SUCCEEDED", 9)),
    )
    lines = capsys.readouterr().out.splitlines()[2:]
    assert status == 0
    first, second = load(RECIPE).variants
    assert (first, second) == ("reward_only", "dqo")
    assert lines[:2] == ["Prepare data", "Prepare data (finished before, reused)"]
    assert "DQO-SFT" in lines and "  DQO-SFT: done in 1 min 15 s" in lines
    assert "  DQO-RL: done in 1 min 15 s" in lines and "RL reward-only" in lines
    assert "  RL reward-only: done in 1 min 15 s" not in lines
    assert lines[-1] == "Run succeeded"


def test_a_failed_run_ends_with_1_and_its_reason(server, monkeypatch, capsys):
    failed = task("dqo-sft", "FAILED", 2, message="OOMKilled")
    assert follow(server, monkeypatch, run_of("FAILED", task("prepare", "SUCCEEDED"), failed)) == 1
    out = capsys.readouterr().out
    assert "  DQO-SFT: failed" in out and "Run failed\n  DQO-SFT: OOMKilled\n" in out


def test_a_failed_preflight_and_exit_handler_are_shown_with_their_reasons(server, monkeypatch, capsys):
    secret = "resources.secrets.mlflow: the Secret 'mlflow-user' does not exist in this namespace"
    tasks = [
        task("root", "FAILED", 0, message=secret),  # a group that repeats what its task says
        task("run", "FAILED", 1, "root-0"),
        task("preflight", "FAILED", 2, "run-1", message=secret),
        task("finish", "FAILED", 3, "root-0"),
    ]
    assert follow(server, monkeypatch, run_of("FAILED", *tasks)) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[2:] == [
        "Preflight",
        "  Preflight: failed",
        "Finish",
        "  Finish: failed",
        "Run failed",
        f"  Preflight: {secret}; Finish: failed; see its log",
    ]


def test_what_a_stage_is_made_of_and_other_tasks_give_reasons_too(server, monkeypatch, capsys):
    """Variants that fail alike are told apart; a message may stand in the history of a task's states alone."""
    driver = task("prepare-driver", "FAILED", 7)
    driver.state_history = [
        api.V2beta1RuntimeStatus(state="RUNNING"),
        api.V2beta1RuntimeStatus(state="FAILED", error=api.GoogleRpcStatus(code=2, message="no such volume")),
    ]
    tasks = [
        driver,
        task("dqo-rl", "FAILED", 3, message="Error (exit code 1)"),
        task("executor", "FAILED", 5, "dqo-rl-4", message="Evicted"),
        task("dqo-rl", "FAILED", 4, message="Error (exit code 1)"),
        task("dqo-sft", "FAILED", 2),
        task("executor", "FAILED", 6, "dqo-sft-2", message="OOMKilled"),
    ]
    assert follow(server, monkeypatch, run_of("FAILED", *tasks)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "  RL reward-only: Error (exit code 1); DQO-RL: Error (exit code 1); DQO-SFT: OOMKilled; "
        "prepare-driver: no such volume; DQO-RL: Evicted"
    )


def test_a_task_that_no_node_takes_is_spoken_of_once(server, monkeypatch, capsys):
    """It may be a part of a stage; one that waits for a moment is not spoken of, and watching goes on."""
    monkeypatch.setattr(submit, "_PENDING", 0.4)
    done = task("prepare", "SUCCEEDED", 1)
    waits = run_of("RUNNING", done, task("dqo-sft", "RUNNING", 2), task("executor", "PENDING", 3, "dqo-sft-2"))
    server.states = [run_of("RUNNING", task("prepare", "PENDING", 1)), run_of("RUNNING", done)]
    server.states += [waits] * 30  # at 0.05 seconds each
    server.states += [run_of("SUCCEEDED", done, task("dqo-sft", "SUCCEEDED", 2))]
    begin = datetime.now()
    assert dqo(monkeypatch, "submit", RECIPE, "--host", server.host, "--watch") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "PENDING" in line]
    assert line.startswith("  DQO-SFT: warning: waits for a node (PENDING since ")
    since = datetime.strptime(line, "  DQO-SFT: warning: waits for a node (PENDING since %Y-%m-%d %H:%M:%S)")
    assert begin.replace(microsecond=0) <= since <= datetime.now()
    assert out.splitlines()[-1] == "Run succeeded"


def test_tasks_that_wait_for_less_than_five_minutes_are_not_spoken_of(server, monkeypatch, capsys):
    assert submit._PENDING == 300
    states = [run_of("RUNNING", task("prepare", "PENDING", 1))] * 5
    assert follow(server, monkeypatch, *states, run_of("SUCCEEDED")) == 0
    assert "PENDING" not in capsys.readouterr().out


@pytest.mark.parametrize("answer", [b"<html>Log in</html>", b"", b"[]", b"{}", b"null"])
def test_watching_ends_where_the_answer_is_not_the_run(server, monkeypatch, capsys, answer: bytes):
    """A proxy whose session is over answers 200 with its page; a model without a run's id is no run either."""

    def before(where: str) -> None:
        if where.startswith("GET /apis/v2beta1/runs/") and server.requests.count(where) == 2:
            server.page = answer

    server.before = before
    assert follow(server, monkeypatch, run_of("RUNNING", task("prepare", "RUNNING"))) == 2
    error = capsys.readouterr().err
    assert "answers with a page instead of the API, often a page to log in" in error and "--token-file" in error
    assert f"The run goes on: {server.host}/#/runs/details/{server.runs[0].run_id}" in error


def test_a_run_that_is_answered_by_a_page_is_not_said_to_be_started(server, monkeypatch, capsys):
    def before(where: str) -> None:
        server.page = b"<html>Log in</html>" if where == "POST /apis/v2beta1/runs" else None

    server.before = before
    assert dqo(monkeypatch, "submit", RECIPE, "--host", server.host) == 2
    told = capsys.readouterr()
    assert "page to log in" in told.err and "Run: " not in told.out


@pytest.mark.parametrize("by", ["status 401", "page"])
@pytest.mark.parametrize("renewed", ["fitting", "other", "same", "gone"])
def test_a_token_that_is_renewed_in_its_file_is_taken(server, monkeypatch, capsys, tmp_path, renewed: str, by: str):
    """Servers say that a token has expired by 401, or by a page to log in."""
    file = tmp_path / "token"
    file.write_text("first")
    server.token = "first"
    server.states = [run_of("RUNNING", task("prepare", "RUNNING"))] * 3 + [run_of("SUCCEEDED")]
    asked: list[int] = []

    def before(where: str) -> None:
        if where.startswith("GET /apis/v2beta1/runs/"):
            asked.append(1)
            expired = len(asked) == 2 or (len(asked) > 2 and renewed != "fitting")
            server.page = b"<html>" if expired and by == "page" else None
        if len(asked) == 2:
            server.token = "second"
            if renewed == "gone":
                file.unlink(missing_ok=True)
            else:
                file.write_text({"fitting": "second", "other": "third", "same": "first"}[renewed])

    server.before = before
    status = dqo(monkeypatch, "submit", RECIPE, "--host", server.host, "--token-file", file, "--watch")
    told = capsys.readouterr()
    if renewed == "fitting":
        assert status == 0 and told.out.endswith("Run succeeded\n") and len(asked) == 5
        return
    assert status == 2 and len(asked) == (3 if renewed == "other" else 2)
    assert ("the token was refused; it may have expired (401" if by == "status 401" else "page to log in") in told.err
    assert (f"; {file} held a new one, which was refused too" in told.err) == (renewed == "other")
    assert "The run goes on: " in told.err and "third" not in told.err


@pytest.mark.slow
def test_ctrl_c_stops_watching_and_not_the_run(server, tmp_path):
    server.states = [run_of("RUNNING", task("prepare", "RUNNING"))]
    command = [sys.executable, "-m", "pipelines.cli", "submit", str(RECIPE), "--host", server.host, "--watch"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    lines = iter(process.stdout.readline, b"")
    assert any(line == b"Prepare data\n" for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read().decode()
    assert process.wait(20) == 130
    assert f"the run goes on: {server.host}/#/runs/details/{server.runs[0].run_id}" in rest
    assert not any(":terminate" in request for request in server.requests)
    assert "Traceback" not in rest


@pytest.mark.slow
def test_a_server_that_is_away_for_a_moment_is_waited_for(server, monkeypatch, capsys):
    server.fail["GET /runs"] = (503, "no healthy upstream")
    timer = threading.Timer(0.5, server.fail.clear)
    timer.start()
    assert follow(server, monkeypatch, run_of("SUCCEEDED")) == 0
    monkeypatch.setattr(submit, "_PATIENCE", 0.3)
    server.fail["GET /runs"] = (503, "no healthy upstream")
    assert follow(server, monkeypatch, run_of("SUCCEEDED")) == 2
    assert "The run goes on: " in capsys.readouterr().err


# --- schedules ---


@pytest.mark.parametrize(
    ("cron", "kubeflow"),
    [
        ("0 2 * * *", "0 0 2 * * *"),
        ("*/15 9-17 1,15 jan-mar mon-fri", "0 */15 9-17 1,15 jan-mar mon-fri"),
        ("30 4 * * 7", "0 30 4 * * 0"),
        ("30 4 * * 5-7", "0 30 4 * * 0,5,6"),
        ("0 0 * jul wed", "0 0 0 * jul wed"),
        ("0 2 * * */2,7", "0 0 2 * * */2,0"),
        ("0 2 1 * *,7", "0 0 2 1 * *,0"),
        ("0 2 * * 7,*/2", "0 0 2 * * 0,2,4,6"),  # a list that begins with no star is no star to cron
        ("0 2 * * 1/2,7", "0 0 2 * * 0,1,3,5"),
        ("0 2 * * 1/2", "0 0 2 * * 0,1,3,5"),
        ("0 2 * * mon,5-7/2", "0 0 2 * * 0,1,5"),
        ("3-3/20 2 * * *", "0 3,23,43 2 * * *"),
    ],
)
def test_five_fields_become_kubeflows_six(cron: str, kubeflow: str):
    assert schedule.to_kubeflow(cron) == kubeflow
    assert wrong_cron(kubeflow) == ""


@pytest.mark.parametrize(
    "line",
    ["0 0 2 * * 7", "0 0 2 * * */2,7", "0 0 2 * * 5-7", "0 0 2 * 0 *", "0 0 2 32 * *", "0 0 24 * * *", "0 60 2 * * *",
     "60 0 2 * * *", "0 0 2 * * 5-1", "0 */0 2 * * *", "0 0 2 L * *", "0 2 * * *"],
)  # fmt: skip
def test_the_test_server_takes_no_line_that_kubeflow_refuses(line: str):
    assert wrong_cron(line)
    with pytest.raises(ValueError):
        schedule.KubeflowCron(line)


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("61 2 * * *", "minute '61': expected 0 to 59"),
        ("0 24 * * *", "hour '24': expected 0 to 23"),
        ("0 2 32 * *", "day-of-month '32': expected 1 to 31"),
        ("0 2 30 2 *", "day-of-month '30'"),
        ("0 2 29 2 */7", "no such day comes in the 5 years that Kubeflow looks ahead"),  # 2032 has the next such Sunday
        ("0 2 * 13 *", "month '13': expected 1 to 12"),
        ("0 2 * * 8", "day-of-week '8': expected 0 to 7"),
        ("0 2 * * * *", "got 6 fields, expected 5"),
        ("@daily", "got 1 fields, expected 5"),
        ("0 2 L * *", "day-of-month 'L': Kubeflow knows no L"),
        ("0 2 * * 5#2", "day-of-week '5#2': Kubeflow knows no L"),
    ],
)
def test_a_wrong_cron_line_names_its_field(cron: str, message: str, server, monkeypatch, capsys):
    assert dqo(monkeypatch, "schedule", RECIPE, "--host", server.host, "--cron", cron) == 2
    assert message in capsys.readouterr().err
    assert server.requests == []


def test_the_next_times_are_those_of_the_zone():
    """The night in which Berlin's clocks go back."""
    now = datetime(2026, 10, 24, 12, tzinfo=UTC)
    lines = schedule.in_words("30 4 * * *", "Europe/Berlin", now)
    assert lines[0] == "  At 04:30 every day, time zone Europe/Berlin. Next:"
    assert [line.split("  (")[0].strip() for line in lines[1:4]] == [
        "Sun 2026-10-25 04:30 CET",
        "Mon 2026-10-26 04:30 CET",
        "Tue 2026-10-27 04:30 CET",
    ]
    with pytest.raises(DQOError, match="no such time zone"):
        schedule.in_words("0 2 * * *", "Mars/Olympus")


# Cron line, then minutes, hours, days, months and days of the week that it means, and whether a day has to be in both.
EVERY_DAY, EVERY_MONTH, EVERY_WEEKDAY = set(range(1, 32)), set(range(1, 13)), set(range(7))
LINES = [
    ("30 2 * * *", {30}, {2}, EVERY_DAY, EVERY_MONTH, EVERY_WEEKDAY, all),
    ("*/20 1-3 * 3,10 sun", {0, 20, 40}, {1, 2, 3}, EVERY_DAY, {3, 10}, {0}, all),
    ("30 2 13 * 5", {30}, {2}, {13}, EVERY_MONTH, {5}, any),
    ("30 2 */10 * 1", {30}, {2}, {1, 11, 21, 31}, EVERY_MONTH, {1}, all),
    ("30 2 1-7 * */2,7", {30}, {2}, {1, 2, 3, 4, 5, 6, 7}, EVERY_MONTH, {0, 2, 4, 6}, all),
    ("0 0 31 1,3,4 1/2,7", {0}, {0}, {31}, {1, 3, 4}, {0, 1, 3, 5}, any),
    ("59 23 28-31 2,4,10 *", {59}, {23}, {28, 29, 30, 31}, {2, 4, 10}, EVERY_WEEKDAY, all),
]


@pytest.mark.parametrize("start", ["2026-03-27T11:59:30", "2026-10-23T23:30:00", "2027-12-30T00:00:00"])
@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_the_next_times_are_all_minutes_whose_clock_fits(line: tuple, start: str):
    """Minute by minute through the nights in which Berlin's clocks change, and through months and a leap year."""
    cron, minutes, hours, days, months, weekdays, rule = line
    berlin = ZoneInfo("Europe/Berlin")
    begin = datetime.fromisoformat(start).replace(tzinfo=UTC)
    found, minute = [], begin.replace(second=0)
    while len(found) < 8 and minute < begin + timedelta(days=200):
        minute += timedelta(minutes=1)
        clock = minute.astimezone(berlin)
        day_fits = rule((clock.day in days, (clock.weekday() + 1) % 7 in weekdays))
        if clock.minute in minutes and clock.hour in hours and day_fits and clock.month in months:
            found.append(minute)
    times = schedule.KubeflowCron(schedule.to_kubeflow(cron))
    moment, told = begin, []
    for _ in found:
        moment = times.next(moment, berlin)
        told.append(moment.astimezone(UTC))
    assert told == found and len(found) >= 2


@pytest.mark.parametrize(
    ("zone", "start", "line", "expected"),
    [
        ("Europe/Berlin", "2026-03-27", "0 30 2 * * *", ["03-27 02:30 CET", "03-28 02:30 CET", "03-30 02:30 CEST"]),
        ("Europe/Berlin", "2026-10-24", "0 30 2 * * *", ["10-24 02:30 CEST", "10-25 02:30 CEST", "10-25 02:30 CET",
                                                         "10-26 02:30 CET"]),
        ("America/New_York", "2026-10-31", "0 0 1 * * 0", ["11-01 01:00 EDT", "11-01 01:00 EST", "11-08 01:00 EST"]),
        ("Australia/Lord_Howe", "2026-04-04", "0 45 1 * * *", ["04-05 01:45 +11", "04-05 01:45 +1030",
                                                               "04-06 01:45 +1030"]),
        # Clocks that change at midnight: a Friday taken for Thursday, a Sunday missed.
        ("Africa/Cairo", "2026-04-22", "0 30 2 * * 4", ["04-23 02:30 EET", "04-24 02:30 EEST", "04-30 02:30 EEST"]),
        ("America/Havana", "2026-03-05", "0 30 2 * * 0", ["03-15 02:30 CDT", "03-22 02:30 CDT"]),
        ("UTC", "2026-01-01", "0 0 2 10 * 1", ["01-05 02:00 UTC", "01-10 02:00 UTC", "01-12 02:00 UTC"]),
        ("UTC", "2026-01-01", "0 0 2 */10 * 1", ["05-11 02:00 UTC", "06-01 02:00 UTC", "08-31 02:00 UTC"]),
        ("UTC", "2026-01-01", "0 0 2 29 2 */7", []),
    ],
)  # fmt: skip
def test_the_next_times_are_those_of_the_library_that_kubeflow_uses(
    zone: str, start: str, line: str, expected: list[str]
):
    """Printed by robfig/cron 1.2.0 itself, from midnight UTC on."""
    moment = datetime.fromisoformat(start).replace(tzinfo=UTC)
    times = []
    for _ in range(max(len(expected), 1)):
        moment = schedule.KubeflowCron(line).next(moment, ZoneInfo(zone))
        times += [f"{moment:%m-%d %H:%M %Z}"] if moment else []
    assert times == expected


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-03-28T12:00", ["Mon 2026-03-30 02:30 CEST", "Tue 2026-03-31 02:30 CEST", "Wed 2026-04-01 02:30 CEST"]),
        ("2026-10-24T12:00", ["Sun 2026-10-25 02:30 CEST", "Sun 2026-10-25 02:30 CET", "Mon 2026-10-26 02:30 CET"]),
    ],
)
def test_a_night_without_the_hour_is_left_out_and_one_with_two_is_told_twice(now: str, expected: list[str]):
    lines = schedule.in_words("30 2 * * *", "Europe/Berlin", datetime.fromisoformat(now).replace(tzinfo=UTC))
    assert [line.split("  (")[0].strip() for line in lines[1:4]] == expected


def test_a_schedule_is_on_the_server_in_its_final_state_from_the_first(server, capsys):
    """There is no second request whose failure would leave a schedule that looks paused."""
    server.fail["POST /recurringruns/"] = (503, "no healthy upstream")  # neither enabled nor disabled
    assert schedule.run(load(RECIPE), Access(server.host), "0 2 * * 1/2,7") == 0
    (made,) = server.schedules
    assert made.status == "ENABLED" and made.trigger.cron_schedule.cron == "0 0 2 * * 0,1,3,5"
    server.fail.clear()
    schedule.change(Access(server.host), "quickstart", "pause")
    server.fail["POST /recurringruns/"] = (503, "no healthy upstream")
    assert schedule.run(load(RECIPE), Access(server.host), "0 3 * * *") == 0
    (changed,) = server.schedules
    assert changed.status == "DISABLED" and changed.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert schedule.run(load(RECIPE), Access(server.host), "0 3 * * *") == 0
    assert "is as it was (paused; --resume starts it)" in capsys.readouterr().out and server.schedules == [changed]


def test_a_replacement_that_ended_half_way_is_finished_by_a_repeat(server, capsys):
    schedule.run(load(RECIPE), Access(server.host), "0 2 * * *")
    server.fail["POST /recurringruns"] = (500, "database is locked")
    with pytest.raises(DQOError, match="cannot make a schedule"):
        schedule.run(load(RECIPE), Access(server.host), "0 3 * * *")
    assert [entry.trigger.cron_schedule.cron for entry in server.schedules] == ["0 0 2 * * *"]  # as it was
    server.fail = {"DELETE /recurringruns": (500, "database is locked")}
    with pytest.raises(DQOError, match="another of that name may still start runs beside it: repeat the command"):
        schedule.run(load(RECIPE), Access(server.host), "0 3 * * *")
    server.fail.clear()
    assert schedule.run(load(RECIPE), Access(server.host), "0 3 * * *") == 0
    (last,) = server.schedules
    assert last.status == "ENABLED" and last.trigger.cron_schedule.cron == "0 0 3 * * *"


@pytest.mark.slow
def test_a_schedule_is_made_kept_changed_paused_and_deleted(server, monkeypatch, capsys):
    def say(*arguments: object) -> str:
        assert dqo(monkeypatch, "schedule", *arguments, "--host", server.host) == 0
        return capsys.readouterr().out

    out = say(RECIPE, "--cron", "0 2 * * *", "--name", "nightly")
    assert "Schedule nightly made" in out and "At 02:00 every day, time zone UTC" in out and out.count("02:00 UTC") == 3
    (made,) = server.schedules
    assert (made.status, made.no_catchup, made.max_concurrency) == ("ENABLED", True, "1")
    assert made.trigger.cron_schedule.cron == "0 0 2 * * *"
    assert made.runtime_config.parameters["skip_unchanged"] is True
    assert "is as it was" in say(RECIPE, "--cron", "0 2 * * *", "--name", "nightly")
    assert server.schedules == [made]
    assert "nightly changed" in say(RECIPE, "--cron", "0 3 * * *", "--name", "nightly")
    (changed,) = server.schedules
    assert changed.recurring_run_id != made.recurring_run_id and changed.status == "ENABLED"
    assert changed.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert "paused" in say("--name", "nightly", "--pause")
    assert changed.status == "DISABLED"
    assert "paused as before" in say(RECIPE, "--cron", "0 4 * * *", "--name", "nightly")
    assert server.schedules[0].status == "DISABLED" and len(server.schedules) == 1
    assert "nightly  paused  0 0 4 * * *" in say("--list")
    say("--name", "nightly", "--resume")
    assert server.schedules[0].status == "ENABLED"
    for name in ("a", "b"):
        say(RECIPE, "--cron", "0 4 * * *", "--name", name)
    assert len(say("--list").splitlines()) == 3
    say("--name", "nightly", "--delete")
    assert sorted(entry.display_name for entry in server.schedules) == ["a", "b"]
    assert dqo(monkeypatch, "schedule", "--name", "nightly", "--delete", "--host", server.host) == 2
    assert "there are: a, b" in capsys.readouterr().err


def test_two_that_make_one_schedule_at_once_leave_one(server):
    server.meet, server.meeting = threading.Barrier(2), "/recurringruns"
    recipe, results = load(RECIPE), []
    threads = [
        threading.Thread(target=lambda cron=cron: results.append(schedule.run(recipe, Access(server.host), cron)))
        for cron in ("0 1 * * *", "0 2 * * *")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0] and len(server.schedules) == 1 and server.schedules[0].status == "ENABLED"


def test_a_schedule_with_preparation_from_the_cache_is_refused(server, tmp_path):
    content = yaml.safe_load(RECIPE.read_text()) | {"resources": {"caching": {"prepare": True}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DQOError, match=r"resources\.caching\.prepare"):
        schedule.run(load(tmp_path / "r.yaml"), Access(server.host), "0 2 * * *")


# --- what goes wrong ---


def refused(state: KubeflowServer, **options: object) -> str:
    with pytest.raises(DQOError) as error:
        submit.run(load(RECIPE), Access(state.host, **options))
    assert state.runs == []
    return str(error.value)


def test_an_expired_token_a_forbidden_namespace_and_an_unknown_experiment_are_named(server, tmp_path):
    server.token = "new"
    (tmp_path / "token").write_text("old")
    assert "the token is missing (401" in refused(server)
    assert "may have expired (401" in refused(server, token_file=tmp_path / "token")
    server.token, server.namespaces = None, ["mine"]
    assert "expected --namespace" in refused(server)
    assert "in namespace 'yours': not allowed (403" in refused(server, namespace="yours")
    assert "--experiment 'x': no such experiment in Kubeflow; there are: Default" in refused(
        server, namespace="mine", experiment="x"
    )


def test_an_old_server_a_page_to_log_in_and_no_server_are_told_apart(server):
    server.page = b"<html>Log in</html>"
    assert "answers with a page instead of the API" in refused(server)
    server.page, server.old = None, True
    assert "has no API v2beta1 (404" in refused(server)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.host = f"http://127.0.0.1:{free.getsockname()[1]}"
        begin = time.monotonic()
        assert "does not answer" in refused(server) and time.monotonic() - begin < 10


@pytest.mark.parametrize("host", ["kubeflow", "ftp://kubeflow", "http://", "http://h:99999", "http://user:secret@h"])
def test_an_address_that_is_none_is_refused_without_its_password(host: str):
    with pytest.raises(DQOError, match="--host") as error:
        submit.run(load(RECIPE), Access(host))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:secret@mlflow",
        "HTTPS://secret@mlflow:5000/x",
        "postgresql+psycopg://u:secret@db/mlflow",
        "//u:secret@m",
    ],
)
@pytest.mark.parametrize("command", [("submit",), ("schedule", "--cron", "0 2 * * *")], ids=["submit", "schedule"])
def test_a_password_in_mlflows_address_is_refused_and_not_repeated(
    server, monkeypatch, capsys, command: tuple[str, ...], uri: str
):
    name, *options = command
    assert dqo(monkeypatch, name, RECIPE, *options, "--host", server.host, "--mlflow-uri", uri) == 2
    told = capsys.readouterr()
    assert "--mlflow-uri: holds a user name or password" in told.err and "MLFLOW_TRACKING_PASSWORD" in told.err
    assert "secret" not in told.err + told.out and server.requests == []


def test_an_at_sign_behind_the_host_is_no_password(server):
    submit.run(load(RECIPE), Access(server.host), "http://mlflow:5000/a@b")
    assert server.runs[0].runtime_config.parameters["mlflow_uri"] == "http://mlflow:5000/a@b"
    with pytest.raises(DQOError, match="--mlflow-uri: not an address"):
        submit.run(load(RECIPE), Access(server.host), "http://[mlflow")


def test_a_refused_upload_starts_no_run(server):
    server.fail["POST /pipelines/upload_version"] = (400, "Invalid input error: invalid pipeline spec")
    assert "cannot upload a pipeline version (400: Invalid input error: invalid pipeline spec)" in refused(server)


def test_bad_token_and_certificate_files_are_named(server, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "two").write_text("Bearer abc")
    assert "empty: is empty" in refused(server, token_file=tmp_path / "empty")
    assert "expected one token" in refused(server, token_file=tmp_path / "two")
    assert "cannot be read" in refused(server, token_file=tmp_path / "none")
    assert "no such file" in refused(server, ca_file=tmp_path / "none")


def certificate(path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubeflow")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(pem))
    return path


def test_a_self_signed_certificate_needs_ca_file(tmp_path, monkeypatch):
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    with serve(certificate(tmp_path / "server.pem")) as (state, host):
        state.host = host
        assert "is not trusted" in refused(state) and "--ca-file" in refused(state)
        (tmp_path / "junk.pem").write_text("junk")
        assert "not a certificate" in refused(state, ca_file=tmp_path / "junk.pem")
        submit.run(load(RECIPE), Access(host, ca_file=tmp_path / "server.pem"))
        assert len(state.runs) == 1
