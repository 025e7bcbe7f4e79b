"""A configuration, fitted to its data."""

import pytest
from sample_data import write_precomputed

from configs import flickr30k
from mefn_jax.data.dataset import Dataset
from mefn_jax.data.from_config import fill_data_widths
from mefn_jax.errors import ConfigError


def test_fill_data_widths_refuses_data_that_does_not_fit(tmp_path, prepared):
    config = flickr30k.get_config("image=regions")
    for split, width in (("train", 8), ("dev", 7)):
        write_precomputed(tmp_path / "x", split, 6, shape=(5, width))
    data = Dataset(tmp_path / "x")
    filled = fill_data_widths(config, data.split("train"))
    assert filled.image.regions.width == 8
    with pytest.raises(ConfigError, match=r"regions are 7 wide, but image.regions.width=8"):
        fill_data_widths(filled, data.split("dev"))
    with pytest.raises(ConfigError, match=r"image.arch=regions takes regions, but the data set has images"):
        fill_data_widths(config, Dataset(prepared).split("train"))
