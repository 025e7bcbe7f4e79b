"""`python -m mefn_jax.show_data`."""

from PIL import Image
from sample_data import write_precomputed


def test_show_data_draws_sheet_and_names_file_that_cannot_be_written(tmp_path, command):
    data = tmp_path / "precomp"
    for split, images in (("train", 8), ("dev", 3), ("testall", 3)):
        write_precomputed(data, split, images, shape=(5, 8))
    out = tmp_path / "new" / "sheet.png"
    options = (f"--config.data.dir={data}", "--config.image.arch=regions", "--config.train.batch_size=20")
    text = command("-m mefn_jax.show_data", "--config=configs/flickr8k.py", *options, f"--out={out}").stdout
    for line in ("train               8          40           5", "testall             3          15", "wrote"):
        assert line in text
    assert Image.open(out).size[0] > 1000
    bad = command("-m mefn_jax.show_data", "--config=configs/shapes.py:smoke", f"--out={tmp_path}/x.doc", check=False)
    assert "x.doc: give a .png or .jpg file" in bad.stderr
    bad = command("-m mefn_jax.show_data", "--config=configs/shapes.py:smoke", "--out=gs://b/x.png", check=False)
    assert "--out=gs://b/x.png" in bad.stderr
