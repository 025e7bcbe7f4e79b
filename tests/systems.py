"""Matchers of the systems in `MODELS`."""

from configs import default
from mefn_jax.matching.matcher import Matcher
from mefn_jax.model import MODELS


def make_matcher(name: str, **options) -> Matcher:
    """Returns the matcher of a system with the options of its default configuration, except for `options`."""
    return MODELS[name].matcher(**default.get_config(f"model={name}").matcher.to_dict() | options)
