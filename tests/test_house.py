"""The floor plan and the language of the package: which room imports which, and how things are named and described."""

import ast
import collections
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mefn_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top floor down. A module imports from its own room and from the rooms below it.
ROOMS = (
    ("commands",),
    ("aot", "precompute", "print_config", "sweep", "show_data"),
    ("sweeps",),
    ("training",),
    ("serving",),
    ("retrieval",),
    ("reports",),
    ("benchmarks",),
    ("export",),
    ("evaluation",),
    ("resolve",),
    ("configs",),
    ("model",),
    ("encoders",),
    ("matching",),
    ("scoring",),
    ("data",),
    ("runtime",),
    ("config", "optim", "losses", "metrics"),
    ("features", "errors"),
)
FLOOR = {name: number for number, names in enumerate(ROOMS) for name in names}
# Public names that stand in several modules, and what they mean in all of them.
SHARED_NAMES = {
    "main": "runs a command",
    "define_flags": "defines the flags of a command",
    "read": "reads a source of images and captions, or a benchmark's published files",
    "load": "loads a trained model (the package's is that of retrieval/api.py)",
}
# Names of functions that begin like a participle, and why they may.
PARTICIPLES = {
    "replicated": "JAX's word for an array of which every device has a copy",
    "squared_norms": "a norm, squared: the usual name",
    "masked_log_softmax": "the log-softmax over masked entries is called so in the field",
    "unified_embeddings": "the paper's word for f(v|t) and f(t|v)",
}
NO_PARTICIPLE = {"embed", "feed", "need", "seed", "speed"}
IRREGULAR = {*["drawn", "shown", "said", "told", "begun", "kept", "made", "found", "laid", "taken", "given", "chosen"]}


def name_of(path):
    """The dotted name of a module, `mefn_jax.data.split`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """The modules of the package that a module imports, at its top level and inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mefn_jax":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mefn_jax")


def test_rooms_import_only_from_rooms_below():
    wrong = []
    for name, path in MODULES.items():
        if name == "mefn_jax":
            continue  # only `load`, which imports the package when it is called
        room = name.split(".")[1]
        for other in imports(path):
            below = other.split(".")[1]
            if below != room and FLOOR[below] <= FLOOR[room]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_floor():
    assert {name.split(".")[1] for name in MODULES if name != "mefn_jax"} == set(FLOOR)


def test_imports_form_no_circle():
    edges = {name: set(imports(path)) - {name} for name, path in MODULES.items() if name != "mefn_jax"}
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, " -> ".join([*under_way[under_way.index(name) :], name])
        if name not in done:
            under_way.append(name)
            for other in sorted(edges.get(name, ())):
                visit(other)
            done.add(under_way.pop())

    for name in sorted(edges):
        visit(name)


def test_at_most_14_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_importing_a_module_does_nothing():
    """No module calls anything at its top level but what makes a value that it keeps."""
    wrong = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            command = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
            foreign = isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets
            )
            if not (docstring or command or isinstance(node, kept)) or foreign:
                wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong, "\n".join(wrong)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_participle(name):
    first = name.strip("_").split("_")[0]
    return first == "of" or first in IRREGULAR or (first.endswith("ed") and first not in NO_PARTICIPLE)


def test_functions_are_named_by_verbs():
    names = [node.name for path in FILES for node in functions(ast.parse(path.read_text()))]
    assert len(PARTICIPLES) <= 10
    odd = [name for name in names if is_participle(name) and name not in PARTICIPLES]
    assert len(odd) <= 0.03 * len(names), f"{len(odd)} of {len(names)}: {sorted(odd)}"


def top_level_names(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def test_a_public_name_stands_in_one_module():
    places = collections.defaultdict(list)
    for name, path in MODULES.items():
        for defined in set(top_level_names(path)):
            if not defined.startswith("_"):
                places[defined].append(name)
    assert len(SHARED_NAMES) <= 12
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED_NAMES}
    assert not twice, twice


def docstrings():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"{name}.{getattr(node, 'name', '')}", text


def test_docstrings_begin_with_a_verb_or_a_noun():
    texts = dict(docstrings())
    odd = [where for where, text in texts.items() if text.split()[0] in ("What", "How", "The")]
    assert len(odd) <= 0.1 * len(texts), f"{len(odd)} of {len(texts)}: {odd}"


FOLDERS = ("mefn_jax", "configs", "tests", "benchmarks", "docs")
# Placeholders, and what a command writes.
NO_FILES = {"FILE.py", "NAME.py", "configs/NAME.py", "compare.md", "summary.md"}


def is_file(path, folder):
    """Whether a file that a text in `folder` names exists: a path from the root, from the package or from `folder`, or
    a bare name of any file of the project."""
    if any((base / path).is_file() for base in (ROOT, PACKAGE, folder)):
        return True
    return "/" not in path and any(list((ROOT / name).rglob(path)) for name in FOLDERS)


def prose_of(path):
    """The comments and docstrings of a module, or a page without its diffs."""
    text = path.read_text()
    if path.suffix == ".md":
        return re.sub(r"```diff.*?```", "", text, flags=re.DOTALL)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)]
    return "\n".join(re.findall(r"#.*", text) + [ast.get_docstring(n) or "" for n in nodes])


PROSE = [ROOT / "README.md"]
PROSE += [p for name in FOLDERS for p in sorted((ROOT / name).rglob("*")) if p.suffix in (".py", ".md")]


def test_every_file_that_a_text_names_exists():
    wrong = []
    for path in PROSE:
        for named in re.findall(r"(?<![\w/.*-])(\w[\w/-]*\.(?:py|md))\b", prose_of(path)):
            if named not in NO_FILES and not is_file(named, path.parent):
                wrong.append(f"{path.relative_to(ROOT)}: {named}")
    assert not wrong, "\n".join(wrong)


def test_every_equation_that_a_docstring_cites_exists():
    numbered = set(re.findall(r"\((\d+)\)$", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    cited = {}
    for where, text in docstrings():
        for numbers in re.findall(r"docs/method\.md, Eqs?\. ([\d, andto-]+)", text):
            cited |= dict.fromkeys(re.findall(r"\d+", numbers), where)
    assert len(cited) > 40
    assert cited.keys() <= numbered, {number: where for number, where in cited.items() if number not in numbered}


def test_documents_outside_the_repository_are_not_named():
    words = ["DES" + "IGN", "PEE" + "RS", "JAX_" + "NOTES"]
    done = subprocess.run(["git", "grep", "-nE", "|".join(words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a checkout")
    assert not done.stdout


def test_readme_is_a_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
