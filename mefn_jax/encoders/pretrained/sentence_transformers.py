"""Notes about the parts of a sentence-transformers checkpoint that are not read: its pooling and further modules."""

from pathlib import Path

from mefn_jax.encoders.pretrained.files import locate_file, read_json_value, read_object
from mefn_jax.errors import WeightsError
from mefn_jax.runtime.console import print0, printable

MODULES = "modules.json"
POOLING = "1_Pooling"  # folder of the pooling, unless modules.json names another
READ_OR_NEEDLESS = ("Transformer", "Pooling", "Normalize")  # scores are of vectors of unit length anyway
# Our text.pooling for a mode of sentence-transformers. Its mean and maximum include [CLS] and [SEP], ours do not.
NEAREST = {"mean": "mean", "mean_tokens": "mean", "max": "max", "max_tokens": "max"}


def note_unread_modules(directory: Path, pooling: str) -> None:
    """Prints a note for each module of the checkpoint that is not read, and for its pooling, in place of which
    `pooling` (`text.pooling`) is used. Raises WeightsError for files that cannot be interpreted."""
    for kind, folder in _list_modules(directory):
        if kind == "Pooling":
            _note_pooling(directory, folder, pooling)
        elif kind not in READ_OR_NEEDLESS:
            print0(f"note: {directory / MODULES} lists the module {kind} ({folder[:60]}), which is not read")
    path = directory / "sentence_bert_config.json"
    if path.is_file() and read_object(path).get("do_lower_case"):
        print0(f"note: {path} asks for lower case (do_lower_case), which only the tokenizer decides here")


def _list_modules(directory: Path) -> list[tuple[str, str]]:
    """Returns the class's name and the folder of each module; none if the checkpoint is of another library."""
    path = directory / MODULES
    if not path.is_file():
        return [("Pooling", POOLING)] if (directory / POOLING / "config.json").is_file() else []
    modules = read_json_value(path)
    fields = ("type", "path")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and all(isinstance(m.get(f), str) for f in fields) for m in modules
    ):
        raise WeightsError(f"{path}: must be a list of modules with type and path")
    for folder in (m["path"] for m in modules):
        if folder != printable(folder):  # it would break the lines of notes and errors
            raise WeightsError(f"{path}: path {folder[:60]!a} is no usable name of a folder; correct it")
    return [(printable(m["type"].rpartition(".")[2][:60]), m["path"]) for m in modules]


def _note_pooling(directory: Path, folder: str, pooling: str) -> None:
    """Prints a note about the pooling in `folder`."""
    path = locate_file(directory, f"{folder}/config.json", str(directory / MODULES))
    settings = read_object(path) if path.is_file() else {}
    prefix = "pooling_mode_"
    modes = [k.removeprefix(prefix) for k, v in settings.items() if k.startswith(prefix) and v is True]
    modes = modes or [str(settings.get("pooling_mode", "unknown"))[:60]]
    nearest = NEAREST.get(modes[0]) if len(modes) == 1 else None
    if nearest == pooling:
        return
    advice = f"; text.pooling={nearest} is the nearest" if nearest else ""
    modes = printable(" and ".join(modes)[:200])
    print0(f"note: {path} pools by {modes}, which is not read: text.pooling={pooling} is used{advice}")
