"""Flickr8k photographs: a CPU-sized model, trained from random initialization.

    python -m mefn_jax.data.prepare --source=flickr8k --path=FLICKR8K --out=data/flickr8k
    python train.py --config=configs/flickr8k.py && python eval.py --workdir=runs/flickr8k --split=val

On two cores: 15 minutes (4,000 training photographs, from a copy squashed to 224 x 224, decoded to 64 px; seed 0). On
val, 1,000 x 5,000, step 2500: R@1/5/10 image to text 1.0/3.6/7.7, text to image 1.2/5.0/8.9; chance is 0.1/0.5/1.0.
Published numbers use full-size photographs, pretrained towers and all 6,000 training photographs.
"""

from mefn_jax.config import parse_arg
from mefn_jax.configs import default


def get_config(arg=""):
    """Returns the configuration, locked. `arg`: model and smoke."""
    options = parse_arg(arg, model="mefn", smoke=False)
    c = default.base(options["model"])
    c.data.dir = "data/flickr8k"
    c.embed_dim = 128
    c.image.arch = "vit"
    c.image.size = 64
    c.image.region_grids = (4,)
    c.image.mean = c.image.std = (0.5, 0.5, 0.5)
    c.image.vit.update(width=128, layers=2, heads=4, mlp_width=256, patch=8, stem=(32, 64), dropout=0.1)
    c.text.max_tokens = 20
    c.text.bert.update(width=128, layers=2, heads=4, mlp_width=256, max_positions=64)
    c.train.update(epochs=8.0, batch_size=64, learning_rate=1e-3, log_every=100, eval_every=1000, save_every=500)
    c.eval.val_images = 200
    return default.finish(c, options)
