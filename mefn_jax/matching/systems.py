"""Systems by name: a matcher with its options, and the other options that it presets or requires (docs/method.md)."""

import dataclasses

from mefn_jax.config import suggest
from mefn_jax.errors import ConfigError
from mefn_jax.matching.cosine import PooledCosine
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.mate import MATE
from mefn_jax.matching.mefn import MEFN
from mefn_jax.matching.scan import SCAN
from mefn_jax.matching.sfe import SFE
from mefn_jax.matching.visita import VisITA


@dataclasses.dataclass(frozen=True)
class System:
    """A system by name: its matcher, whose fields are the options `config.matcher`, and values of other options.

    Attributes:
        matcher: the class of the matcher.
        defaults: options by dotted key that differ from their defaults; a configuration file may override them.
        requires: options that make the system what it is, whatever the configuration file says.
    """

    matcher: type[Matcher]
    defaults: dict = dataclasses.field(default_factory=dict)
    requires: dict = dataclasses.field(default_factory=dict)


def _scan(direction: str, aggregate: str, inverse_temperature: float, lse_factor: float = 1.0) -> System:
    """Returns one of SCAN's forms, with its authors' constants on Flickr30K; it trains on the hardest negative."""
    constants = {"matcher.inverse_temperature": inverse_temperature, "matcher.lse_factor": lse_factor}
    form = {"matcher.direction": direction, "matcher.aggregate": aggregate}
    return System(SCAN, {"loss.hard_negative_ramp": 500} | constants, form)


# The paper's method as it was read first: entropy weights in both branches, no evidence (docs/method.md, section 14).
PAPER = {
    "matcher.init_kappa": 4.0,
    "matcher.init_evidence_weight": 0.0,
    "matcher.init_evidence_lambda": 0.0,
    "matcher.global_input": "weighted",
    "matcher.hub_vectors": 0,
}
# Chen et al. 2021: the hardest negative, regions and words left out in training, an MLP on precomputed regions.
VSE_INFINITY = {
    "loss.hard_negative_ramp": 500,
    "augment.region_dropout": 0.2,
    "augment.word_noise": 0.2,
    "image.regions.projection": "mlp",
}


# Zhu et al. 2023, with two views of each pair, which differ by what is left out.
ESA_TRAINING = VSE_INFINITY | {"loss.name": "sel", "data.views": 2}
TEACHER = {"train.ema_decay": 0.995}  # of MATE's code


def _mate(loss: str, matcher: type[Matcher] = MATE, **training) -> System:
    """Returns MATE, or an ablation of it, by its loss and its matcher; it pools and trains as ESA does, with a teacher
    or without."""
    form = {"image.pooling": "esa", "text.pooling": "esa", "loss.name": loss}
    return System(matcher, ESA_TRAINING | training, form)


def _visita(**form) -> System:
    """Returns VisITA, or an ablation of it by options of its matcher; it trains on the sum of two losses."""
    return System(VisITA, {"loss.name": "info_nce_triplet"}, {f"matcher.{name}": value for name, value in form.items()})


def _sfe(**form) -> System:
    """Returns SFE, or an ablation of it by options of its matcher; it trains on the hardest negative."""
    return System(SFE, {"loss.hard_negative_ramp": 500}, {f"matcher.{name}": value for name, value in form.items()})


MODELS = {
    "mefn": System(MEFN),
    "mefn_no_entropy": System(MEFN, requires={"matcher.init_kappa": 0.0, "matcher.init_evidence_weight": 0.0}),
    "mefn_no_weights": System(MEFN, requires={"matcher.init_kappa": 0.0}),
    "mefn_no_evidence": System(MEFN, requires={"matcher.init_evidence_weight": 0.0}),
    "mefn_no_local": System(MEFN, requires={"matcher.branches": "global"}),
    "mefn_no_global": System(MEFN, requires={"matcher.branches": "local"}),
    "mefn_paper": System(MEFN, requires=PAPER),
    "vsepp": System(PooledCosine, {"loss.hard_negative_ramp": 500}),
    "scan_t2i_lse": _scan("t2i", "lse", 9.0, 6.0),
    "scan_t2i_avg": _scan("t2i", "avg", 9.0),
    "scan_i2t_lse": _scan("i2t", "lse", 4.0, 5.0),
    "scan_i2t_avg": _scan("i2t", "avg", 4.0),
    "clip": System(PooledCosine, requires={"loss.name": "info_nce"}),
    "siglip": System(PooledCosine, requires={"loss.name": "siglip"}),
    "vse_infinity": System(PooledCosine, VSE_INFINITY, {"image.pooling": "gpo", "text.pooling": "gpo"}),
    "esa": System(PooledCosine, ESA_TRAINING, {"image.pooling": "esa", "text.pooling": "esa"}),
    "visita": _visita(),
    "visita_no_cross": _visita(levels=("whole",)),
    "visita_one_level": _visita(levels=("fragments",)),
    "visita_one_step": _visita(steps=1),
    "visita_linear": _visita(kernels=()),
    "mate": _mate("sel_hect_distill", **TEACHER),
    "mate_no_fusion": _mate("sel_distill", PooledCosine, **TEACHER),
    "mate_no_momentum": _mate("sel_hect"),
    "mate_no_hect": _mate("sel_contrast_distill", **TEACHER),
    "sfe": _sfe(),
    "sfe_no_external": _sfe(cues=()),
    "sfe_no_internal": _sfe(internal=False),
    "sfe_no_patch": _sfe(cues=("instance", "neighbour")),
    "sfe_no_instance": _sfe(cues=("patch", "neighbour")),
    "sfe_no_neighbour": _sfe(cues=("patch", "instance")),
}


def find_system(model: str) -> System:
    """Returns a system by name. Raises ConfigError for an unknown name."""
    if model not in MODELS:
        raise ConfigError(f"model: {model!r} is not one of {', '.join(MODELS)}{suggest(model, MODELS)}")
    return MODELS[model]


def matcher_options(model: str) -> dict:
    """Returns the options of a system's matcher with their defaults: the fields of its class. Raises ConfigError for an
    unknown name."""
    fields = dataclasses.fields(find_system(model).matcher)
    return {field.name: field.default for field in fields if field.name not in ("parent", "name")}
