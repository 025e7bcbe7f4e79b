"""The benchmarks by name: reader, task, and where the files are published."""

from collections.abc import Callable
from typing import NamedTuple

from mefn_jax.benchmarks.readers import (
    aro,
    cases,
    class_folder,
    coco,
    flickr8k_judgements,
    foil,
    languages,
    own_split,
    sugar_crepe,
    twins,
    valse,
    winoground,
)
from mefn_jax.benchmarks.tasks.choose import measure_cases
from mefn_jax.benchmarks.tasks.classify import measure_classes
from mefn_jax.benchmarks.tasks.diagnose import measure_split
from mefn_jax.benchmarks.tasks.judge import measure_judgements
from mefn_jax.benchmarks.tasks.languages import measure_languages
from mefn_jax.benchmarks.tasks.many_positives import measure_gallery

COCO = "COCO's photographs and captions: https://cocodataset.org (captions CC BY 4.0, photographs Flickr's terms)"
KARPATHY = "Karpathy's split: https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FLICKR8K = "Flickr8k is published for research, on request: https://forms.illinois.edu/sec/1713398"


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        read: `read(request)` returns what the task takes.
        measure: `measure(scorer, items)` returns the Outcome of a model.
        published: where its files are published, and under which licence: the end of the message if one is missing.
    """

    read: Callable
    measure: Callable
    published: str


BENCHMARKS = {
    "eccv": Benchmark(
        coco.read_eccv,
        measure_gallery,
        f"{COCO}; {KARPATHY}; positives: https://github.com/naver-ai/eccv-caption (MIT)",
    ),
    "cxc": Benchmark(
        coco.read_cxc,
        measure_gallery,
        f"{COCO}; {KARPATHY}; positives: https://github.com/naver-ai/eccv-caption (MIT), made from "
        "https://github.com/google-research-datasets/Crisscrossed-Captions (Apache 2.0)",
    ),
    "sugar_crepe": Benchmark(
        sugar_crepe.read,
        measure_cases,
        f"the subsets: https://github.com/RAIVNLab/sugar-crepe (MIT); val2017 of {COCO}",
    ),
    "winoground": Benchmark(
        winoground.read,
        measure_cases,
        "https://huggingface.co/datasets/facebook/winoground (for research, after its licence is accepted)",
    ),
    "aro": Benchmark(
        aro.read,
        measure_cases,
        "https://github.com/mertyg/vision-language-models-are-bows (MIT); photographs of Visual Genome (CC BY 4.0)",
    ),
    "valse": Benchmark(
        valse.read,
        measure_cases,
        "https://github.com/Heidelberg-NLP/VALSE (see its LICENSE); photographs of COCO, Visual7W, SWiG and VisDial",
    ),
    "foil": Benchmark(
        foil.read, measure_cases, f"https://foilunitn.github.io (no licence is stated); val2014 of {COCO}"
    ),
    "twins": Benchmark(twins.read, measure_cases, "the drawn scenes come with the project"),
    "cases": Benchmark(cases.read, measure_cases, "cases.jsonl is a file of your own (docs/evaluation.md)"),
    "flickr8k_expert": Benchmark(flickr8k_judgements.read_expert, measure_judgements, FLICKR8K),
    "flickr8k_crowd": Benchmark(flickr8k_judgements.read_crowd, measure_judgements, FLICKR8K),
    "xm3600": Benchmark(
        languages.read_xm3600, measure_languages, "https://google.github.io/crossmodal-3600 (CC BY 4.0)"
    ),
    "multi30k": Benchmark(
        languages.read_multi30k,
        measure_languages,
        "https://github.com/multi30k/dataset (captions CC BY-NC-SA 4.0); photographs of Flickr30K, for research: "
        "https://shannon.cs.illinois.edu/DenotationGraph",
    ),
    "languages": Benchmark(
        languages.read_language_table,
        measure_languages,
        "captions.csv or captions.jsonl is a file of your own (docs/evaluation.md)",
    ),
    "diagnosis": Benchmark(own_split.read, measure_split, "the data are those of the run, or any data set"),
    "classes": Benchmark(class_folder.read, measure_classes, "the images are your own (docs/evaluation.md)"),
}
