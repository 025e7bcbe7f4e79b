"""Tokenizers of SigLIP, SigLIP 2, XLM-R and RoBERTa: ids are those that `reference_tokenizers.py` stored."""

import json
import shutil

import numpy as np
import pytest
from commands import ROOT

from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer
from mefn_jax.errors import WeightsError

FIXTURES = ROOT / "tests" / "fixtures" / "tokenizers"
MODEL_TYPES = {"siglip": "siglip", "siglip2": "siglip", "xlm_roberta": "xlm-roberta", "roberta": "roberta"}


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(name)` copies a tokenizer beside a config.json and returns the directory and the expected ids."""

    def copy(name):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder)
        expected = json.loads((folder / "expected.json").read_text())
        (folder / "expected.json").unlink()
        (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[name], "text_config": {}}))
        return folder, expected

    return copy


def read(directory, max_tokens=63) -> Tokenizer:
    return Tokenizer(read_tokenizer(directory), max_tokens, False, "keep")


@pytest.mark.parametrize("name", sorted(MODEL_TYPES))
def test_ids_equal_transformers(name, checkpoint):
    directory, expected = checkpoint(name)
    tokenizer = read(directory, 63 if name.startswith("siglip") else 62)
    assert tokenizer.length == 64
    assert tokenizer.start_token == (not name.startswith("siglip"))
    ids, mask, words = tokenizer.encode(expected["captions"])
    np.testing.assert_array_equal(ids, np.array(expected["ids"]))
    np.testing.assert_array_equal(mask.sum(1), (words >= 0).sum(1) + 1 + tokenizer.first_word)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_captions_are_lower_cased(name, checkpoint):
    """SigLIP 2's files name a class that keeps case: without the cure, its ids are others."""
    directory, _ = checkpoint(name)
    tokenizer = read(directory)
    np.testing.assert_array_equal(tokenizer(["A DOG in Berlin"])[0], tokenizer(["a dog in berlin"])[0])
    if name == "siglip2":
        import transformers

        kept = transformers.AutoTokenizer.from_pretrained(directory)("The dog")["input_ids"]
        assert kept != transformers.AutoTokenizer.from_pretrained(directory)("the dog")["input_ids"]
        assert tokenizer(["The dog"])[0][0, : len(kept)].tolist() != kept


@pytest.mark.parametrize("name", sorted(MODEL_TYPES))
def test_words_of_a_caption(name, checkpoint):
    """A word is what stands between spaces (or what the tokenizer takes for one), also for Gemma's tokenizer, which
    does not split a caption."""
    tokenizer = read(checkpoint(name)[0])
    words, word_index = tokenizer.words("red dogs  running on water")
    assert words == ["red", "dogs", "running", "on", "water"]
    assert len(word_index) == tokenizer.count("red dogs  running on water")
    assert tokenizer.encode(["red dogs"])[2].max() == 1


def test_siglip_needs_tokenizer_json(checkpoint):
    directory, _ = checkpoint("siglip")
    (directory / "tokenizer.json").unlink()
    (directory / "spiece.model").touch()
    with pytest.raises(WeightsError, match=r"tokenizer.json: no such file.*sentencepiece") as error:
        read_tokenizer(directory)
    assert "\n" not in str(error.value)


def test_siglip_refuses_other_models(checkpoint):
    directory, _ = checkpoint("siglip")
    shutil.copyfile(FIXTURES / "siglip2" / "tokenizer.json", directory / "tokenizer.json")
    with pytest.raises(WeightsError, match="model BPE is not SiglipTokenizer's"):
        read_tokenizer(directory)
    shutil.copyfile(FIXTURES / "siglip" / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text('{"pad_token": "<none>"}')
    with pytest.raises(WeightsError, match="lacks the token '<none>'"):
        read_tokenizer(directory)


def test_unknown_token_of_unigram(checkpoint):
    assert read(checkpoint("siglip")[0]).unknown == 2
