"""Normalization and tokenization of captions."""

import copy
import json
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data import tokenizer as tok
from mefn_jax.errors import DataError


def test_normalize_caption_lowercases_and_drops_punctuation():
    assert tok.normalize_caption("  A Dog, runs . ", True, "keep") == "a dog, runs ."
    assert tok.normalize_caption("  A Dog, runs . ", False, "drop") == "A Dog runs"


def test_tokenizer_encodes_unseen_words_as_pieces_and_truncates():
    text = tok.train_tokenizer(["a dog runs", "a cat runs"], 300, True, "keep")
    tokenizer = tok.Tokenizer(text, 4, True, "keep")
    assert tokenizer.pieces("A dog runs") == ["a", "dog", "runs"]
    assert "".join(p.removeprefix("##") for p in tokenizer.pieces("cats")) == "cats"
    ids, mask = tokenizer(["a dog runs", "a a a a a a a a", "a ☃"])
    assert ids.shape == mask.shape == (3, 6)
    vocabulary = json.loads(text)["model"]["vocab"]
    assert ids[0].tolist() == [vocabulary[t] for t in ("[CLS]", "a", "dog", "runs", "[SEP]", "[PAD]")]
    assert ids[1].tolist() == [vocabulary[t] for t in ("[CLS]", "a", "a", "a", "a", "[SEP]")]
    assert mask.sum(1).tolist() == [5, 6, 4]
    assert ids[2, 2] == vocabulary["[UNK]"]


def test_train_tokenizer_ignores_order_of_captions():
    captions = [
        f"a {c} {s} left of a {d} {s}" for c in ("red", "blue") for d in ("green", "red") for s in ("disc", "star")
    ]
    assert tok.train_tokenizer(captions, 300, True, "keep") == tok.train_tokenizer(captions[::-1], 300, True, "keep")


WIDE = "ﬁre in the oﬃce of \uff21\uff22\uff23\uff0c \uff11\uff12\u00a0㎞"


@pytest.mark.parametrize("punctuation", ["keep", "drop"])
def test_tokenizer_gives_every_spelling_of_a_word_the_same_ids(punctuation):
    captions = ["ein Mädchen läuft am Café vorbei", "fire in the office of ABC, 12 km", "コーヒー と パン", "한국 사람"]
    spelled = [unicodedata.normalize("NFD", c) for c in captions]
    spelled[1] = WIDE  # ligatures, wide letters, a unit of one character
    spelled[2] = "ｺｰﾋｰ と ﾊﾟﾝ"  # half-width kana
    for trained, queried in ((captions, spelled), (spelled, captions)):
        tokenizer = tok.Tokenizer(tok.train_tokenizer(trained, 300, True, punctuation), 40, True, punctuation)
        for a, b in zip(tokenizer(trained), tokenizer(queried), strict=True):
            np.testing.assert_array_equal(a, b)
        assert tokenizer.unknown not in tokenizer(queried)[0]
        assert tokenizer.words(queried[0])[0][1] == "mädchen"


def test_trained_json_gives_the_same_ids_to_other_readers():
    text = tok.train_tokenizer(["ein Mädchen läuft", "the oﬃce"], 300, False, "keep")
    alone = tokenizers.Tokenizer.from_str(text)
    for caption in ("ein Mädchen läuft", unicodedata.normalize("NFD", "ein Mädchen"), "the office"):
        assert alone.encode(caption).tokens == tok.Tokenizer(text, 40, False, "keep").pieces(caption)


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(codec="ascii"), max_size=60))
def test_normal_form_changes_no_ascii_caption(caption):
    for options in ((True, "keep"), (False, "drop")):
        assert tok.normalize_caption(caption, *options, tok.UNICODE_FORM) == tok.normalize_caption(caption, *options)


def test_tokenizer_of_other_origin_sees_captions_as_they_are():
    bert = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "ﬁ": 4}))
    bert.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    foreign = tok.Tokenizer(bert.to_str(), 4, False, "keep")
    assert foreign.unicode_form == ""
    assert foreign.pieces("ﬁ") == ["ﬁ"]


def test_dropping_punctuation_keeps_marks_of_letters():
    assert tok.normalize_caption("हिन्दी, लड़की!", True, "drop") == "हिन्दी लड़की"


@pytest.mark.parametrize("length", [101, 450, 2000])
@pytest.mark.parametrize("letters", ["สุนัขตัวใหญ่วิ่งเล่นอยู่บนสนามหญ้า", "ខ្មែរភាសាឆ្កែ", "いぬがはしってねこがねる", "abcdefgh"])
def test_tokenizer_spells_words_of_any_length(letters, length):
    """Two captions without spaces that differ at their end, and a query that begins inside of the first."""
    word = (letters * length)[:length]
    captions = [word + letters[0] * 2 + letters[3], word + letters[3] * 2 + letters[0], " ".join(letters)]
    tokenizer = tok.Tokenizer(tok.train_tokenizer(captions, 200, True, "keep"), length + 10, True, "keep")
    ids, mask = tokenizer([*captions, captions[0][20:]])
    assert tokenizer.unknown not in ids
    assert not np.array_equal(ids[0], ids[1])
    assert mask[0].sum() > 2
    joined = "".join(p.removeprefix("##") for p in tokenizer.pieces(captions[0]))
    assert joined == unicodedata.normalize("NFKC", captions[0])


def test_tokenizer_spells_query_that_begins_with_a_letter_from_inside():
    """Without spaces, only the first letter of a caption begins a word."""
    tokenizer = tok.Tokenizer(tok.train_tokenizer(["แมวนอนบนเตียง"] * 2, 100, True, "keep"), 20, True, "keep")
    assert tok.UNK not in tokenizer.pieces("นอน")


TEXTS = ["a dog runs on the grass", "two children playing", "unbelievable", "red car"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(TEXTS * 3, 60, True, "keep"), 20, True, "keep")


def test_tokenizer_numbers_wordpieces_by_word():
    pieces = TOKENIZER.pieces("dogs runs, so")
    word_of_piece = TOKENIZER.encode(["dogs runs, so"])[2][0]
    assert word_of_piece[0] == -1
    assert (word_of_piece[len(pieces) + 1 :] == -1).all()
    starts = np.cumsum([not p.startswith("##") for p in pieces]) - 1
    np.testing.assert_array_equal(word_of_piece[1 : len(pieces) + 1], starts)
    assert len(pieces) > word_of_piece.max() + 1  # some word has several wordpieces


def test_encoded_captions_encodes_each_caption_once():
    calls = []

    class Counting(tok.Tokenizer):
        def encode(self, captions):
            calls.extend(captions)
            return super().encode(captions)

    encoded = tok.EncodedCaptions(Counting(TOKENIZER.json, 20, True, "keep"), 4)
    for positions in ([2, 0], [0, 1, 2], [3, 3]):
        texts = [TEXTS[k] for k in positions]
        for found, expected in zip(encoded(np.array(positions), texts), TOKENIZER.encode(texts), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert calls == [TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[3]]


def change(**values) -> str:
    """The text of a tokenizer with other values at its top level; a dotted key leads into an object."""
    content = json.loads(TOKENIZER.json)
    for key, value in values.items():
        place, _, name = key.rpartition("__")
        (content[place] if place else content)[name] = value
    return json.dumps(content)


def split_at(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


HARMLESS = [
    r"\s+",
    r"\w+|[^\w\s]+",
    r".{1,500}",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\(a\)+|[(a)+]+|[[:alpha:]]+",
]
ENDLESS = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+b",
    r"(x+x+)+y",
    r"a*a*a*a*b",
    r"a?a?a?a?a?a?aaaaaa",
    r"x+(a|b+)c",
    r"(?:a{1,50}){1,50}",
    r"(.*)\1",
    r"(?<w>a)\k<w>",
    r"(?x)(a|a) +b",
    r"(?-ix:(a|a) *)b",
    "a|" * 10_000,
]


@pytest.mark.parametrize("pattern", HARMLESS)
def test_tokenizer_takes_regular_expressions_that_end(pattern):
    tokenizer = tok.Tokenizer(change(pre_tokenizer=split_at(pattern)), 8, False, "keep")
    start = time.perf_counter()
    tokenizer(["a" * 3000 + "b", "a dog's  ... (a)" * 200])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_tokenizer_refuses_regular_expressions_that_may_not_end(pattern, place):
    part = split_at(pattern)
    if place == "normalizer":
        part = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    text = change(**{place: {"type": "Sequence", f"{place}s": [part]}})
    with pytest.raises(DataError, match=f"tokenizer.json: the regular expression .* in {place} may take without end"):
        tok.Tokenizer(text, 8, False, "keep")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"normalizer": ' + "[" * 700 + "]" * 700 + "}", "nested too deeply|recursion limit exceeded"),
        ("[]", "holds a list, not an object"),
        ("{}", "cannot be read"),
        (
            change(model__vocab={"[PAD]": 4294967295}),
            r"model.vocab: the id 4294967295 of '\[PAD\]' is not in 0 to 4194304",
        ),
        (change(model__vocab={"a": -1}), "model.vocab: the id -1"),
        (change(model__vocab={"a": 1.5}), "model.vocab: the id 1.5"),
        (change(model__vocab=[]), "cannot be read"),
        (change(added_tokens=[{"content": "x", "id": 2**40}]), "added_tokens: the id 1099511627776 of 'x'"),
        (change(model__dropout=0.5), "model.dropout 0.5 makes ids random"),
        (change(model__vocab={"a": 0}, added_tokens=[]), r"none of the tokens \[CLS\]"),
        (change(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "cannot be read"),
        (change(padding={"strategy": "BatchLongest", "pad_id": 2**32 - 1}), "padding: the id 4294967295"),
        (change(padding={"strategy": "BatchLongest", "pad_id": 1}), "cannot be read"),
    ],
)
def test_tokenizer_names_what_it_refuses(text, message):
    with pytest.raises(DataError, match=message) as error:
        tok.Tokenizer(text, 8, False, "keep")
    assert "\n" not in str(error.value)


def test_read_tokenizer_json_names_damaged_file(tmp_path):
    for text in ("{", '{"model": 3}', change(model__dropout=0.5)):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError) as error:
            tok.read_tokenizer_json(tmp_path)
        assert f"{tmp_path}: tokenizer.json" in str(error.value)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    assert tok.read_tokenizer_json(tmp_path) == TOKENIZER.json


def test_tokenizer_names_caption_that_cannot_be_encoded():
    with pytest.raises(DataError, match=r"cannot encode 'a .*ud800.*correct the caption"):
        TOKENIZER(["a \ud800"])


def test_tokenizer_turns_panic_of_library_into_our_error(monkeypatch):
    """The library's panics are no Exceptions."""
    panic = type("PanicException", (BaseException,), {})

    class Broken:
        def encode_batch(self, texts, add_special_tokens):
            raise panic("retry-limit-in-match over")

    tokenizer = copy.copy(TOKENIZER)
    tokenizer._tokenizer = Broken()
    with pytest.raises(DataError, match=r"cannot encode one of 2 captions .retry-limit-in-match over"):
        tokenizer(["a", "b"])
    monkeypatch.setattr(Broken, "encode_batch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["a"])


def test_tokenizer_takes_names_and_padding_from_file():
    """The tokens around a caption are those of the file's post-processor, and padding that of its `padding`."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<u>": 0, "<b>": 1, "<e>": 2, "a": 3, "<p>": 4}, "<u>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 1), ("<e>", 2)]
    )
    library.enable_padding(pad_id=4, pad_token="<p>")
    tokenizer = tok.Tokenizer(library.to_str(), 4, False, "keep")
    assert tokenizer(["a b"])[0].tolist() == [[1, 3, 0, 2, 4, 4]]
    assert (tokenizer.unknown, tokenizer.mask, tokenizer.ordinary.tolist()) == (0, None, [3])


def test_tokenizer_without_its_unknown_token_is_refused():
    content = json.loads(TOKENIZER.json)
    content["model"]["vocab"] = {}
    with pytest.raises(DataError, match=r"cannot encode 'a' \(.*Missing \[UNK\]"):
        tok.Tokenizer(json.dumps(content), 4, True, "keep")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tokenizer_raises_only_its_own_error(data):
    """One value of the file, at any depth, is replaced by another."""
    content = place = json.loads(TOKENIZER.json)
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        tokenizer = tok.Tokenizer(json.dumps(content), 4, True, "keep")
        tokenizer(TEXTS)
    except DataError as e:
        assert "tokenizer" in str(e)  # noqa: PT017 (either outcome is right)
