"""The parts of a model: its variables, their constants, and the boxes of its regions."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import precomputed, shapes
from mefn_jax import losses, model, optim
from mefn_jax.encoders.grids import grid_boxes
from mefn_jax.encoders.inputs import dummy_inputs
from mefn_jax.matching import systems
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.sfe import CUES
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring.layouts import region_block, separate_vectors, to_padded
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.setup import make_init

EVIDENCE = {"log_evidence_weight", "log_evidence_lambda"}
HUBNESS = {"images", "texts", "log_scale", "weight"}
SFE_EXTERNAL = {"visual_nodes", "textual_nodes", "image_step", "text_step"}
VISITA_GROUPS = {"log_eta", "region_prototypes", "word_prototypes"}
LEARNED_PARAMETERS = {
    "visita": VISITA_GROUPS | {"log_lambda", "term_logits", "fragments_kernels", "groups_kernels", "whole_kernels"},
    "visita_no_cross": {"whole_kernels"},
    "visita_one_level": {"log_lambda", "term_logits", "fragments_kernels"},
    "sfe": SFE_EXTERNAL | {"log_lambda", "gate_logit"},
    "sfe_no_external": {"log_lambda", "gate_logit"},
    "sfe_no_internal": SFE_EXTERNAL,
    "visita_linear": VISITA_GROUPS | {"log_lambda", "term_logits"},
    "mefn": {"log_lambda", "log_kappa", "gate_logit", *EVIDENCE},
    **{name: {"layer_0"} for name in ("mate", "mate_no_momentum", "mate_no_hect")},
    "mefn_no_entropy": {"log_lambda", "gate_logit"},
    "mefn_no_weights": {"log_lambda", "gate_logit", *EVIDENCE},
    "mefn_no_evidence": {"log_lambda", "log_kappa", "gate_logit"},
    "mefn_no_local": {"log_lambda", "log_kappa", *EVIDENCE},
    "mefn_no_global": {"log_lambda", "log_kappa", *EVIDENCE},
    "mefn_paper": {"log_lambda", "log_kappa", "gate_logit"},
}
LEARNED_PARAMETERS["visita_one_step"] = LEARNED_PARAMETERS["visita"]
LEARNED_PARAMETERS |= {f"sfe_no_{cue}": LEARNED_PARAMETERS["sfe"] for cue in CUES}


def tiny_config(name: str) -> ConfigDict:
    """A system with 4 hub vectors on precomputed regions and cached words, 6 and 5 channels wide."""
    config = precomputed.get_config(f"smoke,model={name}")
    config.image.regions.width, config.text.cached.width, config.matcher.hub_vectors = 6, 5, 4
    return config


@pytest.mark.parametrize("name", sorted(systems.MODELS))
def test_init_makes_every_declared_parameter(name):
    config = tiny_config(name)
    built, (pixels, *words) = model.build_model(config, 50), dummy_inputs(config, 2)
    variables = jax.eval_shape(built.init, jax.random.key(0), pixels, *words)

    def call_every_method(variables):
        images, texts = built.encode_images(variables, pixels), built.encode_texts(variables, *words)
        pair = [jax.tree.map(lambda x: x[0], features) for features in (images, texts)]
        built.score(variables, images, texts)
        built.hub_offsets(variables, images, texts)
        built.image_vectors(variables, images)
        built.text_vectors(variables, texts)
        project_regions, project_words = (functools.partial(f, variables) for f in built.projections)
        layouts = region_block(images, project_regions), to_padded(texts, project_words)
        if built.has_tile:
            built.score_tile(variables, *separate_vectors(*layouts, built.matcher.uses_pooled_products))
        if built.has_pairs:
            prepared = (f(variables, x) for f, x in zip(built.prepare, (images, texts), strict=True))
            built.score_pairs(variables, *prepared)
            built.train_score(variables, images, texts)
            built.fused_similarity(variables, images.pooled, texts.pooled)
        if built.has_attention:
            built.attention(variables, *pair)
            assert {"score", "word_attention"} <= built.explain(variables, *pair).keys()
        return built.scalars(variables)

    jax.eval_shape(call_every_method, variables)  # Flax refuses to read a variable that `init` has not made
    assert set(variables) == {"image", "text", "matcher", "hubness", "loss", "constants"}
    assert set(variables["matcher"]) == LEARNED_PARAMETERS.get(name, set())
    assert set(variables["hubness"]) == HUBNESS
    assert set(variables["loss"]) == set(losses.LOSSES[config.loss.name].initial)
    with config.unlocked():
        config.matcher.hub_vectors = 0
    plain = jax.eval_shape(model.build_model(config, 50).init, jax.random.key(0), pixels, *words)
    assert plain == variables | {"hubness": {}}


class LearnedEmbedding(Matcher, kw_only=True):
    """Embeds an item by a learned map of what its transform adds, and has a constant."""

    def setup(self):
        self.map = self.param("map", nn.initializers.ones, (32, 3))
        self.shift = self.variable("constants", "shift", jnp.zeros, (32,))

    def transform_images(self, images):
        return images.replace(extra={"shifted": images.pooled + self.shift.value})

    transform_texts = transform_images

    def score(self, images, texts):
        return self.embed(images) @ self.embed(texts).T

    def embed(self, features):
        return features.extra["shifted"] @ self.map


def test_init_embeds_with_transforms_and_parameters_of_matcher(monkeypatch):
    monkeypatch.setitem(systems.MODELS, "new", systems.System(LearnedEmbedding))
    config = tiny_config("new")
    built = model.build_model(config, 50)
    variables = jax.eval_shape(built.init, jax.random.key(0), *dummy_inputs(config))
    assert variables["hubness"]["images"].shape == (4, 3)
    assert variables["constants"]["matcher"]["shift"].shape == (32,)


def test_stored_statistics_are_constants():
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.image.arch, config.image.resnet.norm, config.image.region_grids = "resnet", "batch", (4,)
    built = model.build_model(config, 50)
    params, constants = model.split_constants(jax.eval_shape(built.init, jax.random.key(0), *dummy_inputs(config)))
    stored, trained = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (constants, params))
    assert {path.rpartition("/")[2] for path in stored} == {"mean", "var"}
    assert not any(path.endswith(("/mean", "/var")) for path in trained)
    assert {"image/backbone/stem_norm/mean", "image/backbone/stem_norm/var", "text/input_norm/mean"} <= set(stored)
    norms = {path.rpartition("/")[0] for path in trained if path.startswith("image") and path.endswith("_norm/scale")}
    assert norms == {path.rpartition("/")[0] for path in stored if path.startswith("image")}


def test_step_trains_parameters_and_keeps_constants():
    config, mesh = tiny_config("vsepp"), make_mesh(devices=jax.devices()[:1])
    built, hyper = model.build_model(config, 50), hyperparameters_from_config(config, steps=8)
    random_init, rng = make_init(built, config, mesh), np.random.default_rng(0)

    def init(seed):
        variables = random_init(seed)
        return variables | {"constants": jax.tree.map(lambda x: x + 0.5, variables["constants"])}

    params, constants = model.split_constants(jax.device_get(init(hyper.seed)))
    multipliers = optim.lr_multipliers(params, (), 1.0)
    step_config = step.make_step_config(config, built, multipliers)
    current = state.create_state(init, hyper.seed, step_config.make_optimizer(hyper), multipliers, mesh)
    # Two moments of each parameter, besides counters, and none of a constant.
    moments = [leaf.size for leaf in jax.tree.leaves(current.opt_state) if leaf.ndim or leaf.dtype == jnp.float32]
    assert sum(moments) == 2 * state.num_params(params)
    batch = {"images": rng.normal(size=(4, 9, 6)).astype(np.float32), "text_mask": np.ones((4, 16), bool)}
    batch |= {"text": rng.normal(size=(4, 16, 5)).astype(np.float16)}
    batch |= {name: np.arange(4, dtype=np.int32) for name in ("image_index", "caption_index", "epoch", "view")}
    run = step.compile_step(mesh, current, step_config)
    for _ in range(2):  # the learning rate of the first step is 0
        current, _ = run(current, batch, hyper)
    assert jax.tree.leaves(constants)
    jax.tree.map(np.testing.assert_array_equal, current.constants, constants)
    assert jax.tree.structure(current.params) == jax.tree.structure(params)
    for part in ("image", "text", "hubness", "loss"):
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), current.params[part], params[part])
        assert max(jax.tree.leaves(changes)) > 0, part


def test_region_boxes_are_those_of_region_grids():
    config = shapes.get_config("smoke")
    with config.unlocked():
        config.image.region_grids = (4, 2)
    boxes = model.region_boxes(config, model.build_model(config, 50))
    np.testing.assert_array_equal(boxes, np.concatenate([grid_boxes(4, 4), grid_boxes(2, 2)]))
