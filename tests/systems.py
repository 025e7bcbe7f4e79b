"""Matchers of the systems in `MODELS`."""

import functools

from configs import default
from mefn_jax.matching.matcher import Matcher
from mefn_jax.matching.systems import MODELS

# The systems whose scores differ in more than what options switch off, or what encoders and losses do.
ABLATIONS = {name for name in MODELS if name.startswith(("visita_", "sfe_", "mate_"))}
SCORES = sorted(MODELS.keys() - ABLATIONS - {"clip", "vse_infinity", "esa"})
SIZES = {"layers": 2, "mlp_width": 16}  # of the fusion network, so that it compiles soon


def make_matcher(name: str, **options) -> Matcher:
    """Returns the matcher of a system with the options of its default configuration, except for SIZES and
    `options`."""
    defaults = default.get_config(f"model={name}").matcher.to_dict()
    return MODELS[name].matcher(**defaults | {k: x for k, x in SIZES.items() if k in defaults} | options)


def projections_of(matcher: Matcher) -> tuple:
    """Returns the matcher's `project_regions` and `project_words`, functions `(variables, vectors)`."""
    return tuple(functools.partial(matcher.apply, method=f"project_{kind}") for kind in ("regions", "words"))
