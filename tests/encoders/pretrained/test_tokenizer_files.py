"""Tokenizers of checkpoints: ids are those of transformers, or the directory is refused."""

import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.encoders.pretrained.tokenizer_files import read_tokenizer
from mefn_jax.errors import WeightsError

WORDS = ["a", "dog", "Dog", "the", "The", "in", "berlin", "Berlin", "cafe", "café", "##s", "##e", "run", "!", "2", "犬"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RENAMED = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), RENAMED, strict=True))
CAPTIONS = [
    "",
    "The dog runs in Berlin!",
    "a  café\tin\nthe Berlin  ",
    "cafe\u0301 CAFÉ",
    "犬dogs犬2",
    "the [MASK] in [SEP] Berlin",
    "a <|endoftext|> and <|startoftext|>dog",
    "dog\x00\x1c\x85\u200b\u2028dog",
    "\uff24\uff4f\uff47 \ufb01 ½ №2",
    "naïve \U0001f415\u200d\U0001f9ba run!!",
    "dogs" * 60,
    "<s> dog </s><mask><pad>",
    "don't I'll 2024",
]


def write_vocabulary(directory, special=SPECIAL, words=WORDS):
    (directory / "vocab.txt").write_text("\n".join([*special, *words]) + "\n", encoding="utf-8")


def write_json(directory, special=SPECIAL, model_class=tokenizers.models.WordPiece, processor=True, **options):
    tokenizer = make_tokenizer(special, model_class, processor, **options)
    tokenizer.save(str(directory / "tokenizer.json"))


def make_tokenizer(special, model_class, processor, **options):
    vocabulary = {w: k for k, w in enumerate([*special, *WORDS])}
    tokenizer = tokenizers.Tokenizer(model_class(vocabulary, unk_token=special[1]))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    if processor:
        tokenizer.post_processor = tokenizers.processors.BertProcessing((special[3], 3), (special[2], 2))
    return tokenizer


def write_clip(directory, **options):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({p: k for k, p in enumerate(pieces)}))
    (directory / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    write_options(directory, **options)


def write_options(directory, name="tokenizer_config.json", **options):
    (directory / name).write_text(json.dumps(options))


def save_clip_json(directory):
    import transformers

    write_clip(directory, tokenizer_class="CLIPTokenizer")
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink()


def combine(*writers):
    return lambda directory: [write(directory) for write in writers]


def write_bytes(name, content=b"dog\xff"):
    return lambda directory: (directory / name).write_bytes(content)


def options(name="tokenizer_config.json", **values):
    return lambda directory: write_options(directory, name, **values)


ADDED = {"id": 21, "content": "zebra", "special": False, "normalized": True}
ADDED |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
# What a directory holds beside config.json, by its model_type.
LAYOUTS = {
    "vocabulary alone": ("bert", write_vocabulary),
    "cased vocabulary": ("bert", combine(write_vocabulary, options(do_lower_case=False))),
    "accents": ("bert", combine(write_vocabulary, options(strip_accents=False, tokenize_chinese_chars=False))),
    "json alone": ("bert", write_json),
    "json against the class": ("bert", combine(lambda d: write_json(d, lowercase=True), options(do_lower_case=False))),
    "old class": ("bert", combine(write_json, options(tokenizer_class="BertTokenizerFast", do_lower_case=True))),
    "renamed special tokens": ("bert", combine(lambda d: write_vocabulary(d, RENAMED), options(**NAMES))),
    "special_tokens_map": (
        "bert",
        combine(lambda d: write_vocabulary(d, RENAMED), options("special_tokens_map.json", **NAMES)),
    ),
    "added tokens": ("bert", combine(write_vocabulary, options("added_tokens.json", zebra=21, dogs=22))),
    "added_tokens_decoder": ("bert", combine(write_vocabulary, options(added_tokens_decoder={"21": ADDED}))),
    "generic class": ("bert", combine(lambda d: write_json(d, lowercase=False), options(**FAST, pad_token="[PAD]"))),
    "generic class, renamed": ("bert", combine(lambda d: write_json(d, RENAMED), options(**FAST, **NAMES))),
    "word level": ("bert", combine(lambda d: write_json(d, model_class=tokenizers.models.WordLevel), options(**FAST))),
    "class in config.json": ("bert", combine(write_json, options("config.json", model_type="bert", **FAST))),
    "left padding": ("bert", combine(write_vocabulary, options(padding_side="left", model_max_length=8))),
    "CLIP": ("clip", write_clip),
    "CLIP, old class": ("clip", lambda d: write_clip(d, tokenizer_class="CLIPTokenizerFast", pad_token="!")),
    "CLIP in one file": ("clip", save_clip_json),
    "CLIP's text tower": ("clip_text_model", lambda d: write_clip(d, tokenizer_class="CLIPTokenizer")),
}


def fill(directory, layout):
    model_type, write = layout
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    write(directory)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_equal_transformers(name, tmp_path):
    import transformers

    expected = transformers.AutoTokenizer.from_pretrained(fill(tmp_path, LAYOUTS[name]))
    for max_tokens in (6, 400):
        tokenizer = Tokenizer(read_tokenizer(tmp_path), max_tokens, False, "keep")
        ids, mask, _ = tokenizer.encode(CAPTIONS)
        for caption, row, kept in zip(CAPTIONS, ids, mask, strict=True):
            assert row[kept].tolist() == expected(caption, truncation=True, max_length=max_tokens + 2)["input_ids"]
            assert (row[~kept] == tokenizer.pad).all()
    if expected.pad_token_id is not None:
        assert tokenizer.pad == expected.pad_token_id


def test_invented_mask_beyond_embedding_is_left_out(tmp_path):
    """transformers gives a mask that the vocabulary lacks the next id, for which the embedding has no row."""
    fill(tmp_path, ("bert", lambda d: write_vocabulary(d, SPECIAL[:4])))
    captions = ["The dog runs", "a [MASK]"]
    assert Tokenizer(read_tokenizer(tmp_path), 8, False, "keep").mask == 20
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 20}))
    tokenizer = Tokenizer(read_tokenizer(tmp_path), 8, False, "keep")
    assert (tokenizer.vocab_size, tokenizer.mask) == (20, None)
    assert tokenizer(captions)[0].max() < 20


def test_layouts_differ():
    """Captions tell the layouts apart: some ids would be wrong if one tokenizer were taken for another."""
    text = make_tokenizer(SPECIAL, tokenizers.models.WordPiece, True, lowercase=False).to_str()
    cased = Tokenizer(text, 20, False, "keep")(CAPTIONS)[0]
    text = make_tokenizer(SPECIAL, tokenizers.models.WordPiece, True, lowercase=True).to_str()
    assert (cased != Tokenizer(text, 20, False, "keep")(CAPTIONS)[0]).any()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (combine(lambda d: write_json(d, processor=False), options(**FAST)), "gives the caption '' the ids"),
        (combine(write_vocabulary, options(truncation_side="left")), "truncation_side must be right"),
        (combine(write_vocabulary, options(split_special_tokens=True)), "split_special_tokens is not supported"),
        (combine(write_vocabulary, options(tokenizer_class="pipeline")), "tokenizer_class 'pipeline' is no class"),
        (combine(write_vocabulary, options(tokenizer_class=["x"])), "tokenizer_class .* is no class"),
        (combine(write_vocabulary, options(tokenizer_class="BertJapaneseTokenizer")), "cannot be read"),
        (options(), "tokenizer.json: no such file, nor vocab.txt or vocab.json"),
        (options("tokenizer.json"), "its tokenizer cannot be read"),
        (write_clip, "vocab.txt: no such file, which BertTokenizer reads"),
        (lambda d: (d / "tokenizer.json").write_text("[" * 100_000), "nested too deeply"),
        (combine(write_vocabulary, lambda d: (d / "tokenizer_config.json").write_text("[]")), "holds a list"),
        (combine(write_vocabulary, options(pad_token=[1])), "its tokenizer cannot be read"),
        (combine(write_vocabulary, write_bytes("vocab.txt")), "vocab.txt: is not UTF-8"),
        (combine(write_json, write_bytes("tokenizer.json")), "tokenizer.json: is not UTF-8"),
        (combine(write_vocabulary, write_bytes("special_tokens_map.json")), "special_tokens_map.json: is not JSON"),
        (combine(write_vocabulary, write_bytes("added_tokens.json", b"[")), "added_tokens.json: is not JSON"),
        (combine(write_vocabulary, write_bytes("added_tokens.json", b"[1]")), "added_tokens.json: holds a list"),
        (combine(write_clip, write_bytes("vocab.json", b"3")), "vocab.json: holds a int"),
        (write_bytes("vocab.txt", b"dog\ncat\n"), r"cannot be read .*\[UNK\].*copy its files again"),
        (combine(write_vocabulary, options(added_tokens_decoder={"x": 1})), "its tokenizer cannot be read"),
    ],
)
def test_read_tokenizer_names_what_it_refuses(layout, message, tmp_path):
    with pytest.raises(WeightsError, match=message) as error:
        read_tokenizer(fill(tmp_path, ("bert", layout)))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_read_tokenizer_opens_nothing_outside(tmp_path):
    """Keys that name files and code lead nowhere, and a link out of the directory is refused."""
    inside, outside = tmp_path / "inside", tmp_path / "outside.txt"
    inside.mkdir()
    outside.write_text("not a vocabulary")
    leading = dict.fromkeys(("vocab_file", "tokenizer_file", "gguf_file", "name_or_path"), str(outside))
    auto_map = {"AutoTokenizer": ["code.Slow", "code.Fast"]}
    (inside / "code.py").write_text("raise SystemExit('executed')")
    fill(inside, ("bert", combine(write_vocabulary, options(auto_map=auto_map, **leading))))
    assert Tokenizer(read_tokenizer(inside), 8, False, "keep").pieces("the dog") == ["the", "dog"]
    (inside / "vocab.txt").unlink()
    (inside / "vocab.txt").symlink_to(outside)
    with pytest.raises(WeightsError, match="leaves the directory"):
        read_tokenizer(inside)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_tokenizer_raises_only_its_own_error(data, tmp_path):
    """One value of the files, at any depth, is replaced by another."""
    fill(tmp_path, LAYOUTS["generic class"])
    write_options(tmp_path, "special_tokens_map.json", mask_token="[MASK]", cls_token=ADDED | {"content": "[CLS]"})
    write_options(tmp_path, "added_tokens.json", zebra=21)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    name = data.draw(st.sampled_from(names))
    content = place = json.loads((tmp_path / name).read_text())
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    (tmp_path / name).write_text(json.dumps(content))
    try:
        Tokenizer(read_tokenizer(tmp_path), 8, False, "keep")(CAPTIONS)
    except WeightsError as e:
        message = str(e)
    else:
        message = str(tmp_path)
    assert str(tmp_path) in message
