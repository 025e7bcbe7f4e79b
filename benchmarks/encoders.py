"""Times the encoders against the same models of transformers in PyTorch, on the same CPU cores with the same weights.

    python benchmarks/encoders.py [--models=vit_s16,resnet50,bert_base] [--repeats=7] [--batch=8]

Needs torch and transformers. Prints a table; the last line is a JSON object of PyTorch's time over ours: more than 1
means that ours is faster. "forward" computes the hidden states and the pooled output; "train" computes the gradient of
their mean squares with respect to all parameters, without dropout. Everything is float32.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from mefn_jax.encoders.pretrained import weights

# Name: (class and options of the configuration, class of the model, our kind of tower, items in a batch).
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
TOLERANCE = 1e-4  # relative to the largest value: difference of float32 sums in another order
WARM_UP = 2
VOCABULARY = 30522  # BERT's


def make_pixels(batch: int) -> np.ndarray:
    """Returns normalized pixels `(B, H, W, 3)`."""
    return np.random.default_rng(0).normal(size=(batch, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def make_texts(batch: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask `(B, L)` of texts that have half to all of the length. The padding keeps either side from
    skipping the mask."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(TEXT_LENGTH // 2, TEXT_LENGTH + 1, (batch, 1))
    mask = np.arange(TEXT_LENGTH) < lengths
    return (rng.integers(1, vocabulary, (batch, TEXT_LENGTH)) * mask).astype(np.int32), mask


def make_inputs(name: str, batch: int) -> tuple:
    """Returns the inputs of a model, the same for both sides."""
    return (make_pixels(batch),) if MODELS[name][2] == "image" else make_texts(batch, VOCABULARY)


def save_torch(name: str, directory: str) -> None:
    """Saves a model of transformers with random weights as a checkpoint."""
    import torch
    import transformers

    (config, options), model, _, _ = MODELS[name]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(directory)


def load_torch(name: str, directory: str):
    """Loads the model in eval mode. Attention is fused where the model has a fused one."""
    import transformers

    return getattr(transformers, MODELS[name][1]).from_pretrained(directory).eval()


def make_torch_passes(name: str, model, inputs: tuple) -> dict[str, Callable]:
    """Returns PyTorch's passes: functions `forward() -> (states, pooled)` and `train() -> gradients`."""
    import torch

    if len(inputs) == 1:
        arguments = {"pixel_values": torch.from_numpy(inputs[0].transpose(0, 3, 1, 2).copy())}
    else:
        arguments = {
            "input_ids": torch.from_numpy(inputs[0]).long(),
            "attention_mask": torch.from_numpy(inputs[1]).long(),
        }
    parameters = list(model.parameters())

    def compute_outputs():
        result = model(**arguments)
        states = result.last_hidden_state
        # Our ViT returns its class token only as the pooled output.
        return states[:, 1:] if name.startswith("vit") else states, result.pooler_output

    def forward():
        with torch.inference_mode():
            return compute_outputs()

    def train():
        states, pooled = compute_outputs()
        return torch.autograd.grad(states.square().mean() + pooled.square().mean(), parameters)

    return {"forward": forward, "train": train}


def make_jax_passes(tower: weights.Tower, inputs: tuple) -> dict[str, Callable]:
    """Returns our passes, as `make_torch_passes` does. As in training, parameters and inputs are arguments of the
    compiled functions, so that XLA folds nothing into constants."""
    params, *arguments = jax.device_put((tower.params, tower.constants, *inputs))

    def compute_outputs(params, constants, *arguments):
        states, pooled = tower.module.apply({"params": params, "constants": constants}, *arguments)
        return states[-1] if isinstance(states, list) else states, pooled  # the last grid of an image tower

    def compute_loss(params, *arguments):
        states, pooled = compute_outputs(params, *arguments)
        return jnp.square(states).mean() + jnp.square(pooled).mean()

    forward, gradient = jax.jit(compute_outputs), jax.jit(jax.grad(compute_loss))
    return {
        "forward": lambda: jax.block_until_ready(forward(params, *arguments)),
        "train": lambda: jax.block_until_ready(gradient(params, *arguments)),
    }


def run_worker(side: str, name: str, batch: int, directory: str, connection) -> None:
    """Runs one side in a process of its own, so that the threads of the two sides do not compete. Answers "outputs"
    with NumPy arrays, "forward" and "train" with the milliseconds of one pass."""
    kind = MODELS[name][2]
    if side == "ours":
        jax.config.update("jax_platforms", "cpu")
        tower = weights.load_tower(directory, kind)
        passes = make_jax_passes(tower, make_inputs(name, batch))
    else:
        passes = make_torch_passes(name, load_torch(name, directory), make_inputs(name, batch))
    for request in iter(connection.recv, None):
        if request == "outputs":
            norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(passes["train"]())))
            connection.send(([np.asarray(x) for x in passes["forward"]()], norm))
        else:
            start = time.perf_counter()
            passes[request]()
            connection.send(1e3 * (time.perf_counter() - start))


def check_equal(name: str, ours: tuple, theirs: tuple) -> None:
    """Raises AssertionError unless both sides compute the same outputs, and gradients of the same norm."""
    for output, our_value, their_value in zip(("states", "pooled"), ours[0], theirs[0], strict=True):
        if their_value.ndim == 4:  # a ResNet's grid or its mean, with channels first
            their_value = their_value.transpose(0, 2, 3, 1)
        their_value = their_value.reshape(our_value.shape)  # of a ViT, ours is a grid and theirs a sequence
        error = np.abs(our_value - their_value).max() / np.abs(their_value).max()
        assert error <= TOLERANCE, f"{name}: {output} differ by {error:.1e}"
    our_value, their_value = ours[1], theirs[1]
    assert abs(our_value - their_value) <= 10 * TOLERANCE * their_value, (
        f"{name}: norm of the gradient {our_value:.6g}, theirs {their_value:.6g}"
    )


def compare_model(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Prints a model's rows of the table. Returns PyTorch's time over ours for each pass, from the medians of
    alternating runs, so that other work on the machine affects both sides alike."""
    batch = batch or MODELS[name][3]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        save_torch(name, directory)
        workers = {}
        for side in ("ours", "theirs"):
            connection, worker_end = context.Pipe()
            process = context.Process(target=run_worker, args=(side, name, batch, directory, worker_end), daemon=True)
            process.start()
            workers[side] = connection, process

        def ask(side: str, request: str):
            workers[side][0].send(request)
            return workers[side][0].recv()

        check_equal(name, ask("ours", "outputs"), ask("theirs", "outputs"))
        ratios = {}
        for pass_name in ("forward", "train"):
            runs = [[ask(side, pass_name) for side in workers] for _ in range(WARM_UP + repeats)][WARM_UP:]
            our_time, their_time = (statistics.median(times) for times in zip(*runs, strict=True))
            ratios[pass_name] = round(their_time / our_time, 2)
            print(
                f"{name:<10} {batch:>5}  {pass_name:<8} {our_time:>9.1f} {their_time:>9.1f} "
                f"{their_time / our_time:>6.2f}",
                flush=True,
            )
        for connection, process in workers.values():
            connection.send(None)
            process.join()
    return ratios


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/encoders.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=list(MODELS),
        metavar="NAME,...",
        help=f"models to time (default: {','.join(MODELS)})",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed runs of each pass, after the warm-up (default: 7)"
    )
    parser.add_argument("--batch", type=int, default=0, help="items in a batch (default: 8 images, 16 texts)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"--models: {', '.join(unknown)} is not one of {', '.join(MODELS)}")
    if options.repeats < 1 or options.batch < 0:
        parser.error("--repeats must be 1 or more, and --batch not negative")
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse_options()
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
    ratios = {name: compare_model(name, options.batch, options.repeats) for name in options.models}
    print()
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
