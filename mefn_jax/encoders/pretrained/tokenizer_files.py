"""The tokenizer of a checkpoint in Hugging Face layout as the text of one `tokenizer.json`.

`transformers` builds it, so that ids are those of that library: the class named by `tokenizer_config.json`, or that of
the architecture, may take the vocabulary of `tokenizer.json` and ignore the rest of that file. It reads copies of the
known files only, from a folder of their own, so that no file's content leads it to another place.

SigLIP and SigLIP 2 were trained on captions in lower case. `transformers` lower-cases for SigLIP alone, in a class that
runs in Python and needs SentencePiece; SigLIP 2's files name Gemma's class, which keeps case. Here the lower case is
written into the `tokenizer.json`, with all that SigLIP's class does to a caption.
"""

import json
import re
import shutil
import string
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import normalizers

from mefn_jax.data.tokenizer import Tokenizer
from mefn_jax.data.tokenizer_json import check_tokenizer_json
from mefn_jax.encoders.pretrained.files import check_links, import_transformers, read_object, to_one_line
from mefn_jax.encoders.pretrained.open_clip import is_open_clip
from mefn_jax.encoders.pretrained.weights import read_config, select_tower
from mefn_jax.errors import DataError, WeightsError

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
OTHER_FILES = ("merges.txt", "special_tokens_map.json", "added_tokens.json")
# Files that must hold a JSON object. tokenizer.json is not among them: `check_tokenizer_json` checks it.
JSON_OBJECTS = ("vocab.json", "special_tokens_map.json", "added_tokens.json")
# Keys of tokenizer_config.json that name files, repositories or code.
LEADING_KEYS = re.compile(r".*(_files?|_path|_map|_object)|vocab|merges|backend|trust_remote_code|_.*")
TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9]+Tokenizer(Fast)?|TokenizersBackend")
LOWER_CASED = ("siglip", "siglip_text_model")  # architectures that were trained on captions in lower case
SIGLIP_CLASS = "SiglipTokenizer"
PUNCTUATION = "[" + re.escape(string.punctuation) + "]"
# Captions whose ids are compared with those of `transformers` when a tokenizer is loaded.
PROBES = ("", "A dog's  café, №12!", "\uff24OG 犬 ☃ \t naïve\x1c½", "<|endoftext|> [SEP] a </s>", "un" * 60)
LONGEST_PROBE = 512


def read_tokenizer(directory) -> str:
    """Returns the checkpoint's tokenizer as the text of a `tokenizer.json`, with the token for padding.

    It is made from `tokenizer.json`, `vocab.txt` or `vocab.json`. Raises WeightsError if none of the three can be used,
    or if captions would get other ids than from `transformers`.
    """
    directory = Path(directory)
    check_links(directory)
    options, model_type = _read_options(directory)
    is_siglip = model_type in LOWER_CASED and options.get("tokenizer_class", SIGLIP_CLASS) == SIGLIP_CLASS
    if is_siglip and not (directory / VOCABULARIES[0]).is_file():
        raise WeightsError(
            f"{directory / VOCABULARIES[0]}: no such file, which {SIGLIP_CLASS} is read from; copy it from its source, "
            'or make it where sentencepiece is installed: python -c "from transformers import '
            "SiglipTokenizer, convert_slow_tokenizer as c; s = SiglipTokenizer('spiece.model'); s._extra_ids = 0; "
            "c.T5Converter(s).converted().save('tokenizer.json')\""
        )
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise WeightsError(
            f"{directory / VOCABULARIES[0]}: no such file, nor vocab.txt or vocab.json; copy them from the "
            "checkpoint's source"
        )
    _check_files(directory)
    rows = _read_rows(directory)
    try:
        if (directory / VOCABULARIES[0]).is_file():
            check_tokenizer_json((directory / VOCABULARIES[0]).read_text(encoding="utf-8"))
        if is_siglip:
            return _read_siglip(directory, options)
        tokenizer = _load(directory, options, model_type)
        _require_vocabulary(directory, tokenizer)
        if model_type in LOWER_CASED:
            backend = tokenizer.backend_tokenizer
            backend.normalizer = _put_before(backend.normalizer, normalizers.Lowercase())
        text = _serialize(tokenizer, rows)
        _compare(directory, tokenizer, Tokenizer(text, LONGEST_PROBE, False, "keep"))
    except WeightsError:
        raise
    except BaseException as e:  # the libraries raise errors of many classes; a panic is no Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        message = str(e) if isinstance(e, DataError) else f"{to_one_line(e)}; copy its files again from their source"
        raise WeightsError(f"{directory}: its tokenizer cannot be read ({message})") from None
    return text


def _check_files(directory: Path) -> None:
    """Raises WeightsError, which names the file, if a file is not UTF-8, or is not a JSON object where it must be one.
    The library's own messages do not name the file."""
    for path in (directory / name for name in (*VOCABULARIES, *OTHER_FILES)):
        if path.name in JSON_OBJECTS and path.is_file():
            read_object(path)
        elif path.is_file():
            try:
                path.read_text(encoding="utf-8")
            except ValueError as e:
                raise WeightsError(f"{path}: is not UTF-8 ({to_one_line(e)}); copy it again from its source") from None


def _read_options(directory: Path) -> tuple[dict, str]:
    """Returns the object of `tokenizer_config.json` without keys that lead elsewhere, and the architecture. Raises
    WeightsError for a class that is no tokenizer."""
    paths = directory / "tokenizer_config.json", directory / "config.json"
    options, config = (read_object(path) if path.is_file() else {} for path in paths)
    for path, values in zip(paths, (options, config), strict=True):
        name = values.get("tokenizer_class")
        if name is not None and not (isinstance(name, str) and TOKENIZER_CLASS.fullmatch(name)):
            raise WeightsError(f"{path}: tokenizer_class {str(name)[:60]!r} is no class of a tokenizer")
    if options.get("tokenizer_class") is None and config.get("tokenizer_class"):
        options["tokenizer_class"] = config["tokenizer_class"]
    if options.get("split_special_tokens"):
        raise WeightsError(f"{paths[0]}: split_special_tokens is not supported")
    if options.get("truncation_side", "right") != "right":
        raise WeightsError(f"{paths[0]}: truncation_side must be right; captions are cut at their end")
    # The tokenizer of open_clip's own text towers is CLIP's.
    model_type = "clip" if is_open_clip(directory) else config.get("model_type")
    return {k: v for k, v in options.items() if not LEADING_KEYS.fullmatch(k)}, model_type


def _read_siglip(directory: Path, options: dict) -> str:
    """Returns the text of SigLIP's `tokenizer.json` with what SiglipTokenizer does before: lower case, and no ASCII
    punctuation. It puts the end of text after a caption, and pads with the token that `tokenizer_config.json` names, by
    default the end of text again."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / VOCABULARIES[0]))
    if not isinstance(tokenizer.model, tokenizers.models.Unigram):
        name = type(tokenizer.model).__name__
        raise WeightsError(
            f"{directory / VOCABULARIES[0]}: model {name} is not {SIGLIP_CLASS}'s (Unigram); name the right "
            "tokenizer_class in tokenizer_config.json"
        )
    end, pad = (_read_token(options.get(key, "</s>")) for key in ("eos_token", "pad_token"))
    ids = [tokenizer.token_to_id(token) for token in (end, pad)]
    if None in ids:
        raise WeightsError(f"{directory / VOCABULARIES[0]}: lacks the token {(end, pad)[ids.index(None)]!r}")
    tokenizer.normalizer = _put_before(
        tokenizer.normalizer,
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
    )
    template = {"single": f"$A {end}", "special_tokens": [(end, ids[0])]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=ids[1], pad_token=pad)
    text = tokenizer.to_str()
    Tokenizer(text, LONGEST_PROBE, False, "keep").encode(list(PROBES))
    return text


def _read_token(value) -> str:
    """Returns a token that `tokenizer_config.json` gives as text, or as an object with its `content`."""
    return str(value.get("content") if isinstance(value, dict) else value)


def _put_before(normalizer, *first):
    """Returns the normalizer that applies `first`, and then `normalizer`, which may be None."""
    return normalizers.Sequence([*first, *([] if normalizer is None else [normalizer])])


def _read_rows(directory: Path) -> int:
    """Returns the rows of the word embedding, by config.json."""
    rows = select_tower(read_config(directory), "text").get("vocab_size")
    if not isinstance(rows, int):
        raise WeightsError(f"{directory / 'config.json'}: describes no text tower with a vocab_size")
    return rows


def _load(directory: Path, options: dict, model_type: str):
    """Returns the tokenizer that `transformers` builds from copies of the known files."""
    transformers = import_transformers()
    with tempfile.TemporaryDirectory() as folder:
        for name in (*VOCABULARIES, *OTHER_FILES):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(folder, name))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
        config = transformers.AutoConfig.for_model(model_type)
        return transformers.AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )


def _require_vocabulary(directory: Path, tokenizer) -> None:
    """Raises WeightsError if the directory lacks the vocabulary that the class reads: it then takes one of five
    tokens."""
    name = type(tokenizer).vocab_files_names.get("vocab_file")
    if name and not any((directory / n).is_file() for n in (VOCABULARIES[0], name)):
        raise WeightsError(f"{directory / name}: no such file, which {type(tokenizer).__name__} reads; copy it")


def _serialize(tokenizer, rows: int) -> str:
    """Returns the text of the `tokenizer.json` of a tokenizer of `transformers`, with its token for padding, or that at
    the end of a caption if it has none.

    The library gives tokens for mask and padding that a vocabulary lacks new ids, which may lie beyond the `rows` of
    the embedding. They are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{type(tokenizer).__name__} runs in Python and has no tokenizer.json; it is not supported")
    used = {getattr(tokenizer, f"{name}_token") for name in ("cls", "sep", "bos", "eos", "unk")}
    needless = {tokenizer.mask_token, tokenizer.pad_token} - used
    ends = (tokenizer.pad_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id)
    number = next((n for n in ends if n is not None and n < rows), 0)
    backend.no_truncation()
    backend.enable_padding(pad_id=number, pad_token=tokenizer.convert_ids_to_tokens(number) or "")
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < rows or t["content"] not in needless]
    return json.dumps(content, ensure_ascii=False)


def _compare(directory: Path, tokenizer, own: Tokenizer) -> None:
    """Raises WeightsError if captions get other ids than from `transformers`."""
    # The library's ids come first: what it cannot encode is a fault of the files, not of a caption.
    expected = [tokenizer(caption, truncation=True, max_length=own.length)["input_ids"] for caption in PROBES]
    ids, mask, _ = own.encode(list(PROBES))
    for caption, row, kept, expected_row in zip(PROBES, ids, mask, expected, strict=True):
        if row[kept].tolist() != expected_row:
            raise WeightsError(
                f"{directory}: its tokenizer gives the caption {caption[:20]!r} the ids {str(expected_row)[:80]}, "
                "which is not supported: captions are wordpieces between two tokens, or before one"
            )
