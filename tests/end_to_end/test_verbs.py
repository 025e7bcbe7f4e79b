"""The verbs of `eval.py`: their help, and what they refuse before any work begins."""

import re

import pytest

from mefn_jax.commands.eval import VERBS


def help_of(command, *verb) -> tuple[str, list[str]]:
    """Returns the text of `eval.py [VERB] --help`, and the flags that it lists, in its order."""
    text = command("eval.py", *verb, "--help").stdout
    return text, re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE)


def test_help_names_every_verb_and_flags_in_order_of_definition(command):
    text, names = help_of(command)
    for verb in VERBS:
        assert re.search(rf"^    python eval\.py {verb} ", text, re.MULTILINE), verb
    assert names[:4] == ["workdir", "step", "ema", "split"]
    assert {"folds", "data_dir", "rerank", "save_scores", "out"} < set(names)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_verb_shows_its_command_and_flags(command, verb):
    text, names = help_of(command, verb)
    commands = re.findall(rf"^    python eval\.py {verb} (.*)", text, re.MULTILINE)
    assert commands
    named = {name for line in commands for name in re.findall(r"--(\w+)=", line)}
    assert named <= set(names), named - set(names)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("reprot",), 2, r"'reprot' is not one of the verbs report, .*, did you mean 'report'\?"),
        (("explain", "--image=x.png"), 1, "--caption is missing: the caption to draw with --image"),
        (("explain", "--caption=a dog"), 1, "--image is missing: an image file to draw with --caption"),
        (("search", "--caption=a dog"), 1, "--index is missing: directory of an index, whose images are ranked for "),
        (("search", "--index=x"), 1, "--caption is missing: the caption that is searched for"),
        (("search", "--image=x.png"), 1, "--captions is missing: a text file with one caption on each line, to rank"),
        (("compare", "--out=x"), 1, "no runs are named"),
        (("ensemble", "--out=x"), 1, "no runs are named"),
        (("index", "--out=x"), 1, "--images is missing: folder of images"),
        (("compile", "--config=configs/shapes.py"), 2, "--target is missing: "),
        (("--workdir=runs/shapes", "report"), 2, "a verb is the first word: python eval.py report"),
        (("report", "runs/shapes"), 2, "unexpected argument 'runs/shapes'; options start with --"),
    ],
)
def test_verbs_refuse_missing_or_superfluous_arguments(command, arguments, status, message):
    result = command("eval.py", *arguments, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert re.match(f"error: .*{message}", line), line
