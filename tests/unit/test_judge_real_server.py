"""A judge behind a real server with a real language model: `transformers serve` and the bundled SmolLM2.

The model is far too small to judge, so nothing is asserted of which response it prefers: what is tested is that a
server which was written by others is asked, read, kept and replayed as the scripted ones are. It takes a schema and
ignores it. What it is asked passes through a recording server, which can also refuse schemas, as others do.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from judge_server import Reply, serving

from dqo.bundled import locate
from dqo.errors import DQOError
from dqo.judges import Pair, build
from dqo.judges.audit import audit
from dqo.judges.labelled import LabelledPair, LabelledSet
from dqo.judges.llm import PointwiseLLM
from dqo.judges.prompt import load_prompt
from dqo.recipe import JudgeAudit

# Short, for a processor: the shipped prompt is several times as long. The model answers this one with an object.
SHORT = {
    "name": "short",
    "version": 1,
    "mode": "pairwise",
    "system": "",
    "user": "Write a JSON object with the keys reasons and verdict. "
    'Example: {"reasons": "correct", "verdict": "A"}\n{{ question }}\n{{ response_a }}\n{{ response_b }}',
    "reminder": "Reply with the JSON alone.",
}
SCORES = SHORT | {
    "mode": "pointwise",
    "anchors": {1: "bad", 2: "good"},
    "user": "{{ question }}\n{{ response }}\nGive a score.",
}
PAIR = LabelledPair("sum", "What is 2 + 2?", "4", "5", "A")


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[str]:
    """`transformers serve` on a free port of loopback; the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 300
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_real_server_with_a_real_model_is_asked_read_kept_and_replayed(tmp_path: Path):
    model = locate("bundled:smollm2-135m-instruct").load
    (tmp_path / "short.yaml").write_text(json.dumps(SHORT))
    (tmp_path / "scores.yaml").write_text(json.dumps(SCORES))
    scores = str(tmp_path / "scores.yaml")
    labelled, demands = LabelledSet("one", "0" * 12, [PAIR]), JudgeAudit()
    asked = {"model": model, "prompt": str(tmp_path / "short.yaml"), "max_concurrency": 1, "timeout": 300}
    statuses: list[int] = []
    refuses_schemas = False

    with transformers_serve(model, tmp_path / "log") as address, httpx2.Client(timeout=300, trust_env=False) as http:

        def passed_on(_: int, body: dict[str, Any]) -> Reply:
            if refuses_schemas and "response_format" in body:
                return Reply(400, b'{"error": "response_format is not supported"}')
            answered = http.post(f"{address}/chat/completions", json=body)
            statuses.append(answered.status_code)
            return Reply(answered.status_code, answered.content)

        with serving(passed_on) as between:
            settings = between.settings(tmp_path / "cache", max_tokens=32, **asked)

            # Every request is answered, with the schema that the server takes and ignores.
            first = audit(build(settings), labelled, demands)
            assert set(statuses) == {200} and len(statuses) == first.requests == between.count
            assert all(body["response_format"]["type"] == "json_schema" for body in between.bodies)
            # Two orders, two repeats, and once more for each answer that could not be read.
            assert 4 <= first.requests < 8 and first.measures.missing == 0
            assert first.measures.invalid_rate < 1.0, first.pairs  # some are read, without help from a schema
            assert first.measures.repeat_consistency == 1.0  # greedy: what is asked again is answered the same
            assert not first.passed  # one pair says nothing of injections, whatever the model thinks of it

            # A server that refuses the schema is asked once with it, then without, and is read the same.
            refuses_schemas, count = True, between.count
            other = settings.model_copy(update={"cache": str(tmp_path / "other")})
            (plain,) = build(other).compare([PAIR.pair])
            sent = between.bodies[count:]
            assert ["response_format" in body for body in sent] == [True] + [False] * (len(sent) - 1)
            assert plain.orders == first.pairs[0]["repeats"][0]["orders"]
            refuses_schemas = False

            # Cut off before an object can end, nothing is readable: asked once more each, then invalid and never 0.
            count = between.count
            short = settings.model_copy(update={"max_tokens": 3})
            (unread,) = build(short).compare([PAIR.pair])
            assert unread.orders == ("invalid", "invalid") and unread.verdict == "invalid" and all(unread.reasons)
            reminded = [body["messages"][-1]["content"].endswith(SHORT["reminder"]) for body in between.bodies[count:]]
            assert reminded == [False, False, True, True]
            count = between.count
            scorer = PointwiseLLM(short.model_copy(update={"prompt": scores}), load_prompt(scores))
            (score,) = scorer.score([PAIR.a], [PAIR.pair.row])
            assert (score.value, score.status) == (None, "invalid") and between.count == count + 2

            # Its own refusal is told in its own words.
            with pytest.raises(DQOError, match=r"refused the first 3 requests: 400: .*Server is pinned to"):
                build(settings.model_copy(update={"model": "no-such"})).compare(
                    [PAIR.pair, Pair(PAIR.pair.row, "3", "4")]
                )
            total = between.count

    # Both servers are gone. What was read is known, and nothing is sent.
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{settings.endpoint}/models", trust_env=False)
    found = audit(build(settings), labelled, demands)
    assert (found.requests, found.measures, found.pairs) == (0, first.measures, first.pairs)
    assert between.count == total
    # What could not be read, or was never asked, is missing.
    assert build(short).compare([PAIR.pair])[0].verdict == "missing"
    assert build(settings).compare([Pair({"prompt": [{"role": "user", "content": "New?"}]}, "a", "b")])[0].verdict == (
        "missing"
    )
