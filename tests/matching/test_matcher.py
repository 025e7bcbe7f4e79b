"""The contract of a matcher carries new systems: several pooled views, and a Transformer over each pair. Both are tiny
matchers, trained and evaluated by the functions behind the commands."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes
from mefn_jax import model
from mefn_jax.encoders.pooling import max_pool
from mefn_jax.evaluation import evaluate
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.features import Features, unit
from mefn_jax.matching import systems
from mefn_jax.matching.matcher import Matcher
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.training import loop


class TwoViews(nn.Module):
    """An encoder's Features with a second pooled view of another width in `extra`."""

    encoder: nn.Module

    @nn.compact
    def __call__(self, *inputs, **options):
        features = self.encoder(*inputs, **options)
        view = unit(nn.Dense(24, name="view")(max_pool(features.fragments, features.mask)))
        return features.replace(extra={"view": view})


class Views(Matcher, kw_only=True):
    """Scores a pair by a learned mean of the cosines of its views."""

    @nn.compact
    def score(self, images: Features, texts: Features):
        weight = nn.sigmoid(self.param("weight", nn.initializers.zeros, ()))
        return (1 - weight) * images.pooled @ texts.pooled.T + weight * images.extra["view"] @ texts.extra["view"].T


class Fusion(Matcher, kw_only=True):
    """A Transformer block over the fragments of image i and text j together, for all pairs."""

    @nn.compact
    def score(self, images: Features, texts: Features):
        counts = len(images.mask), len(texts.mask)

        def pairs(v, t):
            v = jnp.broadcast_to(v[:, None], (*counts, *v.shape[1:]))
            t = jnp.broadcast_to(t[None], (*counts, *t.shape[1:]))
            return jnp.concatenate([v, t], 2)

        x, mask = pairs(images.fragments, texts.fragments), pairs(images.mask, texts.mask)
        attended = nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=mask[..., None, None, :])
        x = jnp.sum(nn.LayerNorm(name="norm")(x + attended) * mask[..., None], 2) / jnp.sum(mask, 2)[..., None]
        return jnp.tanh(0.1 * nn.Dense(1, name="score")(x)[..., 0])


@pytest.fixture
def name(request, monkeypatch):
    """The name of a matcher that is added to the tables of `model.py`, as one line there would do."""
    monkeypatch.setitem(systems.MODELS, request.param.__name__, systems.System(request.param))
    monkeypatch.setitem(model.MODEL_CHOICES, "model", tuple(systems.MODELS))
    if request.param is Views:
        for kind in ("build_image_encoder", "build_text_encoder"):
            make = getattr(model, kind)
            monkeypatch.setattr(model, kind, lambda *args, make=make: TwoViews(make(*args)))
    return request.param.__name__


@pytest.mark.parametrize("name", [pytest.param(Views, marks=pytest.mark.slow), Fusion], indirect=True)
def test_new_matcher_is_trained_and_evaluated(name, tmp_path):
    config = shapes.get_config(f"smoke,model={name}")
    with config.unlocked():
        config.train.steps, config.train.eval_every = 4, 4
    loop.train(config, tmp_path)
    report = evaluate.evaluate(TrainedRun(tmp_path, "latest"), Gallery()).report
    assert report["config"]["model"] == name
    assert report["rsum"] > 0
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 4
    with np.load(tmp_path / "eval" / "test" / "ranks.npz") as ranks:
        assert ranks["i2t"].shape == (24,)


@pytest.mark.parametrize("name", [Views, Fusion], indirect=True)
def test_new_matcher_has_gradients_for_every_parameter(name):
    config = shapes.get_config(f"smoke,model={name}")
    built = model.build_model(config, vocab_size=50)
    images, texts = jnp.zeros((2, 64, 64, 3), jnp.uint8).at[0].set(200), jnp.array([[1, 5, 6, 2], [1, 7, 2, 0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    params = built.init(jax.random.key(0), images, texts, mask)

    @jax.jit
    def gradient(params):
        def loss(params):
            v, t = built.encode_images(params, images), built.encode_texts(params, texts, mask)
            return jnp.sum(built.score(params, v, t) * jnp.array([[1.0, 2.0], [3.0, -4.0]]))

        return jax.grad(loss)(params)

    flat = jax.tree_util.tree_leaves_with_path(gradient(params)["matcher"])
    assert flat
    for path, g in flat:
        assert np.all(np.isfinite(g)), path
        # A key's bias adds the same number to all logits of a softmax, so it has no gradient.
        assert np.any(np.abs(g) > 1e-9) or "key" in jax.tree_util.keystr(path), path
