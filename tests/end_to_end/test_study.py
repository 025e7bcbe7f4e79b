"""Precomputed regions with cached words: from a frozen tower's states to one table, by the commands."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_precomputed import write_precomp

from configs import precomputed
from mefn_jax.data import pipeline
from mefn_jax.data.dataset import HELD_OUT, Dataset
from mefn_jax.data.formats import cached_words
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation import cca
from mefn_jax.evaluation.cca import MeanFeatures

CONFIG = "--config=configs/precomputed.py:smoke"


def write_words(root, split, captions, width=6, dtype=np.float16):
    """Cached words of captions, as many a caption as it has words; returns them by caption."""
    rng = np.random.default_rng(len(captions))
    words = [rng.normal(size=(len(c.split()), width)).astype(dtype) for c in captions]
    root.mkdir(exist_ok=True)
    np.save(root / f"{split}_words.npy", np.concatenate(words))
    np.save(root / f"{split}_word_offsets.npy", np.cumsum([0, *map(len, words)]))
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    return words


@pytest.fixture
def data(tmp_path):
    """Regions of 20 images, and the words of their captions."""
    write_precomp(tmp_path / "regions", "train", 20, shape=(9, 7))
    captions = Dataset(tmp_path / "regions").split("train").all_captions()
    return tmp_path, write_words(tmp_path / "words", "train", captions)


def test_cached_words_are_read_by_caption_and_cut_to_length(data):
    root, words = data
    split = Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=4).split("train")
    found, mask = split.cached_text.read(np.array([7, 0, 99]))
    assert (found.shape, found.dtype) == ((3, 4, 6), np.float16)
    for k, caption in enumerate((7, 0, 99)):
        assert mask[k].sum() == min(4, len(words[caption]))
        np.testing.assert_array_equal(found[k][mask[k]], words[caption][:4])
        assert not found[k][~mask[k]].any()
    batch = pipeline.training_dataset(split, None, None, 8, seed=0)[3]
    expected, mask = split.cached_text.read(batch["caption_index"])
    np.testing.assert_array_equal(batch["text"], expected)
    np.testing.assert_array_equal(batch["text_mask"], mask)


def test_held_out_images_are_the_last_of_train_and_leave_it(data):
    root, words = data
    dataset = Dataset(root / "regions", held_out_images=5, cached_text=str(root / "words"), max_tokens=9)
    train, held = dataset.split("train"), dataset.split(HELD_OUT)
    assert (train.num_images, held.num_images, train.num_captions, held.num_captions) == (15, 5, 75, 25)
    whole = Dataset(root / "regions").split("train")
    assert train.all_captions() + held.all_captions() == whole.all_captions()
    np.testing.assert_array_equal(held.records.read(held.record_ids), whole.records.read(whole.record_ids[15:]))
    np.testing.assert_array_equal(held.cached_text.read(np.array([3]))[0][0][: len(words[78])], words[78])
    np.testing.assert_array_equal(held.caption_image, np.repeat(np.arange(5), 5))
    with pytest.raises(DataError, match=r"data.held_out_images=20: train has 20 images"):
        Dataset(root / "regions", held_out_images=20).split("train")


def test_words_that_do_not_fit_are_refused(data):
    root, _ = data

    def complaint():
        with pytest.raises(DataError) as e:
            Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=4).split("train").cached_text.read(
                [2]
            )
        return str(e.value)

    captions = (root / "words" / "train_caps.txt").read_text()
    (root / "words" / "train_caps.txt").write_text(captions.replace("dog number 3 of train 1.", "cat"))
    assert "differ from the 100 of data.dir's train from caption 8 on" in complaint()
    (root / "words" / "train_caps.txt").write_text(captions)
    states = np.load(root / "words" / "train_words.npy")
    np.save(root / "words" / "train_words.npy", states[:-1])
    assert "train_word_offsets.npy: does not fit train_words.npy" in complaint()
    np.save(root / "words" / "train_words.npy", states.astype(np.float32))
    assert "expected float16 (words, width), found float32" in complaint()
    states[14] = np.nan
    np.save(root / "words" / "train_words.npy", states)
    assert "the words of caption 2 have NaN or inf" in complaint()
    np.save(root / "words" / "train_words.npy", np.array([{}], object))
    assert "cannot be read as an array" in complaint()
    (root / "words" / "train_words.npy").unlink()
    assert "no such file; write it with python -m mefn_jax.precompute" in complaint()


def test_the_linear_map_is_that_of_a_direct_solution():
    """Its directions solve the generalised eigenproblem of regularised CCA, pair by pair, an image once a caption."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    images = rng.normal(size=(30, 4))
    texts = images[owner] @ rng.normal(size=(4, 3)) + rng.normal(size=(len(owner), 3))
    linear = cca.fit_cca(MeanFeatures(images, texts, owner), 0.1, 0.2)
    x, y = images[owner] - images[owner].mean(0), texts - texts.mean(0)
    Cx, Cy, Cxy = x.T @ x / len(x), y.T @ y / len(y), x.T @ y / len(x)
    Cx, Cy = Cx + 0.1 * np.trace(Cx) / 4 * np.eye(4), Cy + 0.2 * np.trace(Cy) / 3 * np.eye(3)
    squares = np.sort(np.linalg.eigvals(np.linalg.solve(Cx, Cxy) @ np.linalg.solve(Cy, Cxy.T)).real)[::-1][:3]
    np.testing.assert_allclose(linear.correlations**2, squares, rtol=1e-6)
    np.testing.assert_allclose(linear.A.T @ Cx @ linear.A, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(linear.B.T @ Cy @ linear.B, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(linear.A.T @ Cxy @ linear.B, np.diag(linear.correlations), atol=1e-8)


def test_features_that_are_all_the_same_are_refused():
    with pytest.raises(DataError, match="all training captions have the same features"):
        cca.fit_cca(MeanFeatures(np.random.default_rng(0).normal(size=(4, 3)), np.ones((4, 2)), np.arange(4)), 0.1, 0.1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image.regions.projection", "mlp", "with image.regions.projection=linear"),
        ("text.arch", "gru", "text.arch=gru has no projection"),
        ("image.pooling", "gpo", "image.pooling is gpo"),
        ("text.pooling", "max", "text.pooling is max"),
    ],
)
def test_a_linear_start_says_what_it_cannot_begin(key, value, said):
    config = precomputed.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        cca.check_supports_cca(config)


def test_the_study_by_its_commands(tmp_path, towers, command):
    """Words of a frozen tower, the linear map, two models by the sweep, their ensemble, and one table."""
    regions, words, runs = tmp_path / "regions", tmp_path / "words", tmp_path / "runs"
    known = ["a", "red", "blue", "circle", "square", "left", "of"]  # what the tower's tokenizer knows
    for split, images in (("train", 24), ("dev", 8)):
        write_precomp(regions, split, images, shape=(9, 20))
        lines = [" ".join(np.random.default_rng(k).choice(known, 3 + k % 5)) for k in range(5 * images)]
        (regions / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    data = f"--config.data.dir={regions}"
    bert = ("--config=configs/precomputed.py:smoke,text=bert", data, f"--config.text.pretrained={towers / 'bert'}")
    bert += ("--config.text.max_tokens=10",)
    command("-m mefn_jax.precompute", *bert, f"--out={words}", "--splits=train,val")
    frozen = (CONFIG, data, f"--config.data.cached_text={words}", "--config.embed_dim=8", "--config.text.max_tokens=10")

    linear = command(
        "-m mefn_jax.evaluation.cca_baseline", *frozen, "--split=val", "--held_out_images=6", f"--out={runs / 'linear'}"
    ).stdout
    assert "chosen on 6 held-out images" in linear
    assert json.loads((runs / "linear" / "metrics.json").read_text())["protocol"]["images"] == 8

    sweep = ("-m mefn_jax.sweep", *frozen, "--config.train.ema_decay=0.5", "--config.train.steps=4", "--split=val")
    sweep += ("--models=vsepp,mefn", "--seeds=0", f"--out={runs}")
    lines = command(*sweep).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["vsepp seed 0", "mefn seed 0"]
    log = (runs / "mefn" / "0" / "log.txt").read_text()
    assert "starting from a linear map of 24 training images and 120 captions" in log
    assert "hub_scale" in log
    assert [line.endswith("(was done)") for line in command(*sweep).stdout.splitlines()] == [True, True]

    # What is averaged is evaluated beside what is trained.
    command("eval.py", f"--workdir={runs / 'mefn' / '0'}", "--split=val", "--ema")
    metrics = [json.loads(line) for line in (runs / "mefn" / "0" / "metrics.jsonl").read_text().splitlines()]
    at_end = [m for m in metrics if m["step"] == 4]
    folder = runs / "mefn" / "0" / "eval"
    for name, logged in (("val", "val.rsum"), ("val_ema", "ema.rsum")):
        report = json.loads((folder / name / "metrics.json").read_text())
        assert report["rsum"] == pytest.approx(next(m[logged] for m in at_end if logged in m))

    both = f"--ensemble={runs / 'vsepp' / '0'},{runs / 'mefn' / '0'}"
    assert "ensemble of 2 (scores averaged)" in command("eval.py", both, "--split=val", f"--out={runs / 'both'}").stdout
    names = f"--compare={runs}/linear,{runs}/*/0,{runs}/both,{folder}/val_ema"
    table = command("eval.py", names, "--split=val", f"--out={tmp_path / 'table'}").stdout
    first = [line.split(" |")[0] for line in table.splitlines() if line.startswith("| ")]
    averaged = "| mefn (evaluated=averaged parameters)"
    assert first[1:6] == ["| linear_map", "| mefn (evaluated=None)", "| vsepp", "| ensemble of 2", averaged]
    assert (tmp_path / "table" / "compare.csv").is_file()


@pytest.mark.parametrize("text", ["gru", "frozen bert"])
def test_precomputed_regions_with_a_text_tower(text, tmp_path, towers, command):
    for split, images in (("train", 24), ("dev", 8)):
        write_precomp(tmp_path / "x", split, images, shape=(9, 20))
        lines = [
            f"a {c} circle left of a {d} square" for c in ("red", "blue") for d in ("red", "blue", "a", "of", "left")
        ]
        lines = [lines[(k // 5 + k % 5) % 10] for k in range(5 * images)]
        (tmp_path / "x" / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    options = [f"{CONFIG},text={text.split()[-1]}", f"--config.data.dir={tmp_path / 'x'}", "--config.train.steps=2"]
    if text != "gru":
        options += [f"--config.text.pretrained={towers / 'bert'}", "--config.text.max_tokens=10"]
        options += ["--config.embed_dim=8"]
    if text.startswith("frozen"):
        options += ['--config.train.lr_multipliers=("text/backbone:0",)']
    said = command("train.py", *options, f"--workdir={tmp_path / 'run'}").stdout
    assert ("starting from a linear map" in said) == (text != "gru")
    assert "done: 2 steps" in said
    assert "val: 8 images" in command("eval.py", f"--workdir={tmp_path / 'run'}", "--split=val").stdout


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, command):
    sweep = ("-m mefn_jax.sweep", CONFIG, "--models=mefn,vsep", "--seeds=0", f"--out={tmp_path}")
    result = command(*sweep, f"--config.data.dir={tmp_path / 'nowhere'}", check=False)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"mefn seed 0: failed, error: data.dir: {tmp_path / 'nowhere'}: no such directory")
    assert lines[1].startswith("vsep seed 0: failed, error: model: 'vsep' is not one of")
    for flags, said in (((), "--out=DIR is missing"), (("--out=x", "--seeds=a"), "--seeds=a: give numbers")):
        assert said in command("-m mefn_jax.sweep", CONFIG, *flags, check=False).stderr


def test_a_part_of_cached_words_maps_the_same_file(data):
    root, words = data
    split = Dataset(root / "regions", cached_text=str(root / "words"), max_tokens=9).split("train")
    part = split.cached_text.take(10, 20)
    again = cached_words.CachedText.__new__(cached_words.CachedText)
    again.__setstate__(part.__getstate__())
    assert len(part) == len(again) == 10
    for some in (part, again):
        np.testing.assert_array_equal(some.read(np.array([2]))[0][0, : len(words[12])], words[12])
    assert jnp.asarray(part.read(np.array([2]))[1]).dtype == jax.dtypes.canonicalize_dtype(bool)
