"""Options that `train.init=cca` does not support."""

import pytest

from configs import precomputed
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation import cca


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image.regions.projection", "mlp", "with image.regions.projection=linear"),
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
