"""Checks of a `tokenizer.json` before the library reads it: its ids and its regular expressions."""

import json
import re

from mefn_jax.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKEN_ID = 2**22  # ids index the rows of an embedding; the largest vocabularies in use have 2**20
MAX_PATTERN_LENGTH = 10_000
MAX_OPTIONAL = 3  # optional parts of an alternative: each doubles the ways to match
# Parts of a regular expression in Oniguruma's syntax: an escape, a class of characters, a group's flags, a character.
PATTERN_PARTS = re.compile(r"\\[pPx]\{[^}]*\}|\\.|\[(?:[^\[\]\\]|\\.|\[[^\[\]]*\])*\]|\(\?<?[:=!>i]|.", re.DOTALL)


def check_tokenizer_json(text: str) -> None:
    """Checks the text of a `tokenizer.json`. Raises DataError, which names the key, if it is not a JSON object, or has
    ids above MAX_TOKEN_ID, random merges, or a regular expression that may backtrack without bound."""
    try:
        content = json.loads(text)
        parts = content if isinstance(content, dict) else {}
        patterns = [(key, p) for key in ("normalizer", "pre_tokenizer") for p in _find_patterns(parts.get(key))]
    except ValueError as e:
        raise DataError(f"{TOKENIZER_FILE} is not JSON ({e})") from None
    except RecursionError:
        raise DataError(f"{TOKENIZER_FILE} is not JSON that can be read (nested too deeply)") from None
    if not isinstance(content, dict):
        raise DataError(f"{TOKENIZER_FILE} holds a {type(content).__name__}, not an object")
    for key, pattern in patterns:
        if not _is_bounded(pattern):
            raise DataError(
                f"{TOKENIZER_FILE}: the regular expression {pattern[:80]!r} in {key} may take without end; it may "
                "have one of * + {n} in each alternative, none after a group"
            )
    model = content.get("model")
    if isinstance(model, dict):
        if model.get("dropout"):
            raise DataError(f"{TOKENIZER_FILE}: model.dropout {model['dropout']!r} makes ids random; set it to null")
        _check_ids("model.vocab", model["vocab"].items() if isinstance(model.get("vocab"), dict) else ())
    added = content.get("added_tokens")
    entries = [t for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    padding = content.get("padding")
    _check_ids("padding", [(padding.get("pad_token"), padding.get("pad_id"))] if isinstance(padding, dict) else ())
    _check_ids("added_tokens", [(t.get("content"), t.get("id")) for t in entries])


def _check_ids(key: str, items) -> None:
    """Raises DataError if an id of the pairs (token, id) is no whole number in 0 to MAX_TOKEN_ID."""
    for token, number in items:
        if type(number) is not int or not 0 <= number <= MAX_TOKEN_ID:
            raise DataError(
                f"{TOKENIZER_FILE}: {key}: the id {str(number)[:40]} of {str(token)[:40]!r} is not in 0 to "
                f"{MAX_TOKEN_ID}"
            )


def _find_patterns(value) -> list[str]:
    """Returns all regular expressions in a part of a `tokenizer.json`."""
    if isinstance(value, list):
        return [pattern for item in value for pattern in _find_patterns(item)]
    if not isinstance(value, dict):
        return []
    own = [value["Regex"]] if isinstance(value.get("Regex"), str) else []
    return own + [pattern for item in value.values() for pattern in _find_patterns(item)]


def _is_bounded(pattern: str) -> bool:
    """Returns whether the time of a search for a regular expression is bounded. It is if each alternative has at most
    one repetition (* + {n}) and MAX_OPTIONAL optional parts (?), and no group is repeated or referred to. CLIP's and
    GPT-2's expressions pass; the rule refuses some that are harmless."""
    repetitions, optional, depth, previous = 0, 0, 0, ""
    for part in PATTERN_PARTS.findall(pattern):
        if part == "|" and depth == 0:
            repetitions = optional = 0
        elif part in ("*", "+", "{"):
            repetitions += 1
            if previous == ")":
                return False
        elif re.fullmatch(r"\\[1-9kgK]", part):
            return False
        optional += part == "?"
        depth += part.startswith("(") - (part == ")")
        if repetitions > 1 or optional > MAX_OPTIONAL:
            return False
        previous = part
    # In extended syntax, blanks may stand between a group and its repetition.
    has_spaces = re.search(r"\(\?[a-zA-Z-]*x", pattern)
    return len(pattern) <= MAX_PATTERN_LENGTH and not has_spaces
