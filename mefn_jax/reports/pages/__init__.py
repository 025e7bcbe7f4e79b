"""Pages for a browser: the templates in this folder."""

import base64

import jinja2


def template(name: str) -> jinja2.Template:
    """Returns the template of a page, which escapes every value."""
    loader = jinja2.PackageLoader("mefn_jax.reports", "pages")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def data_uri(kind: str, data: bytes) -> str:
    """Returns an image file of a `kind` (png, jpeg, webp) as a URI that holds its bytes."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
