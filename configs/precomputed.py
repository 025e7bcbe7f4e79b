"""Any model on region features in SCAN's format, with a BERT's words cached by `mefn_jax.precompute`, on a CPU.

    python -m mefn_jax.precompute --config=configs/precomputed.py:text=bert --config.data.dir=DIR \\
        --config.text.pretrained=BERT --out=WORDS
    python train.py --config=configs/precomputed.py:model=NAME --config.data.dir=DIR --config.data.cached_text=WORDS

Other text towers: `:text=bert --config.text.pretrained=BERT` trains BERT, or freezes it with
`--config.train.lr_multipliers='("text/backbone:0",)'`; `:text=gru` is SCAN's, from random initialization. The learning
rate was chosen for MEFN; VSE++ is better with 5e-4, SCAN with 2e-3. Numbers to expect: docs/results.md.
"""

from mefn_jax.config import parse_arg
from mefn_jax.configs import default
from mefn_jax.errors import ConfigError

TEXTS = ("cached", "bert", "gru")


def get_config(arg=""):
    """Returns the configuration, locked. `arg`: model, text and smoke."""
    options = parse_arg(arg, model="mefn", smoke=False, text="cached")
    if options["text"] not in TEXTS:
        raise ConfigError(f"text={options['text']} is not one of {', '.join(TEXTS)}")
    c = default.base(options["model"])
    c.data.dir = "data/f8k_precomp"
    c.embed_dim = 256
    c.image.arch = "regions"
    c.image.regions.update(grid=4, power_norm=True, channel_dropout=0.5)
    c.text.arch = options["text"]
    c.text.max_tokens = 16
    if c.text.arch != "gru":
        c.text.update(pooling="mean", channel_dropout=0.2)
        c.train.init = "cca"
    if c.text.arch == "cached":
        c.augment.word_noise = 0.0  # there are no tokens to change
    c.matcher.hub_vectors = 1024  # for every system alike; `mefn_paper` is without
    c.loss.name = "info_nce"
    c.train.update(epochs=4.0, batch_size=128, learning_rate=1e-3, weight_decay=0.0)
    c.train.update(log_every=50, eval_every=100_000, save_every=500, score_tile_mib=0.5)  # evaluates only at the end
    c.eval.update(batch_size=250, val_images=0)
    return default.finish(c, options)
