"""Shows what the model sees of its data.

    python -m mefn_jax.data.show --config=configs/NAME.py [--config.data.dir=DIR] --out=FILE.png [--rows=24] [--step=1]

Prints split sizes, captions an image, lengths, the share of unknown tokens, and captions that stand in two splits;
draws a contact sheet of the batch of a training step: augmented images, tokens, and the positives among its rows.
Precomputed regions are drawn whole: which of them are left out is decided on the device.
"""

from absl import flags

from mefn_jax.config import config_flag, run


def define_flags() -> None:
    config_flag("configs/shapes.py")
    flags.DEFINE_string("out", None, "Image file to write.", required=True)
    flags.DEFINE_integer("rows", 24, "Rows of the batch to draw, the first ones.", lower_bound=1)
    flags.DEFINE_integer("step", 1, "The training step whose batch is drawn.", lower_bound=1)


def main() -> None:
    from mefn_jax.look import look  # this is only the command; what it calls lies further down the flow

    look(flags.FLAGS.config, flags.FLAGS.out, flags.FLAGS.rows, flags.FLAGS.step - 1)


if __name__ == "__main__":
    run(main, define_flags)
