"""Shows the data as the model sees it.

    python -m mefn_jax.show_data --config=configs/NAME.py [--config.data.dir=DIR] --out=FILE.png [--rows=24] [--step=1]

Prints the sizes of the splits, captions per image, caption lengths, the share of unknown tokens, and captions and
images that occur in two splits. Draws a contact sheet of the batch of a training step: augmented images, tokens, and
the positives among its rows. Precomputed regions are all drawn, because region dropout is decided on the device.
"""

import dataclasses

from absl import flags

from mefn_jax.data import pipeline, sheet, statistics
from mefn_jax.data.from_config import open_dataset
from mefn_jax.data.mixture import MixedSplit
from mefn_jax.reports import contact_sheet
from mefn_jax.resolve import resolve, validate
from mefn_jax.runtime.cli import define_config_flag, define_count_flag, define_path_flag, run_command
from mefn_jax.runtime.console import print0
from mefn_jax.training.setup import choose_tokenizer

SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}  # order of printing; other splits follow


def show_data(config, out: str, rows: int, step: int) -> None:
    """Prints statistics of all splits and writes the first `rows` rows of the batch of training step `step` (from 0) to
    the image file `out`. Raises ConfigError or DataError as training does, and if `out` cannot be written."""
    validate(config)
    out = contact_sheet.check_picture_path(out)
    dataset = open_dataset(config)
    split = dataset.split("train")
    resolved = resolve(config, (split,))
    config, tokenizer = resolved.config, choose_tokenizer(resolved.config, resolved.tokenizer_json, dataset, split)
    names = sorted(dataset.splits, key=lambda name: (SPLIT_ORDER.get(name, len(SPLIT_ORDER)), name))
    statistics_of_splits = {
        name: statistics.compute_statistics(split if name == "train" else dataset.split(name), tokenizer)
        for name in names
    }
    if isinstance(split, MixedSplit):
        print0(f"mixture: {split.describe()}")
    print0("\n".join(statistics.format_statistics(statistics_of_splits, tokenizer)))
    split = dataclasses.replace(split, cached_text=None)  # draws captions in place of cached words
    full_batch = pipeline.training_dataset_from_config(config, split, tokenizer)[step]
    batch = {name: values[:rows] for name, values in full_batch.items()}
    contact_sheet.save_picture(sheet.draw_batch(batch, tokenizer), out)
    description = f"the first {len(batch['text'])} rows of {len(full_batch['text'])}"
    print0(f"\nwrote {out}: {description} of the batch of step {step + 1}")


def define_flags() -> None:
    """Defines the flags of the command."""
    define_config_flag("shapes")
    define_path_flag("out", None, "Image file to write.", required=True)
    define_count_flag("rows", 24, "Number of rows of the batch to draw, from the first on.")
    define_count_flag("step", 1, "The training step whose batch is drawn.")


def main() -> None:
    """Runs the command."""
    show_data(flags.FLAGS.config, flags.FLAGS.out, flags.FLAGS.rows, flags.FLAGS.step - 1)


if __name__ == "__main__":
    run_command(main, define_flags)
