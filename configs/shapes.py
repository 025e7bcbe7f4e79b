"""Drawn scenes, from random initialisation on a CPU.

python train.py --config=configs/shapes.py && python eval.py --workdir=runs/shapes
"""

from configs import default


def get_config(arg=""):
    c = default.base()
    c.embed_dim = 128
    c.data.twins_together = True
    c.image.arch = "vit"
    c.image.size = 56
    c.image.vit.update(width=128, layers=4, heads=4, mlp_width=384, patch=8, stem=())
    c.text.update(width=128, layers=2, heads=4, mlp_width=384, max_words=20, max_positions=64, dropout=0.0)
    c.train.update(epochs=4.0, batch_size=64, learning_rate=1e-3, log_every=50, eval_every=400, save_every=400)
    c.eval.val_images = 200
    return default.finish(c, arg)
