"""The twins of the drawn scenes as a compositional benchmark: two scenes that differ only in which object has which
attribute or place, and two captions of the same words."""

from mefn_jax.benchmarks.items import Cases, Pairing
from mefn_jax.benchmarks.request import Request
from mefn_jax.errors import DataError
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.run import Gallery
from mefn_jax.evaluation.twins import find_twins


def read(request: Request) -> Cases:
    """Reads the pairs of a scene's and its twin's k-th captions, of which each is true of its own scene alone, from the
    split of the model's drawn scenes, or of those in `--data_dir`. Raises DataError for photographs and a split without
    twins."""
    split = open_split(request.evaluator, Gallery(request.data_dir, request.split)).split
    twins = find_twins(split)
    if twins is None or not len(twins.captions):
        raise DataError(f"{request.benchmark}: {split.name} has no twins; give the --data_dir of drawn scenes")
    kinds = dict(zip(twins.captions.tolist(), twins.kinds.tolist(), strict=True))
    cases = []
    for caption, own, other in zip(*(x.tolist() for x in (twins.captions, twins.own, twins.other)), strict=True):
        mirrored = int(caption - split.caption_offsets[own] + split.caption_offsets[other])
        if own < other and mirrored in kinds:
            cases.append(Pairing((own, other), (caption, mirrored), kinds[caption]))
    if not cases:
        raise DataError(f"{request.benchmark}: {split.name} has no pair of twins whose captions are true of one alone")
    return Cases(split, split.all_captions(), cases)
