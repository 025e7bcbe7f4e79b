"""The meaning of drawn scenes' captions: truth against a naive check, and spans of words."""

import itertools

import pytest

from mefn_jax.data.scenes import draw, grammar


@pytest.fixture(scope="module")
def scenes():
    return list(draw.generate_examples("test", 120, seed=3))


def things(example):
    fields = grammar.Thing.__dataclass_fields__
    return [grammar.Thing(**{k: t[k] for k in fields}) for t in example["scene"]["things"]]


def naive_truth(meaning, scene):
    """Whether a meaning is true of a scene, by trying all assignments of its phrases to things."""

    def matches(thing, phrase):
        return all(getattr(thing, a) == v for a, v in phrase.attributes.items())

    for phrase in meaning.phrases:
        if phrase.count > 1 and sum(matches(t, phrase) for t in scene) != phrase.count:
            return False
    single = [p for p in meaning.phrases if p.count == 1]
    for candidates in itertools.permutations(scene, len(single)):
        if not all(matches(t, p) for t, p in zip(candidates, single, strict=True)):
            continue
        if meaning.relation is None:
            return True
        a, b = candidates[:2]
        distance = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[meaning.relation]
        if distance >= grammar.MARGIN:
            return True
    return False


def test_scenes_where_true_equals_naive_check(scenes):
    table = grammar.SceneTable([things(e) for e in scenes])
    number = 0
    for example in scenes[:40]:
        for caption in example["scene"]["captions"]:
            meaning = grammar.meaning_from_json(caption["meaning"])
            true = grammar.scenes_where_true(meaning, table)
            assert true.tolist() == [naive_truth(meaning, things(e)) for e in scenes]
            number += true.sum()
    assert number > 200


def test_captions_are_true_of_their_scene(scenes):
    for example in scenes:
        table = grammar.SceneTable([things(example)])
        assert example["captions"] == [c["text"] for c in example["scene"]["captions"]]
        assert len(example["captions"]) == 5
        for caption in example["scene"]["captions"]:
            assert grammar.scenes_where_true(grammar.meaning_from_json(caption["meaning"]), table)[0], caption["text"]


def test_caption_spans_name_their_things(scenes):
    for example in scenes[:40]:
        for caption in example["scene"]["captions"]:
            words = caption["text"].split()
            for phrase, (start, stop) in zip(caption["meaning"]["phrases"], caption["spans"], strict=True):
                named = words[start:stop]
                assert named[0] in ("a", "an", "two", "three")
                thing = example["scene"]["things"][phrase["things"][0]]
                for attribute in phrase["attributes"]:
                    value = thing[attribute]
                    forms = {value, *grammar.SYNONYMS.get(value, ())}
                    assert (
                        forms & {w.removesuffix("s").removesuffix("e") for w in named}
                        or forms & {w.removesuffix("s") for w in named}
                        or forms & set(named)
                    )
