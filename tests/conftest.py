"""Fixtures that the tests share: small data, trained runs, and the commands as a user runs them."""

import fcntl
import gc
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before JAX's first call; most tests run on the first device
# The tests run a compiled program few times, so most of their time is compilation. These flags save two thirds of it.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") < "0.11":  # later versions have no other code generator
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is installed, but there is no TPU

import numpy as np
import pytest
import tokenizers
from commands import ROOT, SMOKE, environment, is_same_environment, reset_signals
from fake_gcs import FakeGcs
from forks import Forks
from PIL import Image
from sample_data import write_cached_text, write_flickr8k, write_precomputed

gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live on: collecting less often saves a tenth


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of the test session that all workers share, for drawn scenes, compiled programs and trained runs."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _compile_once(cache):
    """Keeps the programs that the tests compile, for all workers."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled-here"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def once(cache):
    """`once(name, make)` returns the folder `name` of the cache; the first worker that asks for it calls `make(it)`."""

    def run(name, make):
        folder, done = cache / name, cache / f"{name}.done"
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return run


@pytest.fixture(scope="session")
def forks(cache):
    """The process from which commands are forked."""
    started = Forks(ROOT, environment(cache))
    yield started
    started.close()


@pytest.fixture(scope="session")
def command(cache, forks, tmp_path_factory):
    """`command("train.py", "--flag", ..., devices=1)` runs a script of the project and returns the finished process."""
    folder = tmp_path_factory.mktemp("output")

    def run(script, *args, devices=1, check=True, **kwargs):
        words = script.split() if script.startswith("-m") else [str(ROOT / script)]
        words += map(str, args)
        env = environment(cache, devices)
        if not kwargs and is_same_environment(env, forks.env):
            result = forks.run(words, folder)
        else:
            options = {"capture_output": True, "text": True, "cwd": ROOT, "env": env}
            result = subprocess.run([sys.executable, *words], **options, **kwargs)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def start_training(cache):
    """`start_training(workdir, processes, *flags)` starts `train.py` in this number of processes and returns them. Each
    has two devices by default; `each(k)` returns further flags of process k. The system is SFE by default, whose
    constants process 0 computes for all."""
    running = []
    every_step = [f"--config.train.{key}" for key in ("log_every=1", "eval_every=1000", "save_every=1000")]

    def start(workdir, processes, *flags, each=lambda k: (), devices=2, model="sfe"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for k in range(processes):
            words = [
                sys.executable,
                str(ROOT / "train.py"),
                f"{SMOKE},model={model}",
                *every_step,
                f"--workdir={workdir}",
            ]
            words += [*flags, *each(k)]
            if processes > 1:
                words += [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
                words += [f"--process_id={k}"]
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            output["preexec_fn"] = reset_signals
            started.append(subprocess.Popen(words, env=environment(cache, devices), cwd=ROOT, **output))
        running.extend(started)
        return started

    yield start
    for process in running:
        process.kill()


@pytest.fixture(scope="session")
def trained(once, command):
    """The workdir of a finished smoke run on drawn scenes, and what the run printed."""

    def train(folder):
        (folder / "output.txt").write_text(command("train.py", SMOKE, f"--workdir={folder / 'run'}").stdout)

    folder = once("trained", train)
    return folder / "run", (folder / "output.txt").read_text()


def train_two_steps(workdir, model) -> None:
    """Trains a model on drawn scenes, in this process."""
    from configs import shapes
    from mefn_jax.training import loop

    config = shapes.get_config(f"smoke,model={model}")
    with config.unlocked():
        config.train.steps = config.train.eval_every = 2
        config.eval.batch_size = 4
        config.eval.explained_pairs = 2
    loop.train(config, workdir)


@pytest.fixture(scope="session")
def mefn_run(once):
    """The workdir of an MEFN trained for two steps, whose evaluations draw two pairs."""
    return once("mefn_run", lambda folder: train_two_steps(folder / "run", "mefn")) / "run"


@pytest.fixture(scope="session")
def runs(once, mefn_run):
    """The workdirs of three trained models: MEFN, VSE++, whose score is the cosine of its embeddings, and MATE, whose
    scores have a bound."""
    vsepp, mate = (
        once(f"{name}_run", lambda folder, name=name: train_two_steps(folder / "run", name))
        for name in ("vsepp", "mate")
    )
    return {"mefn": mefn_run, "vsepp": vsepp / "run", "mate": mate / "run"}


@pytest.fixture(scope="session")
def loaded(mefn_run):
    """The model of `mefn_run` and its parameters, the val split, and the Features of its images and captions."""
    from mefn_jax.data import from_config
    from mefn_jax.evaluation import evaluator

    model, params, _ = evaluator.load_checkpoint(mefn_run, "latest")
    split = from_config.open_dataset(model.config).split("val")
    return model, params, split, *model.encode(params, split)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 11 images, half of them in a subfolder, one more image that is broken, and a text file."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    (root / "below").mkdir()
    for k in range(11):
        pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((70 + k, 50)).save(root / f"{'below/' if k % 2 else ''}{k}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def flickr8k(tmp_path):
    """A folder in Flickr8k's format."""
    return write_flickr8k(tmp_path / "flickr8k")


@pytest.fixture(scope="session")
def prepared(once, command):
    """A prepared data set; the Flickr8k folder that it was made from is `source` beside it."""

    def prepare(root):
        write_flickr8k(root / "source", numbers=(40, 12))
        command("-m mefn_jax.data.prepare", "--source=flickr8k", f"--path={root / 'source'}", f"--out={root / 'out'}")

    return once("prepared", prepare) / "out"


@pytest.fixture
def regions_and_words(tmp_path):
    """A folder with precomputed regions of 20 images in `regions` and cached text of their captions in `words`, and the
    cached vectors by caption."""
    from mefn_jax.data.dataset import Dataset

    write_precomputed(tmp_path / "regions", "train", 20, shape=(9, 7))
    captions = Dataset(tmp_path / "regions").split("train").all_captions()
    return tmp_path, write_cached_text(tmp_path / "words", "train", captions)


@pytest.fixture
def towers(tmp_path):
    """Checkpoints of a tiny BERT, with a tokenizer, and of a tiny ViT with its own normalization of pixels."""
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
    start, end = vocabulary[-2:]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 38), (end, 39)]
    )
    tokenizer.save(str(tmp_path / "clip" / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": end, "eos_token": end}
    (tmp_path / "clip" / "tokenizer_config.json").write_text(json.dumps(names))
    pixels = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    pixels |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return tmp_path / "clip"


@pytest.fixture
def gcs(monkeypatch):
    """A storage server with one bucket, which the clients of this process and of the commands take for Google's."""
    with FakeGcs("bucket") as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        yield fake
        assert not fake.unknown
