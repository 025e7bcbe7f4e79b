"""Converts models, results and explanations to JSON values for the page."""

import numpy as np

from mefn_jax.data.digests import digest_text
from mefn_jax.reports.explanation import TERM_NAMES, Explanation, score_terms
from mefn_jax.serving.pictures import photo_uri
from mefn_jax.serving.served_model import EXAMPLES, Answer, ServedModel

DIGITS = 6  # after the point, of numbers that are sent


def describe_model(model: ServedModel) -> dict:
    """Returns what the page shows of a model and of what it searches."""
    step = max(1, len(model.lines) // EXAMPLES)
    return {
        "name": model.name,
        "step": model.step,
        "system": model.evaluator.config.model,
        "images": model.images.number,
        "source": model.images.source,
        "gallery": digest_text("\n".join(map(to_text, model.images.index.names))),
        "lines": len(model.lines),
        "explains": model.describe_explanations(),
        "takes_images": model.evaluator.config.image.arch != "regions",
        "has_photos": model.images.read is not None,
        "examples": model.images.captions[step // 2 :: step][:EXAMPLES],
    }


def describe_answer(answer: Answer, names) -> dict:
    """Returns the results of a query; `names[k]` is the name of an image or the text of a line."""
    results = [
        {"position": int(k), "name": to_text(names[k]), "score": round(float(score), DIGITS)}
        for k, score in zip(answer.positions, answer.scores, strict=True)
    ]
    return {"results": results, "scored": answer.scored, "notes": answer.notes}


def describe_explanation(x: Explanation) -> dict:
    """Returns an explanation. Its terms are those of `score_terms`."""
    return {
        "caption": x.caption,
        "title": to_text(x.title),
        "photo": photo_uri(x.photo),
        "words": x.words,
        "boxes": round_floats(x.boxes),
        "attention": round_floats(x.attention),
        "H": round_floats(x.H),
        "region_weights": round_floats(x.region_weights),
        "word_weights": round_floats(x.word_weights),
        "values": {name: round(value, DIGITS) for name, value in x.values.items()},
        "terms": [{"name": TERM_NAMES[name], "value": round(v, DIGITS)} for name, v in score_terms(x).items()],
    }


def round_floats(array: np.ndarray | None) -> list | None:
    """Returns an array as lists of numbers with DIGITS after the point; None for None."""
    return None if array is None else np.round(array.astype(float), DIGITS).tolist()


def to_text(name: str) -> str:
    """Returns a file name as text that is UTF-8: bytes that are not become a replacement mark."""
    return name.encode("utf-8", "replace").decode()
