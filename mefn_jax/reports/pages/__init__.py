"""Pages for a browser: the templates in this folder."""

import base64
from pathlib import Path

PAGE_MARK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # in the head of every page


def is_page(path: Path) -> bool:
    """Returns whether a file is a page of a report or of a comparison."""
    with path.open(encoding="utf-8") as file:
        return PAGE_MARK in file.read(1000)


def template(name: str):
    """Returns the jinja2.Template of a page, which escapes every value."""
    import jinja2  # slow to import, and not needed to recognize a page

    loader = jinja2.PackageLoader("mefn_jax.reports", "pages")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def data_uri(kind: str, data: bytes) -> str:
    """Returns an image file of a `kind` (png, jpeg, webp) as a URI that holds its bytes."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
