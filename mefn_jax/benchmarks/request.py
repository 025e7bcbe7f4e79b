"""What a user asks of a benchmark, and what a reader needs to open its files."""

import dataclasses
from pathlib import Path

from mefn_jax.data.parsing import find_image
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.evaluator import Evaluator


@dataclasses.dataclass(frozen=True)
class Request:
    """A benchmark that is asked for, with the flags of the command.

    Attributes:
        benchmark: its name.
        published: where its files are published, and under which licence: the end of the message if one is missing.
        evaluator: the model that will be scored.
        data_dir: the folder of the published files; "" if none was given.
        images: the folder of the images, where it is not `data_dir`; "" if none was given.
        split: the split of a data set of the model's own, or of the benchmark's if that has several.
        languages: codes of the languages that are wanted; all for none.
        templates: file of the templates of zero-shot classification; "" for the one built in.
    """

    benchmark: str
    published: str
    evaluator: Evaluator
    data_dir: str = ""
    images: str = ""
    split: str = "test"
    languages: tuple[str, ...] = ()
    templates: str = ""

    @property
    def folder(self) -> Path:
        """Returns the folder of the published files. Raises ConfigError if none was given, DataError if it does not
        exist."""
        if not self.data_dir:
            raise ConfigError(f"{self.benchmark}: give --data_dir, the folder of its files; {self.published}")
        folder = Path(self.data_dir)
        if not folder.is_dir():
            raise DataError(f"--data_dir={folder}: no such directory; {self.published}")
        return folder

    def find_file(self, *names: str) -> Path:
        """Returns the first file of these names that is in the folder. Raises DataError that says where the files are
        published if there is none."""
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        raise DataError(f"{self.folder}: no {' or '.join(names)} in it; {self.published}")

    def image_folder(self, *names: str) -> Path:
        """Returns the folder of the images: `--images`, or the first folder of these names below that of the files, or
        that one itself. Raises DataError if `--images` does not exist."""
        if self.images:
            folder = Path(self.images)
            if not folder.is_dir():
                raise DataError(f"--images={folder}: no such directory; give the folder of the images")
            return folder
        return next((self.folder / name for name in names if (self.folder / name).is_dir()), self.folder)

    def find_image(self, folder: Path, name: str, where: str) -> Path:
        """Returns the path of an image below a folder. Raises DataError as `parsing.find_image` does."""
        try:
            return find_image(folder, name, where)
        except DataError as e:
            hint = "" if self.images else "; --images=FOLDER names another folder"
            raise DataError(f"{e}{hint}; {self.published}") from None
