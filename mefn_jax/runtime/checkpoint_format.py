"""The format of checkpoints: its number, and a step from each earlier format to the next."""

import copy
import functools

from mefn_jax.errors import CheckpointError
from mefn_jax.runtime.formats import Format


def _upgrade_1(meta: dict) -> dict:
    """Adds what was not stored: checksums, a digest of the data, and the number of training examples seen."""
    return meta | {"checksum": None, "data": None, "examples": meta["step"] * meta["config"]["train"]["batch_size"]}


# Options of towers and LoRA that format 3 added, with what the code did before.
ADDED_OPTIONS = {
    "image.vit.registers": 0,
    "image.vit.antialias": False,
    "image.vit.rotation_base": 0.0,
    "image.vit.key_bias": True,
    "image.vit.gated": False,
    "image.vit.layer_scale": False,
    "text.start_token": True,
    "text.bert.pad_id": -1,
    "text.bert.distance_buckets": 0,
    "train.lora.rank": 0,
    "train.lora.alpha": 16.0,
    "train.lora.matrices": "attention/(query|value)/kernel$",
}
ADDED_SIGLIP = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "mlp_width": 3072,
    "max_positions": 64,
    "pad_id": 0,
    "head_width": 0,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "activation": "gelu_pytorch_tanh",
    "eps": 1e-6,
}


def _add_options(meta: dict, options: dict) -> dict:
    """Returns `meta` with these options (by dotted name) in its configuration."""
    config = copy.deepcopy(meta["config"])
    for key, value in options.items():
        *sections, name = key.split(".")
        functools.reduce(lambda part, section: part.setdefault(section, {}), sections, config)[name] = value
    return meta | {"config": config}


def _upgrade_2(meta: dict) -> dict:
    """Adds the options of today's towers and of LoRA."""
    return _add_options(meta, ADDED_OPTIONS | {f"text.siglip.{k}": v for k, v in ADDED_SIGLIP.items()})


def _upgrade_3(meta: dict) -> dict:
    """Adds options: equal captions were negatives, and MEFN had no evidence; writes "no entropy" as uniform weights."""
    config, matcher = meta["config"], meta["config"]["matcher"]
    loss = {"skip_equal_captions": False} | config["loss"]
    if "init_kappa" in matcher:
        matcher = matcher | {"init_evidence_weight": 0.0, "init_evidence_lambda": 0.0}
        if matcher["entropy"] == "none":
            matcher |= {"entropy": "shannon", "init_kappa": 0.0}
    return meta | {"config": config | {"matcher": matcher, "loss": loss}}


def _upgrade_4(meta: dict) -> dict:
    """Adds options: an image had one view, and the triplet loss was no part of a sum."""
    config = meta["config"]
    added = {"data": {"views": 1} | config["data"], "loss": {"triplet_weight": 1.0} | config["loss"]}
    return meta | {"config": config | added}


# Options that format 6 added, with what the code did before.
OPTIONS_OF_6 = {
    "log.to": "",
    "log.project": "mefn-jax",
    "train.patience": 0,
    "data.negatives": "",
    "data.negatives_per_pair": 1,
    "train.init_from": "",
    "train.init_new": "",
}


def _upgrade_5(meta: dict) -> dict:
    """Adds options of training that did not exist, and what was not stored: the best evaluation and the negatives."""
    return _add_options(meta, OPTIONS_OF_6) | {"best": None, "negatives": None}


UPGRADES = {1: _upgrade_1, 2: _upgrade_2, 3: _upgrade_3, 4: _upgrade_4, 5: _upgrade_5}
CHECKPOINT_FORMAT = Format(6, CheckpointError, "use it with that version, or train again", UPGRADES)
