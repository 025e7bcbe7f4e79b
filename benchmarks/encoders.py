"""Times the encoders against the same models of transformers in PyTorch, on the same CPU cores with the same weights.

    python benchmarks/encoders.py [--models=vit_s16,resnet50,bert_base] [--repeats=7] [--batch=8]

Needs torch and transformers. Prints a table, and as the last line a JSON object of PyTorch's time over ours: more than
1 means that ours is faster. "forward" computes the hidden states and the pooled output; "train" the gradient of their
mean squares with respect to all parameters, dropout off. All is float32.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from mefn_jax.encoders.pretrained import weights

# Name: (class and options of its configuration, class of the model, our kind of tower, items in a batch).
MODELS = {
    "vit_s16": (
        ("ViTConfig", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
        "ViTModel",
        "image",
        8,
    ),
    "resnet50": (("ResNetConfig", {}), "ResNetModel", "image", 8),
    "bert_base": (("BertConfig", {}), "BertModel", "text", 16),
}
IMAGE_SIZE = 224
TEXT_LENGTH = 32
TOLERANCE = 1e-4  # of the largest value: what reordered float32 sums may differ by
WARM_UP = 2
VOCABULARY = 30522  # BERT's


def images(batch: int) -> np.ndarray:
    """Normalised pixels `(B, H, W, 3)`."""
    return np.random.default_rng(0).normal(size=(batch, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def texts(batch: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `(B, L)` of texts of half to the full length: with padding, so that neither side can skip the
    mask."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(TEXT_LENGTH // 2, TEXT_LENGTH + 1, (batch, 1))
    mask = np.arange(TEXT_LENGTH) < lengths
    return (rng.integers(1, vocabulary, (batch, TEXT_LENGTH)) * mask).astype(np.int32), mask


def inputs_of(name: str, batch: int) -> tuple:
    """The same inputs on both sides."""
    return (images(batch),) if MODELS[name][2] == "image" else texts(batch, VOCABULARY)


def save_torch(name: str, directory: str) -> None:
    """A model of transformers with random weights, as a checkpoint."""
    import torch
    import transformers

    (config, options), model, _, _ = MODELS[name]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(directory)


def load_torch(name: str, directory: str):
    """The model in eval mode; attention is the fused one where the model has any."""
    import transformers

    return getattr(transformers, MODELS[name][1]).from_pretrained(directory).eval()


def torch_passes(name: str, model, inputs: tuple) -> dict[str, Callable]:
    """PyTorch's side: functions `forward() -> (states, pooled)` and `train() -> gradients`."""
    import torch

    if len(inputs) == 1:
        given = {"pixel_values": torch.from_numpy(inputs[0].transpose(0, 3, 1, 2).copy())}
    else:
        given = {"input_ids": torch.from_numpy(inputs[0]).long(), "attention_mask": torch.from_numpy(inputs[1]).long()}
    parameters = list(model.parameters())

    def outputs():
        out = model(**given)
        states = out.last_hidden_state
        # Ours gives a ViT's class token only as what is pooled.
        return states[:, 1:] if name.startswith("vit") else states, out.pooler_output

    def forward():
        with torch.inference_mode():
            return outputs()

    def train():
        states, pooled = outputs()
        return torch.autograd.grad(states.square().mean() + pooled.square().mean(), parameters)

    return {"forward": forward, "train": train}


def our_passes(tower: weights.Tower, inputs: tuple) -> dict[str, Callable]:
    """Our side of `torch_passes`. Parameters and inputs are arguments of what is compiled, as in training, so that
    nothing is folded into constants."""
    params, given = jax.device_put((tower.params, inputs))

    def outputs(params, *given):
        states, pooled = tower.module.apply({"params": params}, *given)
        return states[-1] if isinstance(states, list) else states, pooled  # of an image tower, the last grid

    def loss(params, *given):
        states, pooled = outputs(params, *given)
        return jnp.square(states).mean() + jnp.square(pooled).mean()

    forward, gradient = jax.jit(outputs), jax.jit(jax.grad(loss))
    return {
        "forward": lambda: jax.block_until_ready(forward(params, *given)),
        "train": lambda: jax.block_until_ready(gradient(params, *given)),
    }


def serve(side: str, name: str, batch: int, directory: str, connection) -> None:
    """A process of its own for each side, so that neither's threads are in the other's way: answers "outputs" with
    NumPy arrays, "forward" and "train" with the milliseconds that one took."""
    kind = MODELS[name][2]
    if side == "ours":
        jax.config.update("jax_platforms", "cpu")
        tower = weights.load_tower(directory, kind)
        passes = our_passes(tower, inputs_of(name, batch))
    else:
        passes = torch_passes(name, load_torch(name, directory), inputs_of(name, batch))
    for request in iter(connection.recv, None):
        if request == "outputs":
            norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(passes["train"]())))
            connection.send(([np.asarray(x) for x in passes["forward"]()], norm))
        else:
            start = time.perf_counter()
            passes[request]()
            connection.send(1e3 * (time.perf_counter() - start))


def check_equal(name: str, ours: tuple, theirs: tuple) -> None:
    """Raises AssertionError unless both sides compute the same: the outputs, and the gradient by its norm."""
    for what, our, their in zip(("states", "pooled"), ours[0], theirs[0], strict=True):
        if their.ndim == 4:  # a ResNet's grid or its mean, channels first
            their = their.transpose(0, 2, 3, 1)
        their = their.reshape(our.shape)  # ours of a ViT is a grid, theirs a sequence
        error = np.abs(our - their).max() / np.abs(their).max()
        assert error <= TOLERANCE, f"{name}: {what} differ by {error:.1e}"
    our, their = ours[1], theirs[1]
    assert abs(our - their) <= 10 * TOLERANCE * their, f"{name}: norm of the gradient {our:.6g}, theirs {their:.6g}"


def compare(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Prints a model's rows of the table. Returns PyTorch's time over ours for each pass, by the medians of runs in
    turns, so that whatever else the machine does meets both alike."""
    batch = batch or MODELS[name][3]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        save_torch(name, directory)
        sides = {}
        for side in ("ours", "theirs"):
            connection, far = context.Pipe()
            process = context.Process(target=serve, args=(side, name, batch, directory, far), daemon=True)
            process.start()
            sides[side] = connection, process

        def ask(side: str, request: str):
            sides[side][0].send(request)
            return sides[side][0].recv()

        check_equal(name, ask("ours", "outputs"), ask("theirs", "outputs"))
        ratios = {}
        for what in ("forward", "train"):
            taken = [[ask(side, what) for side in sides] for _ in range(WARM_UP + repeats)][WARM_UP:]
            our, their = (statistics.median(times) for times in zip(*taken, strict=True))
            ratios[what] = round(their / our, 2)
            print(f"{name:<10} {batch:>5}  {what:<8} {our:>9.1f} {their:>9.1f} {their / our:>6.2f}", flush=True)
        for connection, process in sides.values():
            connection.send(None)
            process.join()
    return ratios


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/encoders.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=list(MODELS),
        metavar="NAME,...",
        help=f"which models, by default all: {','.join(MODELS)}",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each pass, after warm-up (default: 7)")
    parser.add_argument("--batch", type=int, default=0, help="items in a batch (default: 8 images, 16 texts)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join(MODELS)}")
    if options.repeats < 1 or options.batch < 0:
        parser.error("--repeats must be 1 or more, and --batch not negative")
    return options


def main() -> None:
    options = parse()
    for package in ("torch", "transformers"):
        try:
            importlib.import_module(package)
        except ImportError as e:
            sys.exit(f"error: {package} cannot be imported ({e}); the comparison needs it: pip install {package}")
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (jax, torch, transformers))
    print(f"{versions}, float32, {torch.get_num_threads()} threads, median of {options.repeats}\n")
    print(f"{'model':<10} {'batch':>5}  {'pass':<8} {'ours ms':>9} {'torch ms':>9} {'ratio':>6}", flush=True)
    ratios = {name: compare(name, options.batch, options.repeats) for name in options.models}
    print()
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
