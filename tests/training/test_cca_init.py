"""What `train.init=cca` sets to 0, and the options that it does not support."""

import jax
import numpy as np
import pytest

from configs import precomputed
from mefn_jax.encoders.regions import RegionEncoder
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation import cca
from mefn_jax.features import unit
from mefn_jax.training.cca_init import zero_residuals


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image.arch", "vit", "needs image.arch=regions, but it is vit"),
        ("text.arch", "gru", "text.arch=gru has no projection"),
        ("image.pooling", "max", "image.pooling is max"),
        ("text.pooling", "max", "text.pooling is max"),
    ],
)
def test_check_supports_cca_names_unsupported_option(key, value, message):
    config = precomputed.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        cca.check_supports_cca(config)


def test_zero_residuals_makes_pooled_embedding_projected_mean():
    regions = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)
    encoder = RegionEncoder(8, "mlp", "esa")
    variables = jax.jit(encoder.init)(jax.random.key(0), regions)
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    zeroed = zero_residuals(params)
    assert all(np.any(zeroed[name]["kernel"]) for name in ("regions", "mlp_in"))
    projected = np.mean(regions, 1) @ params["regions"]["kernel"] + params["regions"]["bias"]

    def pool(params):
        return jax.jit(encoder.apply)(variables | {"params": params}, regions).pooled

    np.testing.assert_allclose(pool(zeroed), unit(projected), atol=1e-5)
    assert np.abs(pool(params) - pool(zeroed)).max() > 1e-3
