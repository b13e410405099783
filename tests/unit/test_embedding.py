"""The response encoder on a tiny real model: geometry, order, cutting, and models that return no direction."""

import math
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.recipe import Encoder

TEXTS = ["A dog ran.", "The old man fed three hungry ducks.", "Rain.", "A dog ran.", "Nobody saw the cat on the roof."]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> ResponseEncoder:
    return ResponseEncoder(Encoder(model=str(tiny_encoder)), device="cpu")


def with_parameters(source: Path, folder: Path, value: float) -> Path:
    """Save a copy of an encoder all of whose parameters have one value."""
    model = SentenceTransformer(str(source), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save(str(folder))
    return folder


def test_vectors_have_unit_norm_one_row_a_text(encoder: ResponseEncoder):
    vectors = encoder(TEXTS).vectors
    assert vectors.shape == (len(TEXTS), 16)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)), rtol=0, atol=1e-6)


def test_vectors_are_those_of_sentence_transformers_in_the_order_of_the_texts(
    encoder: ResponseEncoder, tiny_encoder: Path
):
    library = SentenceTransformer(str(tiny_encoder), device="cpu")
    expected = torch.cat([library.encode([text], convert_to_tensor=True, normalize_embeddings=True) for text in TEXTS])
    torch.testing.assert_close(encoder(TEXTS).vectors, expected, rtol=0, atol=1e-5)
    # The expectation tells the rows apart, so an exchanged order would show.
    distances = torch.cdist(expected, expected)
    assert distances[0, 1:].count_nonzero() == 3 and distances[0, 3] == 0
    assert distances[torch.triu(torch.ones(5, 5), 1).bool()].sort().values[1] > 1e-2


def test_equal_texts_have_equal_vectors_bit_for_bit(encoder: ResponseEncoder):
    vectors = encoder([*TEXTS, "Rain."]).vectors
    assert torch.equal(vectors[0], vectors[3])
    assert torch.equal(vectors[2], vectors[5])
    assert not torch.equal(vectors[0], vectors[1])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_nothing_but_the_batches(encoder: ResponseEncoder, tiny_encoder: Path, batch_size: int):
    small = ResponseEncoder(Encoder(model=str(tiny_encoder), batch_size=batch_size), device="cpu")
    torch.testing.assert_close(small(TEXTS).vectors, encoder(TEXTS).vectors, rtol=0, atol=1e-5)


def test_cut_share_counts_every_text_that_is_longer_than_the_encoder_reads(tiny_encoder: Path):
    encoder = ResponseEncoder(Encoder(model=str(tiny_encoder), max_tokens=24), device="cpu")
    long, short = "many words " * 20, "Rain."
    assert encoder([short, short]).cut_share == 0.0
    assert encoder([long, short, long, long]).cut_share == pytest.approx(0.75)  # equal texts count each time
    # What lies behind the cut does not count.
    assert torch.equal(*encoder([long + "a", long + "b"]).vectors)


def test_the_models_own_limit_holds_where_the_recipe_allows_more(tiny_encoder: Path):
    encoder = ResponseEncoder(Encoder(model=str(tiny_encoder), max_tokens=4096), device="cpu")  # the model reads 64
    assert encoder(["word " * 300, "Rain."]).cut_share == pytest.approx(0.5)


def test_vectors_carry_no_gradient_and_ignore_autocast(encoder: ResponseEncoder):
    plain = encoder(TEXTS).vectors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder(TEXTS).vectors
    assert not plain.requires_grad
    assert torch.equal(plain, cast)


def test_an_empty_response_is_a_response(encoder: ResponseEncoder):
    try:
        vectors = encoder(["", "Rain."]).vectors
    except DQOError as error:  # a mean over no tokens has no direction; then it must be said
        assert "''" in str(error)
    else:
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2), rtol=0, atol=1e-6)


def test_no_texts_are_a_programming_error(encoder: ResponseEncoder):
    with pytest.raises(ValueError, match="no texts"):
        encoder([])


@pytest.mark.parametrize(("value", "norm"), [(0.0, "norm 0 "), (math.nan, "norm nan ")])
def test_an_encoder_without_directions_is_named_with_the_response(
    value: float, norm: str, tiny_encoder: Path, tmp_path: Path
):
    folder = with_parameters(tiny_encoder, tmp_path / "broken", value)
    encoder = ResponseEncoder(Encoder(model=str(folder)), device="cpu")
    with pytest.raises(DQOError) as caught:
        encoder(["A dog ran."])
    message = str(caught.value)
    assert message.startswith(f"encoder {str(folder)!r}: ")
    assert norm in message and "'A dog ran.'" in message and "expected a finite vector that is not zero" in message


def test_a_path_that_does_not_exist_is_named(tmp_path: Path):
    missing = tmp_path / "none"
    with pytest.raises(DQOError, match="no such directory") as caught:
        ResponseEncoder(Encoder(model=str(missing)))
    assert repr(str(missing)) in str(caught.value)


def test_a_folder_that_holds_no_encoder_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DQOError) as caught:
        ResponseEncoder(Encoder(model=str(tmp_path)), device="cpu")
    assert str(caught.value).startswith(f"encoder {str(tmp_path)!r}: cannot be loaded")


def test_texts_of_one_length_in_tokens_share_a_batch(tiny_encoder: Path):
    """Words that the tokenizer does not know fall to pieces: characters say little about what a text costs."""
    encoder = ResponseEncoder(Encoder(model=str(tiny_encoder), batch_size=2), device="cpu")
    texts = ["dog dog dog dog", "b" * 15, "cat cat cat cat", "z" * 15]
    library = SentenceTransformer(str(tiny_encoder), device="cpu")
    counts = sorted(library.preprocess([text])["input_ids"].shape[1] for text in texts)
    assert counts[1] < counts[2]  # two short ones and two long ones
    computed = []
    encoder._model.register_forward_pre_hook(lambda _, given: computed.append(given[0]["input_ids"].shape))
    encoder(texts)
    assert computed == [(2, counts[1]), (2, counts[3])]
