"""Configurations: every key is checked, arguments are a closed set, messages name what to do."""

import dataclasses
import importlib
import re

import jax
import pytest
from commands import ROOT
from systems import ABLATIONS

from configs import default, flickr30k, precomputed
from mefn_jax import aot, losses
from mefn_jax import config as configuration
from mefn_jax.errors import ConfigError
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.systems import MODELS, matcher_options
from mefn_jax.model import MODEL_CHOICES
from mefn_jax.resolve import check_options, note_contradictions
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.training.step import compile_step

NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if "def get_config" in p.read_text())


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_shipped_configs_are_valid(name, model):
    for smoke in ("", ",smoke"):
        config = load(name, f"model={model}{smoke}")
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)
        assert config.is_locked
        assert config.model == model
        assert set(configuration.flatten(config.to_dict())) == set(
            configuration.flatten(load("default", f"model={model}").to_dict())
        )


ARGUMENTS = [
    *(("flickr30k", f"model=vsepp,image={image},text=gru") for image in flickr30k.IMAGES),
    *(("flickr30k", f"model=vsepp,image=regions,text={text}") for text in flickr30k.TEXTS),
    *(("precomputed", f"model=vsepp,text={text}") for text in precomputed.TEXTS),
    *(("shapes", f"model={model}") for model in sorted(MODELS.keys() - ABLATIONS)),
    ("flickr8k", "model=vsepp"),
]  # every system but some ablations with one configuration, and everything else with one system


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_every_argument_of_a_configuration_makes_a_train_step(name, argument):
    """Traces the train step with the shapes of the data that the configuration is meant for."""
    config = load(name, f"{argument},smoke")
    with config.unlocked():
        config.image.regions.width, config.text.cached.width, config.text.vocab_size = 20, 12, 100
    mesh = make_mesh(devices=jax.devices()[:1])
    step_config, *arguments = aot.abstract_train_step(config, mesh)
    _, metrics = jax.eval_shape(compile_step(mesh, arguments[0], step_config), *arguments)
    assert metrics.keys() == {"loss", "grad_norm"}


def test_every_option_has_a_comment():
    for line in (ROOT / "configs" / "default.py").read_text().split("def finish")[0].splitlines():
        if re.match(r"    c\.[\w.]+ = ", line) and "ConfigDict()" not in line:
            assert "  # " in line, line
    for matcher in {system.matcher for system in MODELS.values()}:
        for name in fields(matcher):
            assert re.search(rf"\n +(\w+, )?{name}[:,]", matcher.__doc__ + Matcher.__doc__), (matcher, name)


def fields(matcher):
    """The names of the options that a matcher's class declares."""
    return {field.name for field in dataclasses.fields(matcher)} - {"parent", "name"}


# Numbers that are checked in another way: in an interval, together with others, or of which all are meant.
OTHER_NUMBERS = {
    *("augment.crop", "augment.flip", "image.crop", "train.layer_decay"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "text.bert.pad_id", "loss.hard_negative_ramp"),
}


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_number_has_a_limit_and_every_list_a_type(model):
    limited = {*configuration.POSITIVE, *configuration.NOT_NEGATIVE, *configuration.PROBABILITIES, *OTHER_NUMBERS}
    listed = {*configuration.LIST_TYPES, *configuration.SETS, "image.mean", "image.std"}
    for key, value in configuration.flatten(default.base(model).to_dict()).items():
        assert type(value) not in (int, float) or key in limited, key
        assert type(value) is not list or key in listed, key


@pytest.mark.parametrize("model", sorted(MODELS))
def test_matcher_options_are_fields_of_class(model):
    assert set(load("default", f"model={model}").matcher) == fields(MODELS[model].matcher)
    if model.startswith("scan"):
        scan = {"direction", "aggregate", "inverse_temperature", "lse_factor"}
        assert set(matcher_options(model)) == scan | {"hub_vectors", "init_hub_scale"}


def test_finish_keeps_overridden_defaults_and_sets_required_options():
    config = default.base("scan_t2i_lse")
    assert (config.loss.hard_negative_ramp, config.matcher.inverse_temperature) == (500, 9.0)
    changes = {"loss.hard_negative_ramp": 7, "matcher.inverse_temperature": 5.0, "matcher.direction": "i2t"}
    for key, value in changes.items():
        configuration.set_dotted(config, key, value)
    config = default.finish(config, {"smoke": False})
    assert (config.loss.hard_negative_ramp, config.matcher.inverse_temperature) == (7, 5.0)
    assert config.matcher.direction == "t2i"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_note_contradictions_names_required_option(model, capsys):
    for name in NAMES:
        note_contradictions(load(name, f"model={model}"))
    assert capsys.readouterr().out == ""
    config = load("default", f"model={model}")
    for key, value in MODELS[model].requires.items():
        other = {str: "other", tuple: ("other",), bool: True, int: 9, float: 7.0}[type(value)]
        configuration.set_dotted(config, key, other)
        note_contradictions(config)
        note = f"note: model={model} is defined by {key}={value}, but {key}={other} is used\n"
        assert capsys.readouterr().out == note
        configuration.set_dotted(config, key, value)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("mdoel=mefn", "unknown configuration argument 'mdoel', did you mean 'model'?; known are model, smoke"),
        ("smoke=1", "'smoke' takes no value"),
        ("model", "'model' needs a value"),
        ("model=mefn_no_entrop", "model: 'mefn_no_entrop' is not one of mefn, mefn_no_entropy"),
    ],
)
def test_get_config_refuses_unknown_argument(arg, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("default", arg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "mefn_no_entrop", "did you mean 'mefn_no_entropy'"),
        ("image.arch", "vgg", "image.arch: 'vgg' is not one of resnet, vit"),
        ("matcher.local", "all", "matcher.local: 'all' is not one of"),
        ("loss.triplet_weight", -1.0, "loss.triplet_weight: -1.0 must not be negative"),
        ("train.batch_size", 0, "train.batch_size: 0 must be greater than 0"),
        ("train.steps", 5, "train.steps=5 and train.epochs=30.0: set exactly one"),
        ("train.warmup_fraction", 1.0, "train.warmup_fraction"),
        ("train.steps", -5, "train.steps: -5 must not be negative"),
        ("train.seed", -1, "train.seed: -1 must not be negative"),
        ("data.workers", -1, "data.workers: -1 must not be negative"),
        ("data.scenes", (10, 5), "data.scenes: (10, 5) must be three numbers"),
        ("eval.score_tile_mib", -1.0, "eval.score_tile_mib: -1.0 must not be negative"),
        ("image.size", -1, "image.size: -1 must not be negative"),
        ("image.crop", 1.5, "image.crop: 1.5 must be in (0, 1]"),
        ("image.size", 10**9, "image.size: 1000000000 must be at most 4096"),
        ("image.mean", (0.5,), "image.mean: (0.5,) must be three numbers"),
        ("image.mean", (0.5, float("nan"), 0.5), "image.mean: nan is not a number of at most"),
        ("image.std", (0.5, 0.0, 0.5), "image.std: (0.5, 0.0, 0.5) must be above 0"),
        ("image.std", (0.5, 0.5, -1.0), "image.std: (0.5, 0.5, -1.0) must be above 0"),
        ("image.std", (0.5, float("inf"), 0.5), "image.std: inf is not a number of at most"),
        ("image.std", ("a", 0.5, 0.5), "image.std: ('a', 0.5, 0.5) must be three numbers"),
        ("image.vit.pool", "max", "image.vit.pool: 'max' is not one of mean, class, pooler"),
        ("image.resnet.norm", "layer", "image.resnet.norm: 'layer' is not one of group, batch"),
        ("text.bert.activation", "mish", "text.bert.activation: 'mish' is not one of gelu"),
        ("text.bert.dropout", 2.0, "text.bert.dropout: 2.0 must be in [0, 1)"),
        ("train.layer_decay", 0.0, "train.layer_decay: 0.0 must be in (0, 1]"),
        ("image.region_grids", (), "image.region_grids: () must be numbers above 0"),
        ("image.region_grids", (7, 7, 7, 7, 7), "image.region_grids: 5 grids, but the ResNet has 4 stages"),
        ("image.resize", "stretch", "image.resize: 'stretch' is not one of crop, squash, squash_crop"),
        ("train.dtype", "float16", "train.dtype: 'float16' is not one of float32, bfloat16"),
        ("text.bert.heads", 7, "text.bert.width=768 is not a multiple of text.bert.heads=7"),
        ("loss.anchors", "images", "loss.anchors: 'images' is not one of both, image, text, did you mean 'image'?"),
        ("data.views", 0, "data.views: 0 must be greater than 0"),
        ("data.views", 3, "train.batch_size=128 is not a multiple of data.views=3, the rows of a pair"),
        ("text.max_tokens", 600, "exceeds text.bert.max_positions=512"),
        ("image.region_grids", ("a",), "image.region_grids: 'a' must be a whole number"),
        ("image.region_grids", (2.5,), "image.region_grids: 2.5 must be a whole number"),
        ("train.lr_multipliers", (3,), "train.lr_multipliers: 3 must be a text"),
        ("image.resnet.depths", (-1, 4, 6, 3), "image.resnet.depths: -1 must be greater than 0"),
        ("image.resnet.widths", (8, 8), "and image.resnet.widths=(8, 8): give one number for each stage in both"),
        ("text.bert.layers", -1, "text.bert.layers: -1 must be greater than 0"),
        ("text.gru.layers", 0, "text.gru.layers: 0 must be greater than 0"),
    ],
)
def test_check_config_names_impossible_value(key, value, message):
    config = load("default").unlock()
    section, _, name = key.rpartition(".")
    target = configuration.get_dotted(config, section) if section else config
    target[name] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("direction", "both", "matcher.direction: 'both' is not one of t2i, i2t"),
        ("aggregate", "max", "matcher.aggregate: 'max' is not one of lse, avg"),
        ("inverse_temperature", 0.0, "matcher.inverse_temperature: 0.0 must be greater than 0"),
        ("lse_factor", -1.0, "matcher.lse_factor: -1.0 must be greater than 0"),
        ("hub_vectors", -1, "matcher.hub_vectors: -1 must not be negative"),
    ],
)
def test_check_config_names_impossible_option_of_scan(key, value, message):
    config = load("default", "model=scan_t2i_lse")
    config.matcher[key] = value
    with pytest.raises(ConfigError, match=message):
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", 100, r"image.size=100 is not a multiple of image.vit.patch=16"),
        ("vit.position_grid", (3,), r"image.vit.position_grid: \(3,\) must be two numbers, rows and columns, or \(\)"),
        ("vit.heads", 7, r"image.vit.width=384 is not a multiple of image.vit.heads=7"),
    ],
)
def test_check_config_names_sizes_that_do_not_divide(key, value, message):
    config = load("default")
    config.update_from_flattened_dict({"image.arch": "vit", f"image.{key}": value})
    with pytest.raises(ConfigError, match=message):
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)
    config.image.pretrained = "somewhere"  # the checkpoint's own sizes will be used
    configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.lerning_rate", "train.lerning_rate is no option of model=vsepp, did you mean 'train.learning_rate'?"),
        ("matcher.share", "matcher.share is no option"),  # of another system
        ("data.paths.one", "data.paths is no option"),
    ],
)
def test_check_options_names_option_that_only_a_file_has(key, message):
    config = default.base("vsepp")
    first, *others = key.split(".")[1:]
    config[key.split(".")[0]][first] = {others[0]: 1} if others else 0.1
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_options(default.finish(config, {"smoke": False}))


def test_diff_configs_names_dotted_keys():
    old, new = load("default").to_dict(), load("default", "model=vsepp").to_dict()
    expected = {"model": ("mefn", "vsepp"), "loss.hard_negative_ramp": (-1, 500)}
    options = matcher_options("mefn")
    missing = options.keys() - matcher_options("vsepp").keys()
    assert configuration.diff_configs(old, new) == expected | {f"matcher.{k}": (options[k], None) for k in missing}
    assert configuration.diff_configs({"a": (1, 2)}, {"a": [1, 2]}) == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop", 0.0, r"augment.crop: 0.0 must be in \(0, 1\]"),
        ("flip", 1.5, r"augment.flip: 1.5 must be in \[0, 1\]"),
        ("word_noise", 1.0, r"augment.word_noise: 1.0 must be in \[0, 1\)"),
        ("color_jitter", 0.1, "augment.color_jitter=0.1 changes pixels, but image.arch=regions has none"),
    ],
)
def test_check_config_names_impossible_augmentation(key, value, message):
    config = load("flickr30k", "image=regions")
    config.augment[key] = value
    with pytest.raises(ConfigError, match=message):
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)


def test_check_config_refuses_pretrained_image_tower_for_regions():
    config = load("flickr30k", "image=regions").unlock()
    config.image.pretrained = "somewhere"
    with pytest.raises(ConfigError, match=r"image.pretrained=somewhere is an image tower, but image.arch=regions"):
        configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)


@pytest.mark.parametrize("name", flickr30k.IMAGES)
def test_config_argument_selects_full_size_towers(name):
    text = {"clip": "clip", "siglip": "siglip"}.get(name.partition("_")[0].rstrip("2"), "bert")
    config = load("flickr30k", f"image={name},text={text}")
    configuration.check_config(config, MODEL_CHOICES | losses.LOSS_CHOICES)
    assert config.image.arch == ("resnet" if "resnet" in name else "regions" if name == "regions" else "vit")
    assert config.text.arch == text
    with pytest.raises(ConfigError, match="image=vgg19 is not one of resnet101, resnet50, vit_b16, clip_vit_b32"):
        load("flickr30k", "image=vgg19")
