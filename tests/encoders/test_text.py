"""The text encoder: padding and the order of words."""

import jax
import numpy as np

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.text import TextEncoder


def test_text_encoder_ignores_padding():
    module = TextEncoder(BERT(vocab_size=20, width=16, layers=2, heads=2, mlp_width=32, max_positions=16), 12)
    ids = np.array([[2, 7, 8, 3, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 3]], np.int32)
    params = module.init(jax.random.key(0), ids, ids != 0)
    features = module.apply(params, ids, ids != 0)
    np.testing.assert_array_equal(features.mask.sum(1), [2, 1, 5])
    assert np.all(np.asarray(features.fragments)[~np.asarray(features.mask)] == 0)
    short = module.apply(params, ids[:2, :4], ids[:2, :4] != 0)
    np.testing.assert_allclose(short.fragments, features.fragments[:2, :2], atol=1e-5)
    np.testing.assert_allclose(short.pooled, features.pooled[:2], atol=1e-5)
    other = np.where(ids == 0, 11, ids)  # masked tokens have no effect
    np.testing.assert_allclose(module.apply(params, other, ids != 0).pooled, features.pooled, atol=1e-6)


def test_text_encoder_sees_word_order():
    module = TextEncoder(BERT(vocab_size=20, width=16, layers=1, heads=2, mlp_width=32, max_positions=16), 12)
    ids = np.array([[2, 5, 6, 3], [2, 6, 5, 3]], np.int32)
    features = module.apply(module.init(jax.random.key(0), ids, ids != 0), ids, ids != 0)
    assert np.abs(features.pooled[0] - features.pooled[1]).max() > 1e-3
