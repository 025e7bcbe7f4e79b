"""Flickr8k photographs, a CPU-sized model from random initialisation.

python -m mefn_jax.data.prepare --source=flickr8k --path=FLICKR8K --out=data/flickr8k
python train.py --config=configs/flickr8k.py && python eval.py --workdir=runs/flickr8k --split=val
"""

from configs import default


def get_config(arg=""):
    c = default.base()
    c.data.dir = "data/flickr8k"
    c.embed_dim = 128
    c.image.arch = "vit"
    c.image.size = 64
    c.image.grid = 4
    c.image.mean = c.image.std = (0.5, 0.5, 0.5)
    c.image.vit.update(width=128, layers=2, heads=4, mlp_width=256, patch=8, stem=(32, 64), dropout=0.1)
    c.text.update(width=128, layers=2, heads=4, mlp_width=256, max_words=20, max_positions=64)
    c.train.update(epochs=8.0, batch_size=64, learning_rate=1e-3, log_every=100, eval_every=1000, save_every=500)
    c.eval.val_images = 200
    return default.finish(c, arg)
