"""Tokenization of captions: text normalization, training of a WordPiece vocabulary, and encoding to fixed shapes."""

import itertools
import json as json_module
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mefn_jax.data.parsing import read_text
from mefn_jax.data.tokenizer_json import TOKENIZER_FILE, check_tokenizer_json
from mefn_jax.errors import DataError

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB_SIZE = 8000  # default for the largest number of wordpieces of a trained vocabulary
UNICODE_FORM = "NFKC"  # of trained vocabularies: one form of accents, ligatures and wide letters
# Longer words are encoded in parts: the time that WordPiece takes grows with the cube of a word's length.
MAX_WORD = 500
ENCODED_AT_ONCE = 10_000  # captions, when a vocabulary is trained
# Names that tokenizers use for the tokens around a caption and for padding.
STARTS, ENDS, PADS = (CLS, "<|startoftext|>", "<s>"), (SEP, "<|endoftext|>", "</s>"), (PAD, "<pad>", "<|endoftext|>")
MASKS = (MASK, "<mask>")
# The tokenizer comes from a data set or from the directory of a checkpoint.
REMEDY = "make the data set again, or, for a checkpoint, copy its files again from their source"


def normalize_caption(caption: str, lower_case: bool, punctuation: str, unicode_form: str = "") -> str:
    """Returns a caption as the tokenizer sees it: in a normal form of Unicode if one is given, lower-cased, without
    punctuation ("drop"; "keep" keeps it), and with white space folded."""
    if unicode_form:
        caption = unicodedata.normalize(unicode_form, caption)
    if punctuation == "drop":  # but not the marks that belong to letters, such as the vowels of Hindi and Thai
        caption = re.sub(
            r"[^\w\s]", lambda match: match[0] if unicodedata.category(match[0])[0] == "M" else " ", caption
        )
    if lower_case:
        caption = caption.lower()
    return " ".join(caption.split())


def train_tokenizer(captions: Iterable[str], vocab_size: int, lower_case: bool, punctuation: str) -> str:
    """Trains a WordPiece vocabulary on training captions and returns the tokenizer as JSON text.

    `captions` are iterated over several times, and never held together in memory. Pieces that no training caption uses
    (intermediate merges) are dropped and the rest is sorted, so that a small closed vocabulary always gets the same
    ids. Single characters stay, so that unseen words can be spelled. The same captions give the same text.
    """

    def texts():
        return (normalize_caption(c, lower_case, punctuation, UNICODE_FORM) for c in captions)

    tokenizer = _make_untrained()
    # The library numbers the characters within words in the order of a hash table that is random in each process, and
    # breaks ties between pairs by these numbers. Tokens that are given to it are numbered in their order.
    given = [*SPECIAL, *_find_continuations(tokenizer, texts())]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=given, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    trained_pieces = tokenizer.get_vocab()
    tokenizer = _make_untrained()  # one that knows the characters as pieces only, not as special tokens
    tokenizer.model = _make_model(trained_pieces)
    used_pieces, remaining = set(), texts()
    while chunk := list(itertools.islice(remaining, ENCODED_AT_ONCE)):
        used_pieces.update(piece for encoding in tokenizer.encode_batch(chunk) for piece in encoding.tokens)
    vocabulary = {p for p in trained_pieces if p in used_pieces or len(p.removeprefix("##")) == 1}
    pieces = [*SPECIAL, *sorted(vocabulary - set(SPECIAL))]
    tokenizer.model = _make_model({p: k for k, p in enumerate(pieces)})
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer.to_str()


def _make_untrained() -> tokenizers.Tokenizer:
    """Returns a WordPiece tokenizer without a vocabulary."""
    tokenizer = tokenizers.Tokenizer(_make_model(None))
    tokenizer.normalizer = _make_normalizer()
    parts = pre_tokenizers.Split(tokenizers.Regex(f".{{1,{MAX_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), parts])
    return tokenizer


def _find_continuations(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> list[str]:
    """Returns the pieces `##c` of all characters c that follow another one in a word, sorted."""
    words, characters = set(), set()
    for text in texts:
        words.update(text.split())
    for word in words:
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word)):
            characters.update(part[1:])
    return sorted(f"##{c}" for c in characters)


def _make_model(vocabulary: dict[str, int] | None) -> models.WordPiece:
    """Returns the model of a trained vocabulary, given as the id of each piece; None: before training."""
    return models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=MAX_WORD)


def _make_normalizer() -> normalizers.Normalizer:
    """Returns the normalizer of a trained vocabulary, by which `Tokenizer` knows it, too."""
    bert = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    return normalizers.Sequence([getattr(normalizers, UNICODE_FORM)(), bert])


def _as_data_error(error: BaseException, what: str, remedy: str) -> BaseException:
    """Returns an error of the library as a DataError; the user's interrupt and the end of the process as they are. A
    panic of the library is no Exception, but a BaseException of a class that cannot be imported."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return DataError(f"{what} ({' '.join(str(error).split())[:300]}); {remedy}")
    return error


class Tokenizer:
    """Tokenizer that encodes captions to `[CLS] wordpieces [SEP] [PAD]...` of one length, or without [CLS].

    Attributes:
        json: the text of a `tokenizer.json`.
        max_tokens: the largest number of wordpieces that are kept of a caption, without [CLS] and [SEP].
        lower_case: captions are lower-cased first.
        punctuation: "keep" or "drop", see `normalize_caption`.
        start_token: the tokenizer puts [CLS] (or the token of that role) before a caption; SigLIP's do not.
        first_word: position of the first wordpiece: 1 after a start token, else 0.
        length: L, the number of tokens of an encoded caption, padding included.
        unicode_form: normal form that captions are brought into first, "NFKC" for a vocabulary of `train_tokenizer`, ""
            for one of another origin, which normalizes captions itself.
        pad, cls, sep: ids of the tokens for padding, start and end; `cls` is None without a start token.
        mask: id of the mask token; None if there is none (CLIP's tokenizer).
        unknown: id of the unknown token; None if there is none (tokenizers that know every byte).
        vocab_size: the largest id + 1; some ids below may be unused.
        ordinary: int32, ascending, all ids that stand for text.
    """

    def __init__(self, json: str, max_tokens: int, lower_case: bool, punctuation: str):
        """Loads the tokenizer. Raises DataError if `json` cannot be read or is refused by `check_tokenizer_json`, if it
        cannot encode a letter, or if a token for padding, start or end is missing."""
        self.json, self.max_tokens = json, max_tokens
        self.lower_case, self.punctuation = lower_case, punctuation
        check_tokenizer_json(json)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except BaseException as e:
            raise _as_data_error(e, f"{TOKENIZER_FILE} cannot be read", REMEDY) from None
        padding = self._tokenizer.padding
        self.unicode_form = UNICODE_FORM if _is_trained_here(self._tokenizer) else ""
        self._tokenizer.no_truncation()  # a checkpoint's file may ask for both, but `encode` does them, to one length
        self._tokenizer.no_padding()
        self.cls, self.sep = self._find_ends()
        self.start_token = self.cls is not None
        self.first_word = int(self.start_token)
        self.length = max_tokens + self.first_word + 1
        self.pad = padding["pad_id"] if padding else self._find_id(PADS)
        self.mask = next((i for i in map(self._tokenizer.token_to_id, MASKS) if i is not None), None)
        self.unknown = self._find_unknown()
        ids = {*self._tokenizer.get_vocab().values(), self.pad}
        self.vocab_size = max(ids) + 1
        special = {self.pad, self.cls, self.sep, self.mask, self.unknown} - {None}
        self.ordinary = np.array(sorted(ids - special), np.int32)

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes captions: returns `ids` int32 and `mask` bool, both `(B, L)`. The mask includes [CLS] and [SEP]."""
        return self.encode(captions)[:2]

    def normalize(self, caption: str) -> str:
        """Returns a caption as the vocabulary sees it, see `normalize_caption`; as it is if nothing is asked for, since
        the tokenizer of a pretrained tower handles white space itself."""
        if self.punctuation == "keep" and not (self.lower_case or self.unicode_form):
            return caption
        return normalize_caption(caption, self.lower_case, self.punctuation, self.unicode_form)

    @property
    def is_lower_case(self) -> bool:
        """Returns whether captions are brought into lower case, here or by the tokenizer's own normalizer."""
        return not any(c.isupper() for c in self._normalize_whole("Aa"))

    @property
    def drops_punctuation(self) -> bool:
        """Returns whether punctuation is left out, here or by the tokenizer's own normalizer."""
        return "," not in self._normalize_whole("a, a")

    def _normalize_whole(self, caption: str) -> str:
        """Returns a caption as the tokenizer's model sees it."""
        caption, normalizer = self.normalize(caption), self._tokenizer.normalizer
        return caption if normalizer is None else normalizer.normalize_str(caption)

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `ids`, `mask`, and the word that each token belongs to, int16 `(B, L)`, -1 for none."""
        texts = [self.normalize(c) for c in captions]
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        mask, word_index = np.zeros(ids.shape, bool), np.full(ids.shape, -1, np.int16)
        start = [self.cls] if self.start_token else []
        for row, (text, encoding) in enumerate(zip(texts, self._encode_texts(texts), strict=True)):
            tokens = [*start, *encoding.ids[: self.max_tokens], self.sep]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
            word_index[row, len(start) : len(tokens) - 1] = _number_words(text, encoding)[: self.max_tokens]
        return ids, mask, word_index

    def tokens(self, ids) -> list[tuple[str, bool]]:
        """Returns the token of each id, and whether it is the unknown or the mask token."""
        marked = {self.unknown, self.mask} - {None}
        return [(self._tokenizer.id_to_token(int(i)) or "?", int(i) in marked) for i in ids]

    def _encode_texts(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Encodes texts without the tokens around them. Raises DataError for a text that the tokenizer cannot encode:
        half of a surrogate pair, or a search for its regular expression that exceeds the library's limit."""
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except BaseException as e:
            shown = ascii(texts[0][:60]) if len(texts) == 1 else f"one of {len(texts)} captions"
            raise _as_data_error(e, f"{TOKENIZER_FILE} cannot encode {shown}", "correct the caption") from None

    def _find_ends(self) -> tuple[int | None, int]:
        """Returns the ids of the tokens before and after a caption: those that the tokenizer itself puts around a text,
        the first None if it puts one after it only, else those with one of the usual names. Raises DataError if the
        tokenizer cannot encode a letter."""
        try:
            encoding = self._tokenizer.encode("a")
        except BaseException as e:
            raise _as_data_error(e, f"{TOKENIZER_FILE} cannot encode 'a'", REMEDY) from None
        around = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if special]
        if len(around) == 1 and encoding.special_tokens_mask[-1] and len(encoding.ids) > 1:
            return None, around[0]
        return tuple(around) if len(around) == 2 else (self._find_id(STARTS), self._find_id(ENDS))

    def _find_unknown(self) -> int | None:
        """Returns the id of the unknown token; None if there is none, or it is the end of text as in CLIP, whose
        tokenizer knows every byte."""
        if isinstance(self._tokenizer.model, models.Unigram):
            return json_module.loads(self.json)["model"].get("unk_id")
        name = getattr(self._tokenizer.model, "unk_token", None) or UNK
        number = self._tokenizer.token_to_id(name)
        return None if number in (self.cls, self.sep) else number

    def _find_id(self, names: tuple) -> int:
        """Returns the id of the first of these tokens that exists. Raises DataError if none does."""
        ids = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
        if not ids:
            raise DataError(f"the tokenizer has none of the tokens {', '.join(names)}; use another tokenizer")
        return ids[0]

    def pieces(self, caption: str) -> list[str]:
        """Returns the wordpieces of one caption that are kept, in the order of the encoder's words."""
        return self._tokenize(caption)[: self.max_tokens]

    def words(self, caption: str) -> tuple[list[str], np.ndarray]:
        """Returns the words of one caption as they are written, and the word that each wordpiece belongs to, int64
        `(M,)`. Words beyond the first `max_tokens` pieces are left out."""
        text = self.normalize(caption)
        (encoding,) = self._encode_texts([text])
        word_index = np.unique(_number_words(text, encoding)[: self.max_tokens], return_inverse=True)[1]
        spans = [(0, 0)] * (word_index.max(initial=-1) + 1)
        for word, (start, stop) in zip(word_index, encoding.offsets, strict=False):
            spans[word] = (spans[word][0] if spans[word][1] else start, stop)
        return [text[start:stop].strip() for start, stop in spans], word_index

    def count(self, caption: str) -> int:
        """Returns the number of wordpieces of a caption, including those beyond `max_tokens`."""
        return len(self._tokenize(caption))

    def _tokenize(self, caption: str) -> list[str]:
        """Returns all wordpieces of a caption."""
        return self._encode_texts([self.normalize(caption)])[0].tokens


def _number_words(text: str, encoding: tokenizers.Encoding) -> list[int]:
    """Returns the word that each piece of a text belongs to, numbered from 0 on.

    A word begins where the tokenizer begins one, and at white space: a tokenizer that does not split at it (Gemma's)
    takes a whole caption for one word. A piece of white space alone belongs to the word after it.
    """
    numbers, word, previous, after_space = [], -1, None, False
    for number, (start, stop) in zip(encoding.word_ids, encoding.offsets, strict=True):
        piece = text[start:stop]
        if not after_space and (word < 0 or number != previous or piece[:1].isspace()):
            word += 1
        previous, after_space = number, not piece.strip()
        numbers.append(word)
    return numbers


def _is_trained_here(tokenizer: tokenizers.Tokenizer) -> bool:
    """Returns whether a tokenizer is one of `train_tokenizer`, of a version that has normal forms."""
    normalizer = tokenizer.normalizer
    return normalizer is not None and normalizer.__getstate__() == _make_normalizer().__getstate__()


class EncodedCaptions:
    """Cache of a split's encoded captions. Each is encoded when it is first read; later passes cost no time."""

    def __init__(self, tokenizer: Tokenizer, captions: int):
        self.tokenizer = tokenizer
        shape = captions, tokenizer.length
        self._ids, self._words = np.zeros(shape, np.int32), np.zeros(shape, np.int16)
        self._lengths = np.zeros(captions, np.int16)  # 0: not encoded yet

    def __getstate__(self):  # each reader process fills its own cache
        return self.tokenizer, len(self._lengths)

    def __setstate__(self, state):
        self.__init__(*state)

    def __call__(self, positions: np.ndarray, captions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `Tokenizer.encode` of captions, which have these `positions` in the split."""
        new = np.flatnonzero(self._lengths[positions] == 0)
        if len(new):
            ids, mask, words = self.tokenizer.encode([captions[k] for k in new])
            new_positions = positions[new]
            self._ids[new_positions], self._words[new_positions] = ids, words
            # Lengths are set last: other threads read ids and words only if the length is not 0.
            self._lengths[new_positions] = mask.sum(1)
        mask = np.arange(self._ids.shape[1]) < self._lengths[positions, None]
        return self._ids[positions], mask, self._words[positions]


def read_tokenizer_json(directory) -> str:
    """Returns the text of a data set's `tokenizer.json`. Raises DataError, naming the directory, if the file is missing
    or damaged."""
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; run python -m mefn_jax.data.prepare again")
    text = read_text(path)
    try:
        Tokenizer(text, 1, False, "keep")
    except DataError as e:
        raise DataError(f"{directory}: {e}") from None
    return text
