"""A look at the data through a configuration's eyes: statistics of its captions, and a contact sheet of a batch."""

import dataclasses

from mefn_jax import losses, pictures
from mefn_jax.beginning import new_tokenizer
from mefn_jax.config import check, check_local
from mefn_jax.data import pipeline, sheet, statistics
from mefn_jax.evaluator import fitted, open_dataset
from mefn_jax.logs import say
from mefn_jax.model import CHOICES
from mefn_jax.towers import load

ORDER = {"train": 0, "val": 1, "test": 2}  # of what is printed; other splits follow


def look(config, out: str, rows: int, step: int) -> None:
    """Prints the statistics of all splits, and writes the first `rows` rows of the batch of a training step to the
    image file `out`. Raises ConfigError or DataError as training would, and if `out` cannot be written."""
    check(config, CHOICES | losses.CHOICES)
    check_local("data.dir", config.data.dir)
    out = pictures.checked(out)
    dataset = open_dataset(config)
    split = dataset.split("train")
    config, _, json = load(fitted(config, split))
    tokenizer = new_tokenizer(config, json, dataset, split)
    names = sorted(dataset.splits, key=lambda name: (ORDER.get(name, len(ORDER)), name))
    found = {name: statistics.of_split(split if name == "train" else dataset.split(name), tokenizer) for name in names}
    say("\n".join(statistics.table(found, tokenizer)))
    split = dataclasses.replace(split, words=None)  # what is drawn is what the cached words stand for
    whole = pipeline.configured(config, split, tokenizer)[step]
    batch = {name: values[:rows] for name, values in whole.items()}
    pictures.save(sheet.draw(batch, tokenizer), out)
    drawn = f"the first {len(batch['ids'])} rows of {len(whole['ids'])}"
    say(f"\nwrote {out}: {drawn} of the batch of step {step + 1}")
