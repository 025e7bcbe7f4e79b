"""What the tests share: small data made here, and the commands run as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before JAX's first call; what does not ask for more runs on the first
# What tests compile runs a few times: nearly all the time is compilation, and so a third less.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is installed, but there is no TPU

import numpy as np
import pytest
import tokenizers
from forks import Forks
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ASIDE = ("PYTEST_CURRENT_TEST",)  # of the environment, what no command looks at
CAPTIONS = ("a dog runs on grass .", "two children play", "a red car", "someone climbs a rock", "Water, and a boat .")


# One size of vocabulary, so that the commands on all data sets share their compiled programs.
SMOKE = ("--config=configs/flickr8k.py:smoke", "--config.text.vocab_size=400", "--config.train.steps=2")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where drawn scenes and compiled programs are kept between the commands of a test session, of all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def forks(cache):
    """Where commands without wishes of their own are run."""
    started = Forks(ROOT, environment(cache))
    yield started
    started.close()


@pytest.fixture(scope="session")
def command(cache, forks, tmp_path_factory):
    """`command("train.py", "--flag", ..., devices=1)` runs a script of the project and returns the finished process."""
    folder = tmp_path_factory.mktemp("said")

    def run(script, *args, devices=1, check=True, **kwargs):
        words = script.split() if script.startswith("-m") else [str(ROOT / script)]
        words += map(str, args)
        env = environment(cache, devices)
        if not kwargs and same(env, forks.env):
            result = forks.run(words, folder)
        else:
            told = {"capture_output": True, "text": True, "cwd": ROOT, "env": env}
            result = subprocess.run([sys.executable, *words], **told, **kwargs)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


def same(env: dict, other: dict) -> bool:
    """Whether a process sees the same in two environments."""
    return {k: v for k, v in env.items() if k not in ASIDE} == {k: v for k, v in other.items() if k not in ASIDE}


def environment(cache, devices=1) -> dict:
    """The environment of a command: CPU, simulated devices, and compiled programs kept in `cache`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "MEFN_CACHE": str(cache / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / f"compiled-{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def write_flickr8k(root: Path, numbers=(12, 6), seed=0) -> Path:
    """A folder in Flickr8k's own format, with photographs of noise; returns it."""
    rng = np.random.default_rng(seed)
    (root / "Images").mkdir(parents=True)
    lines = []
    for split, number in zip(("train", "dev"), numbers, strict=True):
        names = [f"{split}_{k}.jpg" for k in range(number)]
        for name in names:
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).resize((120, 80)).save(root / "Images" / name)
            lines += [f"{name}#{k}\t{rng.choice(CAPTIONS)}" for k in range(5)]
        (root / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    lines.append("2258277193_586949ec62.jpg.1#0\tA stray line of no listed image .")
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def flickr8k(tmp_path):
    return write_flickr8k(tmp_path / "flickr8k")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, command):
    """A prepared data set made from a Flickr8k folder by the command."""
    root = tmp_path_factory.mktemp("prepared")
    write_flickr8k(root / "source", numbers=(40, 12))
    command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={root / 'source'}", f"--out={root / 'out'}")
    return root / "out"


@pytest.fixture
def towers(tmp_path):
    """Checkpoints of a tiny BERT, with a tokenizer, and a tiny ViT with its own normalisation of pixels."""
    for name in ("bert", "vit"):
        shutil.copytree(ROOT / "tests" / "fixtures" / name, tmp_path / name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "circle", "square", "left", "of"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    pixels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2], "size": 16, "resample": 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tmp_path


@pytest.fixture
def clip(tmp_path):
    """A checkpoint of a tiny CLIP, with a tokenizer and its preprocessing."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "clip", tmp_path / "clip")
    words = ["a", "dog", "runs", "on", "grass", "red", "two", "children", "play", "car", "someone", "climbs"]
    vocabulary = ["[UNK]", *words, *(f"spare{k}" for k in range(25)), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "clip" / "tokenizer.json"))
    pixels = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    pixels |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tmp_path / "clip"
