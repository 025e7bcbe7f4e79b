"""Word noise: the rates of VSE-infinity, whole words, and captions that name a side."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax.data import tokenizer as tok
from mefn_jax.data import word_augment

TEXTS = ["a dog runs on the grass", "two children playing", "unbelievable", "red car"]
TOKENIZER = tok.Tokenizer(tok.train_tokenizer(TEXTS * 3, 60, True, "keep"), 20, True, "keep")


def add_noise(caption, rate, seed, tokenizer=TOKENIZER):
    ids, mask, word_of_piece = (x[0] for x in tokenizer.encode([caption]))
    noisy = word_augment.add_word_noise(ids, mask, word_of_piece, rate, np.random.default_rng(seed), tokenizer)
    return ids, mask, word_of_piece, *noisy


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([*TEXTS, "zebra dog", ""]), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_word_noise_keeps_ends_and_follows_seed(caption, rate, seed):
    ids, mask, _, new, new_mask = add_noise(caption, rate, seed)
    number = int(new_mask.sum())
    assert new.shape == ids.shape
    assert new.dtype == ids.dtype
    assert new_mask[:number].all()
    assert (new[number:] == TOKENIZER.pad).all()
    assert new[0] == TOKENIZER.cls
    assert new[number - 1] == TOKENIZER.sep
    assert min(3, mask.sum()) <= number <= mask.sum()  # a caption never becomes empty
    repeated = add_noise(caption, rate, seed)
    np.testing.assert_array_equal(new, repeated[3])


def test_word_noise_has_rates_of_vse_infinity():
    rate, caption, counts = 0.2, "a dog runs on the grass two red car", np.zeros(3)
    for seed in range(3000):
        ids, mask, _, new, new_mask = add_noise(caption, rate, seed)
        dropped = mask.sum() - new_mask.sum()
        masked = np.sum(new == TOKENIZER.mask)
        old = ids[mask].tolist()
        inserted = sum(i not in old for i in new[new_mask].tolist()) - masked
        counts += dropped, masked, inserted
    dropped, masked, replaced = counts / (3000 * (mask.sum() - 2))
    assert masked == pytest.approx(0.5 * rate, rel=0.06)
    assert dropped == pytest.approx(0.4 * rate, rel=0.06)
    assert 0 < replaced <= 0.11 * rate  # a random wordpiece may also stand in the caption


def test_word_noise_changes_whole_words():
    caption = "unbelievably dogs"
    _, _, word_of_piece, *_ = add_noise(caption, 0.5, 0)
    lengths = np.bincount(word_of_piece[word_of_piece >= 0])
    assert (lengths > 1).all()
    possible = {0, *lengths.tolist(), int(lengths.sum())}
    for seed in range(300):
        _, mask, _, new, new_mask = add_noise(caption, 0.5, seed)
        assert np.sum(new == TOKENIZER.mask) in possible
        assert mask.sum() - new_mask.sum() in possible


def test_word_noise_drops_words_without_mask_token():
    class NoMask:
        mask, pad, ordinary = None, TOKENIZER.pad, TOKENIZER.ordinary

    ids, mask, word_of_piece = (x[0] for x in TOKENIZER.encode(["a dog runs on the grass"]))
    dropped = []
    for seed in range(1000):
        new, new_mask = word_augment.add_word_noise(ids, mask, word_of_piece, 0.2, np.random.default_rng(seed), NoMask)
        assert TOKENIZER.mask not in new
        dropped.append(mask.sum() - new_mask.sum())
    assert np.mean(dropped) / (mask.sum() - 2) == pytest.approx(0.9 * 0.2, rel=0.1)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog left of a cat", True),
        ("the RIGHT hand", True),
        ("bright leftovers", False),
        ("Left, then", True),
        ("the leftmost", True),
        ("copyright", False),
    ],
)
def test_mentions_side_finds_left_and_right(caption, expected):
    assert word_augment.mentions_side(caption) == expected


SIDES = """
ein Hund links neben einem Baum|der rechte Mann winkt|in der linken Hand|un chien à gauche d'un arbre|la fille de droite
un perro a la izquierda|en su mano derecha|um cão à esquerda|o homem da direita|un cane a sinistra|la mano destra
een hond links van een boom|in zijn rechterhand|en hund till vänster|i höger hand|en hund til venstre|høyre hånd
koira puun vasemmalla puolella|oikeassa kädessä|pies po lewej stronie|w prawej ręce|pes vlevo od stromu|pravá ruka
pas lijevo od stabla|desna ruka|kutya a fa bal oldalán|a jobb kezében|köpek solda|sağ elinde
un câine în stânga copacului|mâna dreaptă|собака слева от дерева|в правой руке|собака ліворуч|куче вляво от дървото
ένας σκύλος αριστερά|στο δεξί χέρι|כלב משמאל לעץ|ביד ימין|كلب على يسار الشجرة|في يده اليمنى|سگی در سمت چپ درخت
पेड़ के बाईं ओर एक कुत्ता|दाहिने हाथ में|গাছের বাম দিকে একটি কুকুর|ডান হাতে|หมาอยู่ทางซ้าย|มือขวา|狗在树的左边|右手
木の右側にいる犬|ひだりの犬|나무 왼쪽에 있는 개|오른손에|con chó ở bên trái|tay phải|seekor anjing di kiri
tangan kanan|mbwa kushoto mwa mti|gos a l'esquerra|a mà dreta
'n hond links van 'n boom|in sy regterhand|die seun regs|i høgre hand|vinstra megin|í høgru hond
"""


@pytest.mark.parametrize("caption", [c for line in SIDES.strip().splitlines() for c in line.split("|")])
def test_mentions_side_in_other_languages(caption):
    for form in ("NFC", "NFD"):
        assert word_augment.mentions_side(unicodedata.normalize(form, caption))
        assert word_augment.mentions_side(unicodedata.normalize(form, caption.upper()))


@pytest.mark.parametrize(
    "caption",
    [
        "a dog runs across solid ground, soldiers destroy a bridge",
        "a labrador and prawns, a lever on a linked chain",
        "a level field of dressed people",
        "ein Hund läuft über das Gras",
        "un chien court",
        "狗在跑",
        "犬が走る",
        "собака бежит",
    ],
)
def test_mentions_side_leaves_other_words_alone(caption):
    assert not word_augment.mentions_side(caption)


def test_knows_sides_of_english_and_of_languages_in_its_tables():
    assert word_augment.knows_sides(["two dogs playing", "a man in a red shirt", "snow"])
    assert word_augment.knows_sides(["ein Hund rennt", "eine Katze links"])
    unknown = ["hundur hleypur", "köttur sefur", "maður gengur"]
    assert not word_augment.knows_sides(unknown)
    # One word that only looks like a side, in many captions, is no sign of a known language.
    assert not word_augment.knows_sides([*unknown * 1000, "hundur bal"])
    assert word_augment.knows_sides([*unknown * 1000, *["hundur til vinstri"] * 2])
