"""Writes the card of an exported model, `README.md`: what it is, its data, and what it reaches, with the command."""

import dataclasses
import re
from pathlib import Path

from etils import epath

from mefn_jax.data.mixture import parse_mixture
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.hub import HUB_NAME
from mefn_jax.evaluation.results import read_report
from mefn_jax.metrics import RECALLS
from mefn_jax.runtime.console import print0, printable

CARD_FILE = "README.md"
UNKNOWN_LICENSE = "unknown"  # the hub's word
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
SIDES_OF_RECALLS = {"i2t": "image to text", "t2i": "text to image"}
CITATION = """\
Cite the software, and the paper of the system (docs/method.md of mefn-jax lists them).

```bibtex
@software{mefn_jax,
  title = {mefn-jax: image-text retrieval in JAX},
  author = {{The mefn-jax authors}},
  license = {Apache-2.0}
}
```"""


@dataclasses.dataclass(frozen=True)
class CardEvaluation:
    """An evaluation that a card reports.

    Attributes:
        report: the content of its `metrics.json`.
        command: the command that evaluates the exported model in the same way, with {} in place of its name.
    """

    report: dict
    command: str


def check_license(name: str) -> None:
    """Raises ConfigError unless a text can be the identifier of a license."""
    if not LICENSE.fullmatch(name):
        raise ConfigError(f"--license={name}: give an identifier such as apache-2.0, cc-by-4.0 or other")


def find_evaluations(directory: epath.Path, evaluated: str, step: int) -> list[CardEvaluation]:
    """Returns the evaluations below `eval/` of a run's directory that are of this checkpoint, by name: with the
    system's name `evaluated` and of its step. One that cannot be read is left out, with a note."""
    try:
        folders = sorted(path for path in (directory / "eval").iterdir() if (path / "metrics.json").exists())
    except OSError:  # the run was not evaluated
        return []
    evaluations = []
    for folder in folders:
        try:
            report = read_report(folder / "metrics.json")
        except (DataError, FileNotFoundError) as e:
            print0(f"note: the card leaves {folder.name} out ({e})")
            continue
        if (report["evaluated"], report.get("step")) == (evaluated, step):
            evaluations.append(CardEvaluation(report, evaluation_command(report, folder.name)))
    return evaluations


def evaluation_command(report: dict, folder: str) -> str:
    """Returns the command of an evaluation, from its report and the name of its folder."""
    split, folds = report["protocol"]["split"], [report["protocol"]["folds"], *report.get("other_folds", {})]
    words = ["python eval.py --workdir={}", f"--split={split}"]
    words += [f"--folds={','.join(map(str, folds))}"] if folds != [1] else []
    words += ["--certified"] if "certified" in report else []
    own = folder in (split, f"{split}_ema")
    return " ".join(words if own else [*words, "--data_dir=DIR"])


def write_card(
    repository: str, license_name: str, checkpoint: dict, is_averaged: bool, evaluations: list, parameters: int
) -> str:
    """Returns the text of a card, which `huggingface_hub.ModelCard` reads.

    `repository` is what loads the model: OWNER/NAME on the hub, or a folder. `checkpoint` is what the checkpoint stores
    besides the state; `parameters` is their number.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # slow to import, and rarely needed

    name, system = clean(repository.rpartition("/")[2]), checkpoint["config"]["model"]
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type="image-text-pairs",
            dataset_name=describe_evaluated_data(evaluation.report, checkpoint["config"]),
            dataset_split=evaluation.report["protocol"]["split"],
            metric_type=key,
            metric_name=title,
            metric_value=value,
        )
        for evaluation in evaluations
        for key, (title, value) in list_recalls(evaluation.report).items()
    ]
    data = ModelCardData(
        license=license_name,
        library_name="mefn-jax",
        tags=["image-text-retrieval", "jax", system],
        model_name=name if results else None,
        eval_results=results or None,
    )
    sections = {
        name: describe_exported_model(checkpoint, is_averaged, parameters),
        "Use": USE.format(clean(repository)),
        "Data": describe_training(checkpoint),
        "Evaluation": describe_evaluations(evaluations, clean(repository), checkpoint["config"]),
        "License": describe_license(license_name),
        "Citation": CITATION,
    }
    body = "\n\n".join(f"{'##' if k else '#'} {title}\n\n{text}" for k, (title, text) in enumerate(sections.items()))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").content


def list_recalls(report: dict) -> dict[str, tuple[str, float]]:
    """Returns the title and the value of each recall of a report, and of their sum, by its key there."""
    recalls = {
        f"{side}.r{k}": (f"{words} R@{k}", report[side][f"r{k}"])
        for side, words in SIDES_OF_RECALLS.items()
        for k in RECALLS
    }
    return recalls | {"rsum": ("rSum", report["rsum"])}


USE = """\
```python
import mefn_jax  # the package mefn-jax

model = mefn_jax.load("{}")
images, texts = model.encode_images(["one.jpg"]), model.encode_texts(["a caption"])
print(model.score(images, texts))  # (1, 1), higher is better
```

`config.json` is the configuration, `model.safetensors` the parameters by their paths, `tokenizer.json` the tokenizer.
Nothing in this folder is code, and none of it is run."""


def describe_exported_model(checkpoint: dict, is_averaged: bool, parameters: int) -> str:
    """Returns the sentences that say what a model is."""
    config = checkpoint["config"]
    image, text = config["image"], config["text"]
    towers = [f"images by {image['arch']}", f"captions by {text['arch']}"]
    origins = [f"`{clean(name_tower(c['pretrained']))}`" for c in (image, text) if c["pretrained"]]
    adapted = config["train"].get("lora", {}).get("rank")
    purpose = (
        f"An image-text retrieval model of the system `{config['model']}`: it scores how well a caption describes an "
        f"image, for search in both directions. It encodes {towers[0]} and {towers[1]} in {config['embed_dim']} "
        f"dimensions, and has {parameters:,} parameters and constants."
    )
    sentences = [
        purpose,
        f"The towers began as {' and '.join(origins)}." if origins else "The towers began at random.",
        f"Its LoRA adapters (rank {adapted}) are merged into the towers." if adapted else "",
        "The parameters are averages over the training (`train.ema_decay`)." if is_averaged else "",
        f"Trained with mefn-jax, commit {printable(checkpoint['commit'])}.",
    ]
    return " ".join(filter(None, sentences))


def name_tower(pretrained: str) -> str:
    """Returns the name of a pretrained tower: on the hub, or of its folder, without the place where that lay."""
    return pretrained if HUB_NAME.fullmatch(pretrained) else Path(pretrained).name


def describe_data(config: dict) -> str:
    """Returns the name of the data set of a configuration, or those of a mixture, without the places where they lay."""
    return " and ".join(_name_data_sets(config["data"]["dir"]))


def describe_evaluated_data(report: dict, config: dict) -> str:
    """Returns the name of the data set that an evaluation is of: of a mixture, the first, but for train. A report that
    does not say so is of the data set of `config`, the run's configuration."""
    data = report["config"].get("data")
    directory = data.get("dir") if isinstance(data, dict) else None
    names = _name_data_sets(directory if isinstance(directory, str) else config["data"]["dir"])
    return " and ".join(names if report["protocol"]["split"] == "train" else names[:1])


def _name_data_sets(text: str) -> list[str]:
    return [printable(Path(path).name) or "drawn scenes" for path, _ in parse_mixture(text)]


def describe_training(checkpoint: dict) -> str:
    """Returns the sentences about the training data and the length of the training."""
    config = checkpoint["config"]
    name = describe_data(config)
    digest = (checkpoint["data"] or {}).get("train")
    steps, examples, loss = checkpoint["step"], checkpoint["examples"], config["loss"]["name"]
    known = f" (SHA-256 of the split: `{printable(str(digest))}`)" if digest else ""
    return (
        f"Training split of `{name}`{known}: {examples:,} pairs in {steps:,} steps of the loss `{loss}`, seed "
        f"{config['train']['seed']}."
    )


def describe_evaluations(evaluations: list[CardEvaluation], repository: str, config: dict) -> str:
    """Returns a table for each evaluation, with its protocol and its command."""
    place = ["If the data set lies elsewhere than in training, add `--data_dir=DIR`."] if config["data"]["dir"] else []
    parts = [describe_evaluation(evaluation, repository) for evaluation in evaluations]
    return "\n\n".join([*parts, *place]) if parts else "Not evaluated."


def describe_evaluation(evaluation: CardEvaluation, repository: str) -> str:
    """Returns the protocol of an evaluation, the table of its recalls, and the command that gives them."""
    report, p = evaluation.report, evaluation.report["protocol"]
    titles, values = zip(*list_recalls(report).values(), strict=True)
    rows = [titles, ["---"] * len(titles), [f"{value:.1f}" for value in values]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    folds = f", {p['folds']} folds, averaged" if p["folds"] > 1 else ""
    reading = "; ".join(f"{key} {printable(str(p[key]))}" for key in ("text", "pixels") if key in p)
    protocol = (
        f"Split `{printable(p['split'])}`: {p['images']:,} images, {p['captions']:,} captions "
        f"({printable(p['captions_per_image'])} per image){folds}; ties {printable(p['ties'])}; {reading}."
    )
    return f"{protocol}\n\n{table}\n\n    {evaluation.command.format(repository)}"


def describe_license(name: str) -> str:
    """Returns the sentences about the license."""
    if name == UNKNOWN_LICENSE:
        return (
            "Whoever exported this model stated no license. Pretrained towers and training data may have terms of "
            "their own."
        )
    return f"`{name}`. Pretrained towers and training data may have terms of their own."


def clean(name: str) -> str:
    """Returns the name of a model or a folder without characters that have a meaning in Markdown or in the templates
    here."""
    return re.sub(r"[`*<>\[\]#{}\"\\]", "", printable(name)) or "model"
