"""Captions to wordpieces: text normalisation, training a WordPiece vocabulary once, and encoding to fixed shapes."""

import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mefn_jax.data.parsing import read_text
from mefn_jax.errors import DataError

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
VOCAB_SIZE = 8000  # most wordpieces of a trained vocabulary, unless another size is asked for
# The names that a tokenizer may have for the tokens around a caption, and for padding.
STARTS, ENDS, PADS = (CLS, "<|startoftext|>", "<s>"), (SEP, "<|endoftext|>", "</s>"), (PAD, "<pad>", "<|endoftext|>")


def normalize_caption(caption: str, lower_case: bool, punctuation: str) -> str:
    """The caption as the tokenizer sees it. `punctuation` is "keep" or "drop"; white space is folded."""
    if punctuation == "drop":
        caption = re.sub(r"[^\w\s]", " ", caption)
    if lower_case:
        caption = caption.lower()
    return " ".join(caption.split())


def train_tokenizer(captions: list[str], vocab_size: int, lower_case: bool, punctuation: str) -> str:
    """Trains a WordPiece vocabulary on training captions; returns the tokenizer as JSON text.

    Pieces that no training caption uses (halfway merges) are dropped and the rest is sorted, so that a small closed
    vocabulary always gets the same ids; single characters stay, so that unseen words can be spelled.
    """
    texts = [normalize_caption(c, lower_case, punctuation) for c in captions]
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    )
    used = {piece for encoding in tokenizer.encode_batch(texts) for piece in encoding.tokens}
    kept = {p for p in tokenizer.get_vocab() if p in used or len(p.removeprefix("##")) == 1}
    pieces = [*SPECIAL, *sorted(kept - set(SPECIAL))]
    tokenizer.model = models.WordPiece({p: k for k, p in enumerate(pieces)}, unk_token=UNK)
    return tokenizer.to_str()


class Tokenizer:
    """Encodes captions to `[CLS] wordpieces [SEP] [PAD]...` of one length.

    `json` is the text of a `tokenizer.json`; `max_tokens` the most wordpieces kept of a caption (without [CLS], [SEP]).
    """

    def __init__(self, json: str, max_tokens: int, lower_case: bool, punctuation: str):
        self.json, self.max_tokens = json, max_tokens
        self.lower_case, self.punctuation = lower_case, punctuation
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as e:  # of no narrower kind
            raise DataError(f"{TOKENIZER_FILE} cannot be read ({e}); make the data set again") from None
        self._tokenizer.no_truncation()  # what a checkpoint's file may ask for is done here, to one length
        self._tokenizer.no_padding()
        self.pad, self.cls, self.sep = (self._known(names) for names in (PADS, STARTS, ENDS))
        self.mask = self._tokenizer.token_to_id(MASK)  # None for CLIP's
        self.unknown = self._tokenizer.token_to_id(UNK)  # None for those that know every byte
        known = set(self._tokenizer.get_vocab().values())
        self.vocab_size = max(known) + 1  # ids may have holes
        special = {self.pad, self.cls, self.sep, self.mask, self.unknown}
        self.ordinary = np.array(sorted(known - special), np.int32)  # the ids that stand for text

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns `ids` int32 and `mask` bool, both `(B, max_tokens + 2)`; the mask covers [CLS] and [SEP] too."""
        return self.encode(captions)[:2]

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `ids`, `mask`, and of which word each wordpiece is, int16 `(B, max_tokens + 2)`, -1 for none."""
        texts = [normalize_caption(c, self.lower_case, self.punctuation) for c in captions]
        ids = np.full((len(texts), self.max_tokens + 2), self.pad, np.int32)
        mask, words = np.zeros(ids.shape, bool), np.full(ids.shape, -1, np.int16)
        for number, encoding in enumerate(self._tokenizer.encode_batch(texts, add_special_tokens=False)):
            pieces = encoding.ids[: self.max_tokens]
            ids[number, : len(pieces) + 2] = [self.cls, *pieces, self.sep]
            mask[number, : len(pieces) + 2] = True
            words[number, 1 : len(pieces) + 1] = encoding.word_ids[: self.max_tokens]
        return ids, mask, words

    def tokens(self, ids) -> list[tuple[str, bool]]:
        """The token of each id, and whether it stands for a word that is unknown or masked."""
        odd = {self.unknown, self.mask} - {None}
        return [(self._tokenizer.id_to_token(int(i)) or "?", int(i) in odd) for i in ids]

    def _known(self, names: tuple) -> int:
        found = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
        if not found:
            raise DataError(f"the tokenizer has none of the tokens {', '.join(names)}")
        return found[0]

    def pieces(self, caption: str) -> list[str]:
        """The wordpieces of one caption, in the order of the encoder's words."""
        return self._all(caption)[: self.max_tokens]

    def words(self, caption: str) -> tuple[list[str], np.ndarray]:
        """The words of one caption as they are written, and which of them each wordpiece is, int64 `(M,)`; words beyond
        `max_tokens` pieces are left out."""
        text = normalize_caption(caption, self.lower_case, self.punctuation)
        found = self._tokenizer.encode(text, add_special_tokens=False)
        numbers = np.unique(found.word_ids[: self.max_tokens], return_inverse=True)[1]
        spans = [(0, 0)] * (numbers.max(initial=-1) + 1)
        for number, (start, stop) in zip(numbers, found.offsets, strict=False):
            spans[number] = (spans[number][0] if spans[number][1] else start, stop)
        return [text[start:stop].strip() for start, stop in spans], numbers

    def count(self, caption: str) -> int:
        """How many wordpieces a caption has, those beyond `max_tokens` too."""
        return len(self._all(caption))

    def _all(self, caption: str) -> list[str]:
        text = normalize_caption(caption, self.lower_case, self.punctuation)
        return self._tokenizer.encode(text, add_special_tokens=False).tokens


class EncodedCaptions:
    """A split's captions, each encoded when it is first asked for: from the second pass on it costs nothing."""

    def __init__(self, tokenizer: Tokenizer, captions: int):
        self.tokenizer = tokenizer
        shape = captions, tokenizer.max_tokens + 2
        self._ids, self._words = np.zeros(shape, np.int32), np.zeros(shape, np.int16)
        self._lengths = np.zeros(captions, np.int16)  # 0: not encoded yet

    def __getstate__(self):  # a process that reads encodes for itself
        return self.tokenizer, len(self._lengths)

    def __setstate__(self, state):
        self.__init__(*state)

    def __call__(self, positions: np.ndarray, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`Tokenizer.encode` of the captions with these positions in the split."""
        new = np.flatnonzero(self._lengths[positions] == 0)
        if len(new):
            ids, mask, words = self.tokenizer.encode([captions[k] for k in new])
            at = positions[new]
            self._ids[at], self._words[at] = ids, words
            self._lengths[at] = mask.sum(1)  # last, as other threads look here first
        mask = np.arange(self._ids.shape[1]) < self._lengths[positions, None]
        return self._ids[positions], mask, self._words[positions]


def read_tokenizer_json(directory) -> str:
    """The text of a data set's `tokenizer.json`. Raises DataError if there is none."""
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; run python -m mefn_jax.data.prepare again")
    return read_text(path)
