"""Random galleries with ties, and `rank` on tiles of a given size."""

import numpy as np
import pytest
from hypothesis import strategies as st

from mefn_jax.scoring import ranking


def rank_in_tiles(scores, image_index, tile_images, tile_captions, **options):
    """Returns what `rank` returns, on tiles of at most so many images and captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE_IMAGES", tile_images)
        patch.setattr(ranking, "TILE_CAPTIONS", tile_captions)
        return ranking.rank(lambda r, c: scores[r, c], image_index, **options)


def count_in_tiles(scores, image_index, tile_images, tile_captions):
    """Returns the counts of `rank_in_tiles` for the whole gallery, image to text and text to image."""
    return rank_in_tiles(scores, image_index, tile_images, tile_captions).counts[1]


@st.composite
def galleries(draw):
    """Draws scores with many ties, and the image of each caption: 1 to 4 captions per image, sometimes shuffled."""
    captions = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    image_index = np.repeat(np.arange(len(captions), dtype=np.int32), captions)
    if draw(st.booleans()):
        image_index = image_index[draw(st.permutations(range(len(image_index))))]
    values = draw(st.sampled_from([2, 4, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, values, (len(captions), len(image_index))).astype(np.float32) / values, image_index
