"""Tiny tokenizers of today's families and their ids: the reference of `encoders/pretrained/test_tokenizer_families.py`.

    python tests/reference_tokenizers.py     # needs transformers, sentencepiece, protobuf; writes fixtures/tokenizers/

Each folder is a tokenizer as a checkpoint has it: trained here by SentencePiece or `tokenizers`, converted by the
converters of `transformers`. `expected.json` holds captions and the ids that `transformers` gives them, padded as its
processor pads: for SigLIP and SigLIP 2 to 64 tokens, without a mask.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parent / "fixtures" / "tokenizers"
TEXT = """a the dog dogs cat runs running in on berlin Berlin red blue circle square left right of two children play
grass car someone climbs rock water and boat café naïve über 犬 don't photo black white 2024 12"""
WORDS = TEXT.split()
# A part of nmt_nfkc, whose table is 300 kB: № ½ ﬁ tab newline, and SentencePiece's own sign for a space.
RULES = ["2581\t20", "2116\t4E 6F", "BD\t31 2F 32", "FB01\t66 69", "9\t20", "A\t20"]
CAPTIONS = [
    "a dog",
    "The dog runs in Berlin!",
    "  a  café\tin\nthe Berlin  ",
    "don't I'll 2024.",
    "犬dogs犬2",
    "NAÏVE über (two) children; play.",
    "dog" * 30,
    " ".join(["red"] * 100),
    "№ ½ ﬁ \U0001f415",
    "zzz qqq",
    "ÀÉ Straße İ",
]


def train_sentencepiece(folder: Path, name: str, **options) -> Path:
    """Trains a SentencePiece model on random captions and returns its file."""
    import sentencepiece

    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(2000)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "rules.tsv").write_text("\n".join(RULES) + "\n")
    if "normalization_rule_name" not in options:
        options["normalization_rule_tsv"] = str(folder / "rules.tsv")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / name),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / f"{name}.model"


def write(name: str, tokenizer_json: str, options: dict, encode) -> None:
    """Writes one folder; `encode(captions, folder)` returns the expected ids."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer_json), ensure_ascii=False, indent=0))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    expected = {"captions": CAPTIONS, "ids": encode(CAPTIONS, folder)}
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False))


def write_siglip(folder: Path) -> None:
    """SigLIP's: Unigram without a start token, padded with the end of text; the Python class alone gives its ids."""
    import transformers as hf
    from transformers.convert_slow_tokenizer import T5Converter

    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    path = train_sentencepiece(folder, "spiece", vocab_size=110, model_type="unigram", **special)
    slow = hf.SiglipTokenizer(str(path))
    slow._extra_ids = 0  # T5Converter asks for it
    options = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "do_lower_case": True}
    options |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}

    def encode(captions, _):
        return slow(captions, padding="max_length", truncation=True, max_length=64)["input_ids"]

    write("siglip", T5Converter(slow).converted().to_str(), options, encode)


def write_siglip2(folder: Path) -> None:
    """SigLIP 2's: Gemma's BPE with byte fallback. `google/siglip2-*-patch16-224` name GemmaTokenizer, which keeps case;
    the ids are those of Siglip2Tokenizer, which lower-cases as in training."""
    import tokenizers
    import transformers as hf
    from sentencepiece import SentencePieceProcessor
    from transformers.convert_slow_tokenizer import GemmaConverter, GemmaSentencePieceExtractor

    class Extractor(GemmaSentencePieceExtractor):
        def __init__(self, model):
            self.sp = SentencePieceProcessor(model_file=model)  # which transformers 5.24 forgets to set

    special = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    path = train_sentencepiece(
        folder,
        "gemma",
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        eos_piece="<eos>",
        bos_piece="<bos>",
        **special,
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    converter = GemmaConverter(SimpleNamespace(vocab_file=str(path), add_prefix_space=False, **names))
    converter.SpmExtractor = Extractor
    tokenizer = converter.converted()
    tokenizer.add_special_tokens([*names.values()])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    options = names | {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
    options |= {"padding_side": "right", "model_max_length": 64}

    def encode(captions, folder):
        reference = hf.Siglip2Tokenizer.from_pretrained(folder, padding_side="right")
        return reference(captions, padding="max_length", truncation=True, max_length=64)["input_ids"]

    write("siglip2", tokenizer.to_str(), options, encode)


def write_xlm_roberta(folder: Path) -> None:
    """XLM-R's: Unigram, with fairseq's order of the special tokens."""
    import transformers as hf
    from transformers.convert_slow_tokenizer import XLMRobertaConverter

    path = train_sentencepiece(
        folder, "xlmr", vocab_size=110, model_type="unigram", unk_id=0, bos_id=1, eos_id=2, pad_id=-1
    )
    ids = {"<s>": 0, "</s>": 2}
    original = SimpleNamespace(vocab_file=str(path), add_prefix_space=True, convert_tokens_to_ids=ids.get)
    tokenizer = XLMRobertaConverter(original).converted()
    options = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512}

    def encode(captions, folder):
        reference = hf.AutoTokenizer.from_pretrained(folder)
        return reference(captions, padding=True, truncation=True, max_length=64)["input_ids"]

    write("xlm_roberta", tokenizer.to_str(), options, encode)


def write_roberta(_) -> None:
    """RoBERTa's: byte-level BPE."""
    import tokenizers
    import transformers as hf

    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(2000)]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(lines, vocab_size=330, special_tokens=special)
    tokenizer._tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    options = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512}

    def encode(captions, folder):
        reference = hf.AutoTokenizer.from_pretrained(folder)
        return reference(captions, padding=True, truncation=True, max_length=64)["input_ids"]

    write("roberta", tokenizer.to_str(), options, encode)


def main() -> None:
    for write_one in (write_siglip, write_siglip2, write_xlm_roberta, write_roberta):
        with tempfile.TemporaryDirectory() as folder:
            write_one(Path(folder))
    for path in sorted(FOLDER.glob("*/*")):
        print(path.relative_to(FOLDER), path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
