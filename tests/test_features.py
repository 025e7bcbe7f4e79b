"""`make_features`: unit lengths and masks."""

import numpy as np
from random_features import random_features


def test_make_features_zeroes_masked_fragments_and_normalizes_the_rest():
    features = random_features(1, 1, 5, 6, np.array([[1, 0, 1, 0, 0]], bool))
    lengths = np.linalg.norm(features.fragments[0], axis=-1)
    assert lengths[1] == lengths[3] == lengths[4] == 0
    np.testing.assert_allclose(lengths[[0, 2]], 1, rtol=1e-6)
