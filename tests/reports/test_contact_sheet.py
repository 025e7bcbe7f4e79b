"""The contact sheet of a query's results."""

import shutil

from PIL import Image

from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.reports import contact_sheet
from mefn_jax.retrieval import index, search

CAPTION = "a red circle is left of a blue square"


def test_contact_sheet_keeps_cell_of_missing_image(runs, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    index.index_images(TrainedRun(runs["vsepp"], "latest"), tmp_path / "images", tmp_path / "index")
    best = search.search_images(TrainedRun(runs["vsepp"], "latest"), tmp_path / "index", CAPTION, 3)
    (tmp_path / "images" / best[0][1]).unlink()
    two_lines = CAPTION.replace(" is", "\n\tis")
    search.search_images(
        TrainedRun(runs["vsepp"], "latest"), tmp_path / "index", two_lines, 3, out=str(tmp_path / "found.png")
    )
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.getpixel((contact_sheet._GAP + 100, 100)) == contact_sheet._PALE
