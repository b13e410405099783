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

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kfp_server import KubeflowServer, run_of, serve, task

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
    ],
)
def test_five_fields_become_kubeflows_six(cron: str, kubeflow: str):
    if len(cron.split()) == 4:
        cron = f"0 {cron}"
    assert schedule.to_kubeflow(cron) == kubeflow


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("61 2 * * *", "minute '61': expected 0 to 59"),
        ("0 24 * * *", "hour '24': expected 0 to 23"),
        ("0 2 32 * *", "day-of-month '32': expected 1 to 31"),
        ("0 2 30 2 *", "day-of-month '30'"),
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
    assert [line.strip()[:25] for line in lines[1:4]] == [
        "Sun 2026-10-25 04:30 CET",
        "Mon 2026-10-26 04:30 CET",
        "Tue 2026-10-27 04:30 CET",
    ] or all("04:30 CET" in line for line in lines[1:4])
    with pytest.raises(DQOError, match="no such time zone"):
        schedule.in_words("0 2 * * *", "Mars/Olympus")


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
