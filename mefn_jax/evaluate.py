"""Evaluates a trained model on a split (DESIGN.md 8): the table of recalls, `metrics.json` and `ranks.npz`."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mefn_jax import baselines, metrics, pointing, twins, two_stage
from mefn_jax.checkpoint import versions
from mefn_jax.config import check_local
from mefn_jax.data.dataset import ALIASES, Dataset
from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluator import Evaluator, fitted, load, open_dataset, untrained
from mefn_jax.logs import say
from mefn_jax.matching.features import Features
from mefn_jax.ranking import rank, tiles_of
from mefn_jax.remote import directory, write_whole

TOP = 10  # captions of every image, and images of every caption, that are kept


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluated model, and what it was evaluated on.

    Attributes:
        evaluator, params: the model.
        split: what was scored; `images`, `texts` are its Features.
        report: what `metrics.json` holds.
        ranks: what `ranks.npz` holds (see `ranked`).
    """

    evaluator: Evaluator
    params: dict
    split: Split
    images: Features
    texts: Features
    report: dict
    ranks: dict


def evaluate(
    workdir, data_dir: str, split: str, step: str, folds=(1,), out="", ema=False, keep="", short=""
) -> Evaluated:
    """Evaluates a workdir's checkpoint on a split, prints the table, and writes `metrics.json` and `ranks.npz` into
    `folder_of(workdir, split, out, ema)`. `keep` names a file for all scores; `short` asks for shortlists too
    (`two_stage.shortlisted`)."""
    workdir, folder = directory("--workdir", workdir), folder_of(workdir, split, out, ema)
    check_local("--data_dir", data_dir)
    evaluator, params, number = load(workdir, step, ema)
    title = f"step {number}{', averaged' if ema else ''}"
    found = tabulate(evaluator, params, title, data_dir, ALIASES.get(split, split), folds, keep, short)
    found.report["step"] = number
    if ema:  # so that a comparison does not take it for another seed
        found.report["config"]["evaluated"] = "averaged parameters"
    write(folder, found.report, found.ranks)
    return found


def folder_of(workdir, split: str, out: str = "", ema: bool = False) -> epath.Path:
    """Where an evaluation goes: `out`, or `WORKDIR/eval/<split>/`, that of averaged parameters `<split>_ema`."""
    folder = directory("--workdir", workdir) / "eval" / (ALIASES.get(split, split) + "_ema" * ema)
    return directory("--out", out) if out else folder


def zero_shot(config, data_dir: str, split: str, folds=(1,), out: str = "", keep="") -> dict:
    """Evaluates the pretrained towers that a configuration names, without training (see `evaluator.untrained`). Prints
    the table, and writes as `evaluate` does if `out` is given."""
    out = out and directory("--out", out)
    check_local("--data_dir", data_dir)
    check_local("data.dir", config.data.dir)
    evaluator, params = untrained(config)
    found = tabulate(evaluator, params, "zero-shot", data_dir, ALIASES.get(split, split), folds, keep)
    if out:
        write(out, found.report, found.ranks)
    return found.report


def ensemble(workdirs: list[str], data_dir: str, split: str, step: str, folds, out: str, keep="") -> dict:
    """Evaluates the average of several runs' score matrices, as one system; otherwise as `evaluate`, into `out`."""
    out = directory("--out", out)
    check_local("--data_dir", data_dir)
    parts, owners = [], None
    for workdir in workdirs:
        evaluator, params, _ = load(directory("--ensemble", workdir), step)
        dataset, opened_split = opened(evaluator, data_dir, ALIASES.get(split, split))
        owners = opened_split.caption_image if owners is None else owners
        if not np.array_equal(opened_split.caption_image, owners):
            raise ConfigError(f"--ensemble={workdir}: has other images and captions in {split} than {workdirs[0]}")
        parts.append(evaluator.scores(params, *evaluator.encode(params, opened_split)))
    evaluator.config.model = f"ensemble of {len(parts)}"
    check_folds(folds, opened_split)
    report, ranks = ranked(evaluator, MeanScores(parts), "scores averaged", dataset, opened_split, folds, keep)
    report["config"] = {"model": evaluator.config.model, "runs": sorted(map(str, workdirs))}
    write(out, report, ranks)
    return report


@dataclasses.dataclass
class MeanScores:
    """`tiled.Scores`: the mean of several."""

    parts: list

    def __call__(self, rows: slice, columns: slice) -> np.ndarray:
        return np.mean([scores(rows, columns) for scores in self.parts], 0)


def opened(evaluator: Evaluator, data_dir: str, split_name: str) -> tuple[Dataset, Split]:
    """The data set, of `data_dir` or as configured, and a split that the model can take."""
    config = evaluator.config
    if data_dir:
        config.data.dir = data_dir
    dataset = open_dataset(config)
    split = dataset.split(split_name)
    fitted(config, split)
    return dataset, split


def tabulate(
    evaluator: Evaluator, params, title: str, data_dir: str, split_name: str, folds, keep="", short=""
) -> Evaluated:
    """Scores a split, of `data_dir` or of the configured data; else as `ranked`."""
    dataset, split = opened(evaluator, data_dir, split_name)
    check_folds(folds, split)
    listed = two_stage.shortlisted(short, split.images)
    if listed and not evaluator.model.has_tile:
        raise ConfigError(f"--shortlist: the matcher of model={evaluator.config.model} has no tile to score pairs with")
    if listed and 1 not in folds:
        raise ConfigError("--shortlist needs the whole gallery: add 1 to --folds")
    images, texts = evaluator.encode(params, split)
    scores = evaluator.scores(params, images, texts)
    if listed:  # what is timed is not compiled meanwhile
        scores(*tiles_of(split.images, split.caption_image, 1)[0])
    report, ranks = ranked(evaluator, scores, title, dataset, split, folds, keep)
    if "baselines" in report:  # drawn scenes
        report["pointing"] = pointing.accuracy(evaluator, params, images, texts, split)
        show_pointing(report["pointing"])
    if listed:
        whole = (report if folds[0] == 1 else report["other_folds"]["1"]) | {"seconds": report["seconds"]}
        report["shortlist"] = two_stage.two_stages(evaluator, params, images, texts, split, listed, whole)
        two_stage.show(report["shortlist"])
    return Evaluated(evaluator, params, split, images, texts, report, ranks)


def check_folds(folds: tuple[int, ...], split: Split) -> None:
    """Raises ConfigError unless the folds divide the images; says so where they are not the published ones."""
    for number in folds:
        if split.images % number:
            raise ConfigError(f"--folds={number}: does not divide the {split.images} images of {split.name}")
    if max(folds) > 1 and not split.source_order:
        say("note: TFDS stores images in the order of a hash; these folds are not those of the published COCO 1K")


def ranked(
    evaluator: Evaluator, scores, title: str, dataset: Dataset, split: Split, folds=(1,), keep=""
) -> tuple[dict, dict]:
    """Ranks a split by `scores` and prints the table. `folds` are numbers of folds, of which the first is what the
    report is of; `keep` names a file for all scores. Returns the report and the ranks: `{i2t (I,), t2i (C,),
    caption_image (C,)}`, the captions' scores with their own image, `own_scores`, and the TOP best of every query,
    `i2t_top`, `t2i_top` and their scores."""
    config, name = evaluator.config, f"{evaluator.config.model} ({title})"
    if split.skipped:
        say(f"left out {len(split.skipped)} images that cannot be decoded: {', '.join(split.skipped[:5])}")
    if keep and 1 not in folds:
        raise ConfigError("--save_scores needs the whole gallery: add 1 to --folds")
    with kept_scores(keep, split) as whole:
        found = rank(scores, split.caption_image, folds, TOP, bar=True, keep=whole)
    results = {number: of_folds(found.counts[number], split, number) for number in folds}
    rows = {name: results[folds[0]]}
    known = twins.find(split) if folds[0] == 1 else None
    if known:
        others = {
            "caption words": baselines.words_only(split),
            "colour histogram": baselines.colour_histogram(dataset.split("train"), split),
        }
        rows |= {key: of_folds(rank(other, split.caption_image).counts[1], split, 1) for key, other in others.items()}
        for (result, _), scoring in zip(rows.values(), [scores, *others.values()], strict=True):
            result["twins"] = twins.accuracy(known, scoring)
    report, ranks = rows[name]
    report |= {"protocol": protocol(config, split, folds[0])}
    if known:
        report["protocol"]["captions_true_of_several"] = 100.0 * known.shared
        report["baselines"] = {key: result for key, (result, _) in list(rows.items())[1:]}
    show(rows, report["protocol"], split, folds[0])
    for number in folds[1:]:
        show({name: results[number]}, protocol(config, split, number), split, number)
        report.setdefault("other_folds", {})[str(number)] = results[number][0]
    report |= {"seconds": found.seconds, "config": config.to_dict(), "versions": versions()}
    best = {"i2t": found.captions, "t2i": found.images}
    tops = {f"{side}_top": b.positions for side, b in best.items()}
    tops |= {f"{side}_top_scores": b.scores for side, b in best.items()}
    return report, ranks | {"caption_image": split.caption_image, "own_scores": found.own} | tops


@contextlib.contextmanager
def kept_scores(path, split: Split):
    """A float32 array `(I, C)` on disk at `path`, a .npy file, which appears when all is well; None without a path or
    on another process."""
    if not path or jax.process_index():
        yield None
        return
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(part, "w+", np.float32, (split.images, split.captions))
    except OSError as e:
        raise ConfigError(f"--save_scores={path}: cannot be written ({e})") from e
    try:
        yield array
        array.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    say(f"wrote {path}: scores float32 {split.images} x {split.captions}, images by captions")


def of_folds(counts, split: Split, folds: int) -> tuple[dict, dict]:
    """Metrics averaged over consecutive folds of the images, and the ranks inside the folds `{i2t (I,), t2i (C,)}`."""
    size, results, ranks = split.images // folds, [], []
    for first in range(0, split.images, size):
        part = slice(int(split.first[first]), int(split.first[first + size]))
        inside = *(n[part] for n in counts), split.caption_image[part] - first
        results.append(metrics.summarise(*inside))
        ranks.append(metrics.best_ranks(*inside))
    i2t, t2i = (np.concatenate(r) for r in zip(*ranks, strict=True))
    return metrics.mean_of(results), {"i2t": i2t, "t2i": t2i}


def protocol(config, split: Split, folds: int) -> dict:
    """What the numbers were made from (DESIGN.md 8)."""
    number = np.diff(split.first)
    each = str(number.min()) if number.min() == number.max() else f"{number.min()} to {number.max()}"
    t = config.text
    case = "lower case" if t.lower_case else "case kept"
    text = f"{case}, punctuation {t.punctuation}"
    if t.pretrained:
        text = "as the checkpoint's tokenizer has it"
    if t.arch == "words":
        text = "words cached"
    return {
        "split": split.name,
        "images": split.images,
        "captions": split.captions,
        "folds": folds,
        "captions_per_image": each,
        "ties": "against the model",
        "text": f"{text}, at most {config.text.max_words} wordpieces",
    }


def show(rows: dict, protocol: dict, split: Split, folds: int) -> None:
    """Prints the protocol and the table."""
    p = protocol
    fold = f"{folds} consecutive folds of {split.images // folds} images, averaged" if folds > 1 else "one gallery"
    say(
        f"\n{p['split']}: {p['images']} images, {p['captions']} captions ({p['captions_per_image']} an image), {fold}; "
        f"ties {p['ties']}; text {p['text']}"
    )
    if "captions_true_of_several" in p:
        say(
            f"{p['captions_true_of_several']:.1f} % of the captions are true of more than one scene. Twins: which of "
            "two twin scenes does a caption describe (%, a tie is one half)"
        )
    columns = ("r1", "r5", "r10", "medr", "meanr", "map")
    has_twins = any("twins" in result for result, _ in rows.values())
    width = max(map(len, [*rows, "chance"]))
    say(f"{'':{width}} {'image to text':^42}  {'text to image':^42}")
    titles = "".join(f"{t:>7}" for t in ("R@1", "R@5", "R@10", "medR", "meanR", "mAP"))
    say(f"{'':{width}} {titles}  {titles}  {'rSum':>6}" + (f" {'twins':>6}" if has_twins else ""))
    for name, (result, _) in rows.items():
        sides = "  ".join("".join(f"{result[d][c]:7.1f}" for c in columns) for d in ("i2t", "t2i"))
        twin = f" {result['twins']['all']:6.1f}" if has_twins else ""
        say(f"{name:{width}} {sides}  {result['rsum']:6.1f}{twin}")
    size = split.images // folds
    expected = metrics.chance(size, split.caption_image[: split.first[size]])
    sides = "  ".join("".join(f"{expected[d][c]:7.1f}" for c in columns[:3]) + " " * 21 for d in ("i2t", "t2i"))
    total = sum(sum(e.values()) for e in expected.values())
    say(f"{'chance':{width}} {sides}  {total:6.1f}" + (f" {50:6.1f}" if has_twins else ""))
    if has_twins:
        kinds = next(iter(rows.values()))[0]["twins"]
        say("twins by what was swapped: " + ", ".join(f"{k} {v:.1f}" for k, v in kinds.items() if k != "all"))


def show_pointing(found: dict | None) -> None:
    """Prints the pointing accuracy."""
    if found and found["all"] is not None:
        say(
            f"pointing: the region that a word attends to most lies in what the word names in {found['all']:.1f} % "
            f"(chance {found['chance']:.1f})"
        )


def write(folder: epath.Path, report: dict, ranks: dict) -> None:
    if jax.process_index():
        return
    arrays = io.BytesIO()
    np.savez(arrays, **ranks)
    try:
        write_whole(folder / "metrics.json", json.dumps(report, indent=1).encode())
        write_whole(folder / "ranks.npz", arrays.getvalue())
    except OSError as e:
        raise DataError(f"{folder}: cannot be written ({e})") from e
    say(f"wrote {folder}/metrics.json and ranks.npz")
