"""The recipe: what is refused and in which words, what is filled in, what identifies it."""

import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from dqo.errors import DQOError
from dqo.recipe import Defences, Distributed, Method, Recipe, json_schema, load, load_judge, parse

ACCELERATE = Path(__file__).parents[2] / "dqo" / "accelerate"
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "experiments")


def test_each_strategy_has_a_recipe_and_settings_of_accelerate():
    split = {load(path).distributed.strategy: path.stem for path in RECIPES}
    assert split.keys() == set(get_args(Distributed.model_fields["strategy"].annotation))
    assert (split["fsdp"], split["zero2"], split["zero3"]) == ("gsm8k", "dolly", "commongen-full")
    for path in RECIPES:
        recipe = load(path)
        # What is split is split among several, and its settings are those that `accelerate launch` takes.
        assert recipe.distributed.strategy == "ddp" or recipe.processes > 1
        settings = yaml.safe_load((ACCELERATE / f"{recipe.distributed.strategy}.yaml").read_text())
        stage = settings.get("deepspeed_config", {}).get("zero_stage")
        assert stage == {"zero2": 2, "zero3": 3}.get(recipe.distributed.strategy)


def refusal(text: str) -> str:
    with pytest.raises(DQOError) as caught:
        parse(text, "my.yaml")
    return str(caught.value)


def line_of(message: str, field: str) -> str:
    (line,) = [line for line in message.splitlines() if line.strip().startswith(f"{field}:")]
    return line


# --- refusals: file, field, value, expectation ---


def test_unknown_key_names_file_field_value_and_the_keys_beside_it():
    message = refusal("name: a\nmethod: {alhpa: 3.5}")
    assert message.startswith("my.yaml: 1 error in the recipe\n")
    line = line_of(message, "method.alhpa")
    assert "unknown key" in line and "3.5" in line
    allowed = line.split("expected one of: ")[1].split(", ")
    assert allowed == [
        "alpha", "k", "advantage", "quality_scale", "score", "combine", "distinct_threshold",
        "kernel_scale", "defences", "baselines",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "field", "one_allowed"),
    [
        ("name: a\nmetod: {}", "metod", "method"),
        ("name: a\npolicy: {lora: {rank: 4}}", "policy.lora.rank", "target_modules"),
        ("name: a\nrl: {sampling: {topp: 1}}", "rl.sampling.topp", "top_p"),
        ("name: a\nrl: {rollout: {engin: vllm}}", "rl.rollout.engin", "engine"),
        ("name: a\nsft: {beta: 0.1}", "sft.beta", "learning_rate"),
    ],
)
def test_unknown_key_is_found_at_every_depth(text: str, field: str, one_allowed: str):
    allowed = line_of(refusal(text), field).split("expected one of: ")[1].split(", ")
    assert one_allowed in allowed
    assert field.split(".")[-1] not in allowed


@pytest.mark.parametrize(
    ("text", "field", "value", "expected"),
    [
        ("name: a\nmethod: {k: 1}", "method.k", "got 1;", "greater than or equal to 2"),
        ("name: a\nmethod: {k: 2.5}", "method.k", "got 2.5;", "valid integer"),
        ("name: a\nmethod: {k: eight}", "method.k", "got 'eight';", "valid integer"),
        ("name: a\nmethod: {alpha: -1}", "method.alpha", "got -1;", "greater than or equal to 0"),
        ("name: a\nmethod: {alpha: .nan}", "method.alpha", "got nan;", "finite number"),
        ("name: a\nrl: {learning_rate: 1e999}", "rl.learning_rate", "got inf;", "finite number"),
        ("name: a\nmethod: {advantage: centered}", "method.advantage", "got 'centered';", "'centred'"),
        ("name: a\nmethod: 5", "method", "got 5;", "valid dictionary"),
        ("name: a\nmethod:", "method", "got None;", "valid dictionary"),
        ("name: a\nrl: {steps: 0}", "rl.steps", "got 0;", "greater than or equal to 1"),
        ("name: a\nrl: {sampling: {temperature: 0}}", "rl.sampling.temperature", "got 0;", "greater than 0"),
        ("name: a\nrl: {sampling: {top_p: 1.1}}", "rl.sampling.top_p", "got 1.1;", "less than or equal to 1"),
        ("name: a\ndata: {eval_fraction: 1}", "data.eval_fraction", "got 1;", "less than 1"),
        ("name: a\nseed: -1", "seed", "got -1;", "greater than or equal to 0"),
        ("name: a\ntask: poem", "task", "got 'poem';", "expected one of: story"),
        ("name: My Run", "name", "got 'My Run';", "match pattern"),
        ("name: 7", "name", "got 7;", "valid string"),
        ("name: a\nregistry: {name: a/b}", "registry.name", "got 'a/b';", "match pattern"),
        ("name: a\nresources: {memory: 8GB}", "resources.memory", "got '8GB';", "match pattern"),
        ("name: a\ngate: {more_diverse_on: []}", "gate.more_diverse_on", "got [];", "at least 1 item"),
    ],
)
def test_wrong_value_names_field_value_and_expectation(text: str, field: str, value: str, expected: str):
    line = line_of(refusal(text), field)
    assert value in line
    assert expected in line


def test_missing_name_is_said():
    assert line_of(refusal("task: story"), "name") == "  name: missing; a value is required"


def test_every_error_is_reported_at_once():
    message = refusal("task: poem\nmethod: {k: 1, alhpa: 2}\nrl: {steps: none}\nsampling: {}")
    assert message.startswith("my.yaml: 6 errors in the recipe\n")
    assert {line.split(":")[0].strip() for line in message.splitlines()[1:]} == {
        "name",
        "task",
        "method.k",
        "method.alhpa",
        "rl.steps",
        "sampling",
    }


# --- sections that do not fit one another ---


def test_gate_against_a_baseline_that_is_not_trained():
    message = refusal("name: a\nmethod: {baselines: []}")
    assert "  gate.against: got 'reward_only'" in message and "method.baselines" in message
    recipe = parse("name: a\nmethod: {baselines: []}\ngate: {against: sft}")
    assert recipe.model_names == ["base", "sft", "dqo"]


JUDGED = "judge: {endpoint: 'http://h/v1', model: m}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gate: {judge: {}}", "gate.judge: asks for a judge, and the recipe names none"),
        (JUDGED + "gate: {judge: {min_win_rate: 1}}", "gate.judge.min_win_rate: got 1; "),
        (JUDGED + "gate: {judge: {min_win_rate: -0.1}}", "gate.judge.min_win_rate: got -0.1; "),
        (JUDGED + "gate: {judge: {decided_by: high}}", "gate.judge.decided_by: got 'high'"),
        (JUDGED + "gate: {judge: {}}\nevaluation: {prompts: 1}", "'apart', gate.judge.decided_by 'low'"),
        (JUDGED.replace("m}", "m, responses: 9}"), "judge.responses: got 9; expected at most evaluation.n = 8"),
        ("gate: {diversity_needed: any}", "gate.diversity_needed: got 'any' with gate.diversity_test 'apart'"),
        ("gate: {diversity_needed: any, diversity_test: paired}", "with gate.diversity_test 'paired'"),
        ("gate: {quality_test: non_inferior}\nevaluation: {prompts: 1}", "'apart', gate.quality_test 'non_inferior'"),
        ("evaluation: {prompts: 1}", "no interval can be made; expected 2 or more for gate.diversity_test 'apart'"),
        ("gate: {max_length_change: 0}", "gate.max_length_change: got 0; "),
        ("gate: {max_truncation_increase: 2}", "gate.max_truncation_increase: got 2; "),
        # Five prompts: the smallest p-value of swapped sides is 2/32, six: 2/64, twice that for the better of two.
        ("gate: {diversity_test: paired}\nevaluation: {prompts: 5}", "over 5 prompts no p-value is below 0.062"),
        ("gate: {diversity_test: holm}\nevaluation: {prompts: 6}", "6 prompts and 2 metrics no p-value is below 0.062"),
        ("gate: {diversity_test: paired}\nevaluation: {confidence: 0.99995}", "evaluation.confidence asks for 5e-05"),
    ],
)  # fmt: skip
def test_a_gate_that_can_never_hold_is_refused(text: str, problem: str):
    message = refusal(f"name: a\n{text}")
    assert problem in message and message.startswith("my.yaml: 1 error in the recipe\n")


REWARDED = "judge: {reward: {model: org/other}}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("judge: {}", "judge: endpoint and model missing; expected endpoint and model of a language model, or reward"),
        ("judge: {endpoint: 'http://h/v1'}", "judge: model missing; "),
        ("judge: {reward: {}}", "judge.reward.model: missing"),
        (REWARDED.replace("r}}", "r, margin: -1}}"), "judge.reward.margin: got -1"),
        (REWARDED.replace("r}}", "r, squash: true}}"), "judge.reward.squash: "),
        (REWARDED.replace("}}", "}, model: m}"), "judge: model 'm' is of a language model only, got reward as well"),
        (REWARDED.replace("}}", "}, max_requests: 9}"), "judge: max_requests 9 is of a language model only"),
        (
            "reward: {kind: model, model: org/other}\n" + REWARDED,
            "judge.reward.model: got 'org/other', the model whose",
        ),
    ],
)
def test_a_judge_is_a_language_model_or_another_reward_model(text: str, problem: str):
    message = refusal(f"name: a\n{text}")
    assert problem in message and message.startswith("my.yaml: 1 error in the recipe\n")


def test_the_models_of_a_run_are_those_of_every_section():
    recipe = parse("name: a\nreward: {kind: model, model: org/one, revision: abc}\n" + REWARDED)
    assert recipe.models[2:] == [("org/one", "abc"), ("org/other", None)]
    assert [name for name, _ in recipe.models[:2]] == [recipe.policy.model, recipe.encoder.model]
    assert parse(recipe.to_json()) == recipe
    assert len(parse("name: a\n" + JUDGED).models) == 2  # the language model is the server's


def test_a_file_with_the_judge_alone_may_have_a_mistake_in_it(tmp_path):
    for text, said in (
        ("reward: {model: org/r}\nrespones: 1\n", "judge.respones: "),
        ("endpoint: http://h/v1\nmodle: m\n", "judge.modle: "),
    ):
        (tmp_path / "judge.yaml").write_text(text)
        with pytest.raises(DQOError, match=re.escape(said)):
            load_judge(tmp_path / "judge.yaml")
    (tmp_path / "judge.yaml").write_text("reward: {model: org/r}\n")
    assert load_judge(tmp_path / "judge.yaml").name == "org/r"


@pytest.mark.parametrize(
    "text",
    [
        "gate: {diversity_test: paired}\nevaluation: {prompts: 6}",
        "gate: {diversity_test: holm}\nevaluation: {prompts: 7}",
        "gate: {diversity_test: holm, diversity_needed: any, more_diverse_on: [log_volume]}\nevaluation: {prompts: 6}",
        JUDGED + "gate: {judge: {decided_by: mean, min_win_rate: 0}}\nevaluation: {prompts: 2}",
        JUDGED + "evaluation: {n: 2}",
    ],
)
def test_a_gate_that_can_hold_is_taken(text: str):
    parse(f"name: a\n{text}")


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_micro_batch_must_divide_the_step(stage: str):
    k = 2 if stage == "sft" else 6  # SFT without rollouts holds two rows a prompt, whatever the group size
    message = refusal(f"name: a\nmethod: {{k: 6}}\n{stage}: {{prompts_per_step: 2, micro_batch: 5}}")
    assert f"  {stage}.micro_batch: got 5; expected a divisor of the {2 * k} sequences" in message
    for divisor in (1, 4, 2 * k):
        parse(f"name: a\nmethod: {{k: 6}}\n{stage}: {{prompts_per_step: 2, micro_batch: {divisor}}}")


def test_sft_with_rollouts_holds_whole_groups():
    """Three prompts are 6 rows without rollouts and 24 with them, so 8 divides only the second."""
    text = "name: a\nmethod: {{k: 8}}\nsft: {{prompts_per_step: 3, micro_batch: 8, alpha: {alpha}}}"
    assert "sft.micro_batch: got 8; expected a divisor of the 6 sequences" in refusal(text.format(alpha=0))
    parse(text.format(alpha=1))


def test_every_misfit_of_sections_is_reported_at_once():
    message = refusal(
        "name: a\nmethod: {baselines: [], k: 4}\nrl: {prompts_per_step: 2, micro_batch: 3}\n"
        "resources: {accelerator_count: 2}"
    )
    assert message.startswith("my.yaml: 3 errors in the recipe\n")
    fields = [line.split(":")[0].strip() for line in message.splitlines()[1:]]
    assert fields == ["gate.against", "resources.accelerator_count", "rl.micro_batch"]


# --- several processes ---


@pytest.mark.parametrize(
    ("text", "processes"),
    [
        ("", 1),
        ("distributed: {processes: 4}", 4),
        ("distributed: {nodes: 2, processes: 4}\nresources: {workspace_claim: w}", 8),
        ("distributed: {nodes: 2}\nresources: {workspace_claim: w, accelerator: g, accelerator_count: 2}", 4),
        ("resources: {accelerator: nvidia.com/gpu}", 1),
        ("resources: {accelerator: nvidia.com/gpu, accelerator_count: 4}", 4),
        ("resources: {accelerator: nvidia.com/gpu, accelerator_count: 4}\ndistributed: {processes: 4}", 4),
    ],
)
def test_processes_follow_the_accelerators(text: str, processes: int):
    recipe = parse(f"name: a\n{text}")
    assert recipe.processes == processes
    assert recipe.layout == {"processes": processes, "strategy": "ddp"}


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("resources: {accelerator_count: 2}", "resources.accelerator_count", "got 2 without resources.accelerator"),
        (
            "resources: {accelerator: nvidia.com/gpu, accelerator_count: 4}\ndistributed: {processes: 2}",
            "distributed.processes",
            "got 2 with resources.accelerator_count 4",
        ),
        (
            "distributed: {nodes: 2}\nresources: {workspace_claim: w}",
            "distributed.nodes",
            "got 2 with neither accelerators nor a number of processes",
        ),
        (
            "distributed: {nodes: 3, processes: 1}\nsft: {prompts_per_step: 3}\nrl: {prompts_per_step: 3}",
            "distributed.nodes",
            "got 3 without resources.workspace_claim",
        ),
        (
            "distributed: {nodes: 3, processes: 1}\nresources: {workspace_claim: w}\nsft: {prompts_per_step: 3}",
            "rl.prompts_per_step",
            "divide over 3 processes",
        ),
        (
            "distributed: {nodes: 2}\nresources: {workspace_claim: w, accelerator: g, accelerator_count: 2}\n"
            "rl: {rollout: {engine: vllm, tensor_parallel_size: 4}}",
            "rl.rollout.tensor_parallel_size",
            "expected a divisor of the 2 training processes of a node",
        ),
        ("distributed: {nodes: 0}", "distributed.nodes", "greater than or equal to 1"),
        ("distributed: {processes: 0}", "distributed.processes", "greater than or equal to 1"),
        ("distributed: {strategy: fsdp}", "distributed.strategy", "got 'fsdp' with one process"),
        ("distributed: {processes: 2, strategy: zero1}", "distributed.strategy", "'zero2' or 'zero3'"),
        (
            "distributed: {processes: 2, strategy: zero2}\nsft: {alpha: 1}\nrl: {sampling: {temperature: 0.7}}",
            "rl.sampling.temperature",
            "got 0.7 with sft.alpha > 0",
        ),
        ("distributed: {processes: 2, strategy: zero3}", "distributed.strategy", "ZeRO-3 cannot gather float32"),
        ("distributed: {processes: 3}\nsft: {prompts_per_step: 3}", "rl.prompts_per_step", "whose 32 sequences"),
        ("distributed: {processes: 3}\nrl: {prompts_per_step: 3}", "sft.prompts_per_step", "whose 32 sequences"),
        ("distributed: {processes: 2}\nrl: {micro_batch: 32}", "rl.micro_batch", "divisor of the 16 sequences"),
        ("distributed: {processes: 2}\nsft: {micro_batch: 32}", "sft.micro_batch", "in each of 2 processes"),
    ],
)
def test_processes_and_strategies_that_do_not_fit(text: str, field: str, words: str):
    assert words in line_of(refusal(f"name: a\n{text}"), field)


@pytest.mark.parametrize(
    "text",
    [
        "distributed: {processes: 2}\nrl: {micro_batch: 8}\nsft: {micro_batch: 4}",
        "distributed: {processes: 8}\nrl: {prompts_per_step: 1}",  # a process need not hold a whole group
        "distributed: {processes: 2, strategy: zero3}\npolicy: {dtype: float32}",
        "distributed: {processes: 2, strategy: zero3}\npolicy: {lora: null}",
        "distributed: {processes: 2, strategy: fsdp}\nsft: {alpha: 1}",
    ],
)
def test_processes_and_strategies_that_fit(text: str):
    parse(f"name: a\n{text}")


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ("{gpu_memory_utilization: 0.5}", "gpu_memory_utilization of engine 'vllm' only"),
        ("{mode: server, server_base_url: 'http://v'}", "mode, server_base_url of engine 'vllm' only"),
        ("{engine: vllm, server_timeout: 9}", "server_timeout of mode 'server' only"),
        (
            "{engine: vllm, mode: server, server_base_url: 'http://v', enable_sleep_mode: true}",
            "of mode 'colocate' only",
        ),
        (
            "{engine: vllm, importance_sampling_clip_min: 3}",
            "clip_min 3.0 is not below importance_sampling_clip_max 3.0",
        ),
        (
            "{engine: vllm, importance_sampling_mode: token_truncate, importance_sampling_clip_max: null}",
            "needs importance_sampling_clip_min or importance_sampling_clip_max",
        ),
    ],
)
def test_rollout_settings_that_do_not_fit(rollout: str, words: str):
    assert words in line_of(refusal(f"name: a\nrl: {{rollout: {rollout}}}"), "rl.rollout")


@pytest.mark.parametrize(
    ("processes", "rollout", "field"),
    [
        (4, "tensor_parallel_size: 3", "rl.rollout.tensor_parallel_size"),
        (1, "tensor_parallel_size: 2", "rl.rollout.tensor_parallel_size"),
        (1, "max_model_length: 543", "rl.rollout.max_model_length"),
        (4, "tensor_parallel_size: 2, max_model_length: 544", None),  # 512 of the prompt and 32 of the response
    ],
)
def test_vllm_beside_the_processes_and_lengths(processes: int, rollout: str, field: str | None):
    text = f"name: a\ndistributed: {{processes: {processes}}}\nrl: {{rollout: {{engine: vllm, {rollout}}}}}"
    if field is None:
        parse(text)
    else:
        assert "expected" in line_of(refusal(text), field)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_paper_advantage_takes_no_quality_scale(scale: str):
    line = line_of(refusal(f"name: a\nmethod: {{advantage: paper, quality_scale: {scale}}}"), "method")
    assert "'paper'" in line and repr(scale) in line and "expected 'none'" in line
    assert parse("name: a\nmethod: {advantage: paper}").method.quality_scale == "none"


@pytest.mark.parametrize("uri", ["https://ann:pw@mlflow", "https://ann@mlflow", "postgresql://ann:pw@db/mlflow"])
def test_mlflow_address_with_a_password_is_refused(uri: str):
    line = line_of(refusal(f"name: a\ntracking: {{uri: '{uri}'}}"), "tracking.uri")
    assert "MLFLOW_TRACKING_PASSWORD" in line


@pytest.mark.parametrize(
    "uri", ["https://mlflow:8443", "postgresql://ann@db:5432/mlflow", "sqlite:////a/b@c/mlflow.db"]
)
def test_mlflow_address_without_a_password_is_taken(uri: str):
    assert parse(f"name: a\ntracking: {{uri: '{uri}'}}").tracking.uri == uri


def test_several_nodes_profile_on_one_node_is_warned_about():
    (warning,) = parse("name: a\nresources: {profile: multi-node}").warnings
    assert "distributed.nodes 1" in warning


def test_a_baseline_named_twice_is_refused():
    assert "method.baselines: got" in refusal("name: a\nmethod: {baselines: [reward_only, reward_only]}")


@pytest.mark.parametrize("revision", ["5e93851", "1e5", "12_3e4", "main", "\U0001f600"])
def test_texts_survive_the_round_trip_through_yaml_and_json(revision: str):
    """A commit may look like a number, and an experiment may be called anything."""
    recipe = Recipe(name="a", policy={"model": "org/name", "revision": revision}, tracking={"experiment": revision})
    assert parse(recipe.to_yaml()) == recipe
    assert parse(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("defences", "field", "words"),
    [
        ("quality_gate: group", "quality_gate", "without method.defences.min_quality"),
        ("max_tokens: 32", "max_tokens", "less than rl.sampling.max_new_tokens = 32"),
        ("min_quality: 1.01", "min_quality", "1 at most"),
        ("min_quality: 0", "min_quality", "which every response reaches: this reward is 0 at least"),
        ("min_quality: -0.5", "min_quality", "which every response reaches"),
        ("min_prompt_similarity: -1", "min_prompt_similarity", "greater than -1"),
    ],
)
def test_a_defence_that_every_response_meets_or_none_is_refused(defences: str, field: str, words: str):
    message = refusal(f"name: a\nmethod: {{defences: {{{defences}}}}}")
    assert words in line_of(message, f"method.defences.{field}")


@pytest.mark.parametrize(
    ("defences", "rest"),
    [
        ("max_tokens: 31, min_quality: 1", "{}"),
        ("min_quality: 5", "{reward: {kind: model, model: org/name, squash: false}}"),
        ("min_quality: -5", "{reward: {kind: model, model: org/name, squash: false}}"),
        ("min_quality: 0.999", "{reward: {kind: model, model: org/name}}"),
        ("min_quality: 1.0e-3", "{reward: {kind: reference_similarity}}"),
        ("min_quality: 0.5, quality_gate: group", "{}"),
    ],
)
def test_a_defence_that_some_responses_meet_is_taken(defences: str, rest: str):
    content = {"name": "a", "method": {"defences": yaml.safe_load(f"{{{defences}}}")}} | yaml.safe_load(rest)
    assert parse(yaml.safe_dump(content)).method.defences.conditional


@pytest.mark.parametrize(
    ("floor", "words"),
    [("1", "this reward is below 1; expected less than 1"), ("0", "0 at least"), ("2", "this reward is below 1")],
)
def test_a_squashed_score_lies_between_0_and_1_and_reaches_neither(floor: str, words: str):
    message = refusal(
        f"name: a\nreward: {{kind: model, model: org/name}}\nmethod: {{defences: {{min_quality: {floor}}}}}"
    )
    assert words in line_of(message, "method.defences.min_quality")


def test_what_the_unearned_get_is_warned_about_where_everybody_earns():
    other = next(way for way in ("apart", "zero") if way != Defences().unearned)
    for conditions, warned in (("", True), (", max_tokens: 20", False), (", min_quality: 0.5", False)):
        recipe = parse(f"name: a\nmethod: {{defences: {{unearned: {other}{conditions}}}}}")
        assert [line for line in recipe.warnings if "method.defences.unearned" in line] == recipe.warnings
        assert bool(recipe.warnings) == warned
    assert parse(parse("name: a").to_yaml()).warnings == []  # the default, written out


def test_vllm_server_needs_an_address():
    assert "server_base_url" in line_of(refusal("name: a\nrl: {rollout: {engine: vllm, mode: server}}"), "rl.rollout")
    parse("name: a\nrl: {rollout: {engine: vllm, mode: server, server_base_url: 'http://vllm:8000'}}")


@pytest.mark.parametrize(
    ("method", "warned"),
    [
        ("{k: 2, advantage: centred, alpha: 1}", True),
        ("{k: 2, advantage: centred, alpha: 0}", False),
        ("{k: 3, advantage: centred, alpha: 1}", False),
        ("{k: 2, advantage: decoupled, alpha: 1}", False),
        ("{k: 2, advantage: paper, alpha: 1}", False),
        ("{k: 2, advantage: centred, alpha: 1, score: cosine_distance}", True),
        # Of one response, not of what two have in common.
        ("{k: 2, advantage: centred, alpha: 1, score: entropy}", False),
        ("{k: 2, advantage: centred, alpha: 1, score: likelihood}", False),
        # One that earns and one that does not differ under `zero`; apart, the one is its own mean.
        ("{k: 2, advantage: centred, alpha: 1, defences: {max_tokens: 9, unearned: zero}}", False),
        ("{k: 2, advantage: centred, alpha: 1, defences: {max_tokens: 9, unearned: apart}}", True),
        ("{k: 2, advantage: centred, alpha: 0}\nsft: {alpha: 1}", True),
        ("{k: 2, advantage: centred, alpha: 1, defences: {max_tokens: 9}}\nsft: {alpha: 1}", True),
    ],
)
def test_centred_pair_is_warned_about_because_its_bonus_cancels(method: str, warned: bool):
    found = parse(f"name: a\nmethod: {method}").warnings
    assert len(found) == int(warned)
    assert all("k = 2" in warning and "alpha has no effect" in warning for warning in found)


def test_sft_has_no_quality_to_multiply():
    text = "name: a\nmethod: {score: distinct, combine: multiply, alpha: 1}\nsft: {alpha: %s}"
    assert "sft.alpha: got 0.5 with method.combine 'multiply'" in refusal(text % 0.5)
    parse(text % 0)


# --- YAML ---


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "2.0e-4", "0.0002", "+2e-4", "20e-5"])
def test_an_exponent_without_a_point_is_a_number(written: str):
    assert parse(f"name: a\nrl: {{learning_rate: {written}}}").rl.learning_rate == pytest.approx(0.0002, rel=1e-12)


def test_text_that_only_looks_like_an_exponent_stays_text():
    assert parse("name: a\ndata: {revision: '2e4'}").data.revision == "2e4"
    assert parse("name: a\ndata: {revision: 2e4f}").data.revision == "2e4f"


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: a\nseed: 1\nname: b", 3), ("name: a\nmethod:\n  alpha: 1\n  k: 4\n  alpha: 2", 5)],
)
def test_a_key_written_twice_is_refused_with_its_line(text: str, line: int):
    message = refusal(text)
    assert "stands twice" in message
    assert f"line {line}," in message


@pytest.mark.parametrize(
    "text",
    ["name: [a", "name: a\n\tseed: 1", "name: *nobody", "? [a]\n: b", "name: !!python/object/apply:os.getcwd []"],
)
def test_broken_yaml_is_refused_under_the_file_name(text: str):
    assert refusal(text).startswith("my.yaml: not valid YAML")


def test_an_impossible_date_is_refused_like_other_broken_yaml():
    assert refusal("name: a\ndata: {revision: 2024-13-45}").startswith("my.yaml: not valid YAML")


@pytest.mark.parametrize(("text", "kind"), [("- name: a", "list"), ("name", "str"), ("", "NoneType"), ("3", "int")])
def test_a_document_that_is_no_mapping_is_refused(text: str, kind: str):
    assert refusal(text) == f"my.yaml: expected a mapping of recipe keys, got {kind}"


def test_a_key_that_is_no_text_is_refused():
    assert "keys should be strings" in refusal("name: a\n1: b").lower()


# --- files ---


def test_missing_file(tmp_path: Path):
    path = tmp_path / "none.yaml"
    with pytest.raises(DQOError, match="no such recipe file") as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_file_in_another_encoding_names_the_byte(tmp_path: Path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(DQOError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: not UTF-8 (byte 9: 0xe9)"


def test_folder_instead_of_a_file(tmp_path: Path):
    with pytest.raises(DQOError, match="cannot be read"):
        load(tmp_path)


def test_errors_of_a_file_start_with_its_path(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmethod: {k: 1}")
    with pytest.raises(DQOError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: 1 error")


# --- defaults, identity ---


def test_defaults_are_filled_in_and_survive_the_round_trip():
    recipe = parse("name: a")
    shown = yaml.safe_load(recipe.to_yaml())
    assert shown["method"] == {
        "alpha": 1.0,
        "k": 8,
        "advantage": "decoupled",
        "quality_scale": "none",
        "score": "log_volume",
        "combine": "add",
        "distinct_threshold": 0.7,
        "kernel_scale": 1.0,
        "defences": {
            "min_quality": None,
            "quality_gate": "member",
            "drop_truncated": False,
            "max_tokens": None,
            "min_prompt_similarity": None,
            "unearned": "zero",
            "embed": "response",
            "strip_reasoning": False,
        },
        "baselines": ["reward_only"],
    }
    assert list(shown) == list(Recipe.model_fields)
    assert parse(recipe.to_yaml()) == recipe == parse(recipe.to_json())
    assert parse(recipe.to_json()).digest == recipe.digest


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_without_warnings_and_survive_the_round_trip(path: Path):
    recipe = load(path)
    assert recipe.warnings == []
    assert parse(recipe.to_yaml()) == recipe


def test_shipped_recipes_have_names_of_their_own():
    names = [load(path).name for path in RECIPES]
    assert "quickstart" in names
    assert len(set(names)) == len(names)


def test_digest_ignores_order_comments_and_defaults_and_sees_values():
    one = parse(
        "name: a\nmethod: {alpha: 2, k: 4}\nrl: {learning_rate: 2e-4}\n"
        "data: {columns: {references: target, concepts: words}}"
    )
    other = parse(
        "# why\ndata: {columns: {concepts: words, references: target}}\n"
        "rl: {learning_rate: 0.0002}  # peak\nmethod:\n  k: 4\n  alpha: 2.0\nname: a\nseed: 0\n"
    )
    assert one.digest == other.digest
    assert len(one.digest) == 12 and int(one.digest, 16) >= 0
    for change in ("name: b", "seed: 1", "method: {alpha: 0.5}", "rl: {steps: 21}"):
        assert parse(f"name: a\n{change}" if "name" not in change else change).digest != parse("name: a").digest


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse("name: a").seed = 3


def test_models_stand_in_display_order():
    recipe = parse("name: a")
    assert recipe.variants == ["reward_only", "dqo"]
    assert recipe.model_names == ["base", "sft", "reward_only", "dqo"]


# --- the schema for editors ---


def test_schema_describes_every_field_and_refuses_unknown_keys_in_every_section():
    schema = json.loads(json_schema())
    objects = [schema, *(part for part in schema["$defs"].values() if part["type"] == "object")]
    assert len(objects) > 10
    for part in objects:
        assert part["additionalProperties"] is False, part["title"]
    for name, field in schema["$defs"]["Method"]["properties"].items():
        assert field["description"] == Method.model_fields[name].description
        assert field["description"]


def test_schema_agrees_with_the_parser():
    schema = json.loads(json_schema())
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.check_schema(schema)
    for path in RECIPES:
        validator.validate(json.loads(load(path).to_json()))
    for wrong in ({}, {"name": "a", "metod": {}}, {"name": "a", "method": {"k": 1}}, {"name": "a", "seed": "one"}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)
        with pytest.raises(DQOError):
            parse(json.dumps(wrong))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("{combine: multiply}", "needs a score that is a share: distinct, similarity, likelihood; got 'log_volume'"),
        ("{combine: multiply, score: distinct, alpha: 2}", "needs alpha in [0, 1], got 2"),
        ("{combine: multiply, score: distinct, defences: {max_tokens: 9}}", "expected no defences, or 'add'"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(method: str, expected: str):
    assert expected in line_of(refusal(f"name: a\nmethod: {method}"), "method")


def test_shares_multiply():
    method = parse("name: a\nmethod: {combine: multiply, score: likelihood, alpha: 0.25}").method
    assert (method.combine, method.score, method.alpha) == ("multiply", "likelihood", 0.25)
