"""Resources of a recipe: what a profile fills in, what goes before it, what is refused."""

import pytest

from dqo.errors import DQOError
from dqo.recipe import PROFILES, Resources, parse


def resources(text: str) -> Resources:
    return parse(f"name: a\nresources: {text}").resources


def refusal(text: str) -> str:
    with pytest.raises(DQOError) as caught:
        parse(text, "my.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("profile", "accelerators", "cpu", "memory"),
    [("cpu", 0, "2", "8Gi"), ("gpu-small", 1, "8", "64Gi"), ("gpu-large", 4, "32", "256Gi"),
     ("multi-node", 8, "64", "512Gi")],
)  # fmt: skip
def test_a_profile_fills_in(profile: str, accelerators: int, cpu: str, memory: str):
    got = resources(f"{{profile: {profile}}}")
    assert (got.cpu, got.memory) == (cpu, memory)
    assert (got.accelerator_count if got.accelerator else 0) == accelerators
    if accelerators:
        assert got.accelerator == "nvidia.com/gpu"
        assert [t.model_dump() for t in got.tolerations] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "value": None, "effect": "NoSchedule"}
        ]
        assert got.shared_memory is not None
    assert (got.run_as_user, got.run_as_group) == (10001, 10001)


def test_every_profile_is_one_of_the_recipes():
    assert set(PROFILES) == set(Resources.model_json_schema()["properties"]["profile"]["enum"])


def test_without_a_profile_everything_is_as_it_was():
    assert resources("{}") == resources("{profile: cpu}")
    old = resources('{image: "i:1", cpu: "4", memory: 96Gi, accelerator: amd.com/gpu, accelerator_count: 2}')
    assert (old.image, old.cpu, old.memory) == ("i:1", "4", "96Gi")
    assert (old.accelerator, old.accelerator_count, old.tolerations) == ("amd.com/gpu", 2, [])


def test_a_recipes_own_value_goes_before_the_profiles():
    got = resources("{profile: gpu-large, memory: 96Gi, accelerator_count: 1, tolerations: []}")
    assert (got.memory, got.accelerator_count, got.tolerations) == ("96Gi", 1, [])
    assert (got.cpu, got.accelerator, got.shared_memory) == ("32", "nvidia.com/gpu", "32Gi")


def test_a_filled_in_recipe_is_the_same_one():
    """A task parses what was compiled; a later version's presets must not change it."""
    recipe = parse("name: a\nresources: {profile: gpu-large, memory: 96Gi}")
    for text in (recipe.to_json(), recipe.to_yaml()):
        assert parse(text) == recipe and parse(text).digest == recipe.digest
    assert '"accelerator_count":4' in recipe.to_json()


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("{profile: huge}", "resources.profile", "got 'huge'"),
        ("{profile: [cpu]}", "resources.profile", "input should be"),
        ("{tolerations: [{keyy: a}]}", "resources.tolerations.0.keyy", "expected one of: key, operator"),
        ("{node_affinity: [{expressions: [{key: a, value: b}]}]}", "resources.node_affinity.0.expressions.0.value",
         "expected one of: key, operator, values"),
        ("{tolerations: [{key: a, operator: Exists, value: b}]}", "resources.tolerations.0", "takes no value, got 'b'"),
        ("{tolerations: [{}]}", "resources.tolerations.0", "needs key"),
        ("{node_affinity: [{expressions: [{key: a}]}]}", "resources.node_affinity.0.expressions.0",
         "one value or more"),
        ("{node_affinity: [{expressions: [{key: a, operator: Exists, values: [b]}]}]}",
         "resources.node_affinity.0.expressions.0", "expected no values"),
        ("{node_affinity: [{expressions: [{key: a, operator: Gt, values: ['1', '2']}]}]}",
         "resources.node_affinity.0.expressions.0", "expected one value"),
        ("{shared_memory: 8Gi, memory: 8Gi}", "resources", "shared_memory 8Gi is part of memory 8Gi"),
        ("{shared_memory: 9000Mi, memory: 8Gi}", "resources", "expected less than that"),
        ("{workspace_claim: Upper}", "resources.workspace_claim", "got 'Upper'"),
        ("{timeouts: {train: 3}}", "resources.timeouts.train", "'prepare', 'sft', 'rl'"),
        ("{timeouts: {rl: 0}}", "resources.timeouts.rl", "got 0"),
        ("{run_as_user: 0}", "resources.run_as_user", "got 0"),
        ("{secrets: {tracking: user}, environment: {HF_TOKEN: hf_secret}}", "resources.environment",
         "resources.secrets"),
        ("{environment: {'A B': x}}", "resources.environment", "'A B' is no name"),
        ("{environment: {MY_SECRET_KEY: hf_secret}}", "resources.environment", "MY_SECRET_KEY would be readable"),
        ("{environment: {STORE: 'postgresql://ann:hf_secret@db/mlflow'}}", "resources.environment", "STORE would be"),
        ("{secrets: {judge: key}}", "resources.secrets.judge", "judge.api_key_env"),
    ],
)  # fmt: skip
def test_refused(text: str, field: str, said: str):
    message = refusal(f"name: a\nresources: {text}")
    (line,) = [line for line in message.splitlines() if line.strip().startswith(f"{field}:") or f"{field}." in line]
    assert said in line
    assert "hf_secret" not in message
