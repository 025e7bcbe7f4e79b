"""Makes an index of a folder of images, or brings it up to date; exports one for other engines (docs/evaluation.md).

    python eval.py index --workdir=DIR --images=FOLDER --out=INDEX
    python eval.py index --index=INDEX --export=parquet|faiss --out=DIR

The first command encodes what is new or has changed in the folder, and drops what is gone. The second writes vectors
and paths in the layout of clip-retrieval, as files of NumPy and Parquet, or as an index of faiss.
"""

from absl import flags

from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.run import define_run_flags, run_from_flags
from mefn_jax.retrieval.export import EXPORTS, export_index
from mefn_jax.retrieval.index import index_images
from mefn_jax.runtime.cli import define_path_flag, define_process_flags, require_flag
from mefn_jax.runtime.multihost import initialize


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    define_path_flag("images", None, "Folder of images; those in its subfolders are taken too.")
    define_path_flag("out", None, "Directory of the index, or with --export of the export.", required=True)
    define_path_flag("index", None, "Directory of an index that is to be exported.")
    flags.DEFINE_enum("export", None, list(EXPORTS), "Layout in which --index is exported.")
    define_process_flags()


def main() -> None:
    """Runs the command."""
    f = flags.FLAGS
    is_export = f.export is not None or f.index is not None
    if is_export and f.images is not None:
        raise ConfigError("--images makes an index, --index and --export export one: give one of them")
    values = [require_flag(name) for name in (("index", "export") if is_export else ("images",))]
    initialize()
    if is_export:
        export_index(*values, f.out)
    else:
        index_images(run_from_flags(), *values, f.out)
