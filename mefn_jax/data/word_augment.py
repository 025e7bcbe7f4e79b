"""Word noise: random changes of whole words of training captions, as in VSE-infinity (Chen et al. 2021)."""

import functools
import re
import unicodedata

import numpy as np

# Words for left and right by language, as patterns of whole words in lower case. If a pattern also matches another
# word, some images are needlessly not mirrored, which does no harm.
SIDE_WORDS = {
    "English": r"(left|right)(most|wards?|hand(ed)?|side)?",
    "German": r"(links|rechts)\w*|(link|recht)e[mnrs]?",
    "Dutch, Afrikaans": r"(linker|rechter|regter)\w*|(links|rechts|regs)e?",
    "French": r"gauches?|droite?s?",
    "Spanish": r"izquierd\w*|derech\w*|izda|dcha",
    "Portuguese, Galician": r"esquerd\w*|direit\w*|dereit\w*",
    "Catalan": r"esquerr\w*|dret\w?s?",
    "Italian": r"sinistr\w*|destr[aeio]",
    "Romanian": r"st[aâ]ng\w*|dreapt\w*|drept\w*",
    "Swedish": r"vänst\w*|höger\w*|högra",
    "Danish, Norwegian": r"venst\w*|højre\w*|høyre\w*|høgre\w*",
    "Icelandic, Faroese": r"vinstr[ai]|hægr[ai]|høgr[aiu]",
    "Finnish, Estonian": r"vasen|vasem\w*|vasak\w*|oikea\w*|oikeal\w*|parem\w*",
    "Latvian, Lithuanian": r"kreis\w*|labaj\w*|kair\w*|dešin\w*",
    "Polish": r"(lew|praw)(o|y|a|ą|e|ej|ego|emu|ym|ą)",
    "Czech, Slovak": r"(v|na|do|z)?(lev|ľav|prav)(o|ý|á|é|ou|ú|ého|ém|ej|a)",
    "Croatian, Serbian, Slovene": r"lijev\w*|lev[aeiou]|levoj|levem|desn\w*|nadesno|lijevo|ulijevo|udesno",
    "Hungarian": r"bal|bal(ra|ról|on|oldal\w*)|jobb\w*",
    "Turkish, Azerbaijani": r"sol|sol(da|daki|una|unda|undaki|dan|a)|sağ\w*",
    "Albanian": r"majt\w*|djatht\w*",
    "Basque": r"ezker\w*|eskuin\w*|eskubi\w*",
    "Esperanto": r"(mal)?dekstr\w*",
    "Vietnamese": r"trái|phải",
    "Indonesian, Malay, Filipino": r"kiri|kanan|kaliwa",
    "Swahili": r"kushoto|kulia",
}
# Parts of such words, for languages that write prefixes or no spaces.
SIDE_PARTS = {
    "Greek": "αριστερ|δεξ[ιί]",
    "Russian, Ukrainian, Bulgarian, Serbian": "лев|лів|ляв|прав|десн|дясн|лијев",
    "Kazakh, Mongolian": "сол|оң|зүүн|баруун",
    "Chinese": "[左右]",
    "Japanese": "ひだり|みぎ|ヒダリ|ミギ",
    "Korean": "왼|오른|좌|우측",
    "Thai, Lao": "ซ้าย|ขวา|ຊ້າຍ|ຂວາ",
    "Khmer, Burmese": "ឆ្វេង|ស្តាំ|ស្ដាំ|ဘယ်|ညာ",
    "Hindi, Marathi, Nepali": "बाएँ|बाएं|बाय|बाई|बायाँ|दाएँ|दाएं|दाय|दाई|दाहिन|डाव|उजव|देब्रे",
    "Bengali": "বাম|বাঁ|ডান",
    "Gujarati, Punjabi": "ડાબ|જમણ|ਖੱਬ|ਸੱਜ",
    "Tamil, Telugu, Kannada, Malayalam": "இட|வல|ఎడమ|కుడి|ಎಡ|ಬಲ|ഇട|വല",
    "Arabic": "يسار|يمين|أيسر|أيمن|ايسر|ايمن|يسرى|يمنى|شمال",
    "Persian, Urdu": "چپ|راست|بائیں|دائیں|بایاں|دایاں",
    "Hebrew": "שמאל|ימין|ימני|ימנית",
    "Georgian, Armenian, Amharic": "მარცხ|მარჯვ|ძախ|ձախ|աջ|ግራ|ቀኝ",
}
WORD = re.compile(r"\w+")
SIDE_WORD, SIDE_PART = re.compile("|".join(SIDE_WORDS.values())), re.compile("|".join(SIDE_PARTS.values()))
COMMON_ENGLISH = re.compile(
    r"\b(the|and|with|of|while|wearing|standing|sitting|walking|playing|holding|looking|next|near|front|man|woman|men|"
    r"women|people|person|child|children|boy|girl|young|dog|two|three|white|black|red|blue|green)\b",
    re.IGNORECASE,
)
ENGLISH_SHARE = 0.25  # of captions that have a word of COMMON_ENGLISH; in photograph captions it is above 0.9
SIDES_SHARE = 1 / 2000  # of captions that mention left or right; of those of Flickr8k, 1 in 230 does
# Cumulative fractions: half of the changed words are masked, a tenth is replaced, the rest is dropped.
MASKED, REPLACED = 0.5, 0.6


def mentions_side(caption: str) -> bool:
    """Returns whether a caption mentions left or right, in any language of the tables, so that its image must not be
    mirrored."""
    caption = unicodedata.normalize("NFKC", caption).lower()
    if not caption.isascii() and SIDE_PART.search(caption):
        return True
    return any(map(_is_side, WORD.findall(caption)))


@functools.lru_cache(100_000)
def _is_side(word: str) -> bool:
    """Returns whether a word is one of SIDE_WORDS."""
    return SIDE_WORD.fullmatch(word) is not None


def knows_sides(captions: list[str]) -> bool:
    """Returns whether `mentions_side` knows the language of these captions, a sample of a data set: whether they are
    English, or enough of them mention left or right. One in a large sample may be a word of another language that only
    looks the same."""
    num_english = sum(COMMON_ENGLISH.search(caption) is not None for caption in captions)
    if num_english >= ENGLISH_SHARE * len(captions):
        return True
    num_sides = sum(map(mentions_side, captions))
    return num_sides > 0 and num_sides >= SIDES_SHARE * len(captions)


def add_word_noise(
    ids: np.ndarray, mask: np.ndarray, words: np.ndarray, rate: float, rng: np.random.Generator, tokenizer
):
    """Changes each word with probability `rate`: masks it, replaces it by random wordpieces, or drops it.

    `ids` int32 and `mask` bool `(L,)` are one encoded caption, and `words` int `(L,)` is the word that each token
    belongs to, -1 for none. Returns new `ids` and `mask`. If all words of a caption were to be dropped, none is. With a
    tokenizer that has no mask token (CLIP's), words are dropped instead of masked.
    """
    num_words = int(words.max()) + 1
    if not num_words:
        return ids, mask
    draws = rng.random(num_words) / rate  # below 1 with probability `rate`
    random_ids = rng.choice(tokenizer.ordinary, len(ids))
    masked, replaced, changed = draws < MASKED, (draws >= MASKED) & (draws < REPLACED), draws < 1
    if tokenizer.mask is None:
        masked = np.zeros(num_words, bool)
    dropped = changed & ~masked & ~replaced
    dropped &= not dropped.all()
    new_ids = np.where(_select_tokens(words, replaced), random_ids, ids)
    new_ids = np.where(_select_tokens(words, masked), tokenizer.mask, new_ids) if masked.any() else new_ids
    kept_ids = new_ids[mask & ~_select_tokens(words, dropped)]
    ids = np.full_like(ids, tokenizer.pad)
    ids[: len(kept_ids)] = kept_ids
    return ids, np.arange(len(ids)) < len(kept_ids)


def _select_tokens(words: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Returns which tokens belong to the selected words, bool `(L,)`; `selected` is bool `(num_words,)`."""
    return (words >= 0) & selected[words]
