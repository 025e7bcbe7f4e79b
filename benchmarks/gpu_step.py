"""Times the train step on one accelerator, and the same step in PyTorch.

    python benchmarks/gpu_step.py [--batch=1024] [--steps=10] [--models=clip,mefn] [--tiny]

ViT-B/16 and BERT-base, 224 px, 32 tokens, bfloat16, without dropout; the data is on the device already. Ours: the real
`compile_step` of every model, or of --models, all with InfoNCE. PyTorch (needs torch and transformers): the same
towers and InfoNCE with torch.compile, autocast and fused attention, AdamW. Each step runs in a process of its own.
"scores" is the share of scoring and loss in the step, forward and backward. MFU counts the arithmetic of both in the
same way (`mefn_jax/runtime/flops.py`). Without torch, its row is left out; --tiny checks on a CPU that the script runs.
The last line is JSON, one object for each row; what is unknown for a device is null.
"""

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from configs import flickr30k
from mefn_jax import losses, optim
from mefn_jax.encoders.inputs import batch_shapes
from mefn_jax.matching.systems import MODELS
from mefn_jax.model import build_model, split_constants
from mefn_jax.runtime import flops
from mefn_jax.runtime.chips import chip_of
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, make_mesh
from mefn_jax.scoring.chunks import make_block_scorer
from mefn_jax.scoring.ring import ring_scores
from mefn_jax.training import state, step
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.setup import make_init

VOCABULARY = 30522
TINY = {"width": 64, "layers": 1, "heads": 4, "mlp_width": 128}
WARM_UP = 3
MILLISECONDS = 1e3  # per second


def make_config(name: str, batch: int, tiny: bool):
    """Returns the configuration of the benchmark for the model `name`."""
    config = flickr30k.get_config(f"model={name},image=vit_b16")
    with config.unlocked():
        config.image.size, config.text.max_tokens = (32 if tiny else 224), 30  # 32 with [CLS] and [SEP]
        config.image.region_grids = (2,) if tiny else (7, 4, 2)
        config.loss.name = "info_nce"
        config.text.bert.dropout = 0.0
        config.train.update(batch_size=batch, dtype="bfloat16", lr_multipliers=())
        if tiny:
            config.image.vit.update(TINY)
            config.text.bert.update(TINY)
            config.embed_dim = 32
    return config


def make_batch(config) -> dict:
    """Returns a batch of random values; all texts have full length."""
    rng, batch = np.random.default_rng(0), {}
    for name, x in batch_shapes(config).items():
        high = {"images": 256, "text": VOCABULARY, "text_mask": 2}.get(name, config.train.batch_size)
        batch[name] = rng.integers(1 if name == "text_mask" else 0, high, x.shape).astype(x.dtype)
    return batch | {"image_index": np.arange(config.train.batch_size, dtype=np.int32)}


def mean_milliseconds(run, number: int) -> float:
    """Returns the mean duration of `run()`, which returns when the device is done, in milliseconds."""
    for _ in range(WARM_UP):
        run()
    start = time.perf_counter()
    for _ in range(number):
        run()
    return MILLISECONDS * (time.perf_counter() - start) / number


def time_jax_step(name: str, batch: int, steps: int, tiny: bool) -> dict:
    """Returns the timings, memory and FLOPs of our step."""
    config = make_config(name, batch, tiny)
    mesh = make_mesh(None, jax.devices()[:1])
    model = build_model(config, VOCABULARY)
    init, hyper = make_init(model, config, mesh), hyperparameters_from_config(config, steps=1000)
    lr_multipliers = optim.lr_multipliers(split_constants(jax.eval_shape(init, hyper.seed))[0], (), 1.0)
    step_config = step.make_step_config(config, model, lr_multipliers)
    train_state = state.create_state(init, hyper.seed, step_config.make_optimizer(hyper), lr_multipliers, mesh)
    train_step = step.compile_step(mesh, train_state, step_config)
    batch_arrays = from_full_copy(batch_sharding(mesh), make_batch(config))

    def run_once():
        nonlocal train_state
        train_state, metrics = train_step(train_state, batch_arrays, hyper)
        jax.block_until_ready(metrics)

    milliseconds = mean_milliseconds(run_once, steps)
    device = mesh.devices.flat[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    flops_by_part = flops.step_flops(step_config, mesh, train_state.variables, batch_shapes(config))
    scores = time_scores(model, train_state.variables, batch_arrays, config, mesh, steps)
    return {
        "milliseconds": milliseconds,
        "bytes": memory,
        "scores": scores / milliseconds,
        "flops": sum(flops_by_part.values()),
    }


def time_scores(model, params, batch_arrays, config, mesh, steps: int) -> float:
    """Returns the milliseconds of the scores, the loss, and its gradients with respect to features and parameters."""
    images = jax.jit(model.encode_images)(params, batch_arrays["images"])
    texts = jax.jit(model.encode_texts)(params, batch_arrays["text"], batch_arrays["text_mask"])
    loss, hyper = losses.make_loss(config.loss), hyperparameters_from_config(config, steps=1000)
    score_params = {"matcher": params["matcher"], "loss": params["loss"]}
    score = make_block_scorer(model, config.train.score_chunk_mib, config.train.score_tile_mib)

    def loss_from_features(score_params, image_arrays, text_arrays):
        image_features = images.replace(fragments=image_arrays[0], pooled=image_arrays[1])
        text_features = texts.replace(fragments=text_arrays[0], pooled=text_arrays[1])
        scores = ring_scores(score, score_params, image_features, text_features, mesh)
        return loss(score_params["loss"], scores, losses.positives_mask(batch_arrays["image_index"]), hyper, 0)

    gradient = jax.jit(jax.grad(loss_from_features, (0, 1, 2)))
    feature_arrays = [(x.fragments, x.pooled) for x in (images, texts)]
    return mean_milliseconds(lambda: jax.block_until_ready(gradient(score_params, *feature_arrays)), steps)


def time_torch_step(batch: int, steps: int, tiny: bool) -> dict:
    """Returns the timings and memory of PyTorch's step."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = make_config("clip", batch, tiny)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    def sizes(tower):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return dict(zip(names, (tower.width, tower.layers, tower.heads, tower.mlp_width), strict=True)) | {
            "attn_implementation": "sdpa"
        }

    vit, bert = config.image.vit, config.text.bert
    image = transformers.ViTModel(
        transformers.ViTConfig(image_size=config.image.size, patch_size=vit.patch, **sizes(vit)),
        add_pooling_layer=False,
    )
    text = transformers.BertModel(
        transformers.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes(bert)),
        add_pooling_layer=False,
    )

    class DualEncoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = image, text
            self.image_projection = torch.nn.Linear(vit.width, config.embed_dim)
            self.text_projection = torch.nn.Linear(bert.width, config.embed_dim)
            self.scale = torch.nn.Parameter(torch.tensor(2.66))

        def forward(self, pixels, ids, mask):
            v = self.image_projection(self.image(pixel_values=pixels).last_hidden_state[:, 0])
            t = self.text_projection(self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
            v, t = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (v, t))
            scores = self.scale.exp() * v @ t.T
            target = torch.arange(len(v), device=v.device)
            losses_of_directions = (torch.nn.functional.cross_entropy(s, target) for s in (scores, scores.T))
            return sum(losses_of_directions) / 2

    model = DualEncoder().to(device).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    batch_arrays = make_batch(config)
    pixels_uint8 = torch.from_numpy(batch_arrays["images"]).to(device).permute(0, 3, 1, 2).contiguous()
    ids, mask = (torch.from_numpy(batch_arrays[name]).long().to(device) for name in ("text", "text_mask"))

    def run_once():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(pixels_uint8.float() / 127.5 - 1, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    milliseconds = mean_milliseconds(run_once, steps)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"milliseconds": milliseconds, "bytes": memory, "scores": None, "flops": None}


def run_in_process(function, *args):
    """Returns `function(*args)`, computed in a process of its own, which has all of the device's memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak_flops() -> float | None:
    """Returns the device's peak FLOP/s; None if `mefn_jax/runtime/chips.py` does not list it."""
    chip = chip_of(jax.devices()[0])
    return chip and chip.flops


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024, help="pairs a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after the warm-up")
    parser.add_argument("--models", default=",".join(MODELS), help="models to time, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="use towers of one narrow layer")
    options = parser.parse_args()
    rows = {
        f"ours, {name}": run_in_process(time_jax_step, name, options.batch, options.steps, options.tiny)
        for name in options.models.split(",")
    }
    if importlib.util.find_spec("torch"):
        rows["PyTorch, clip"] = run_in_process(time_torch_step, options.batch, options.steps, options.tiny)
        rows["PyTorch, clip"]["flops"] = rows.get("ours, clip", {"flops": None})["flops"]
    else:
        print("torch is not installed: PyTorch's step is left out")
    peak = run_in_process(peak_flops)
    print(f"{'':22} {'ms a step':>10} {'pairs/s':>8} {'MFU':>6} {'GiB':>6} {'scores':>7}")
    for name, row in rows.items():
        row["pairs_per_s"] = options.batch / row["milliseconds"] * MILLISECONDS
        row["mfu"] = peak and row["flops"] and row["flops"] / row["milliseconds"] * MILLISECONDS / peak
        columns = [f"{row['milliseconds']:10.1f} {row['pairs_per_s']:8.0f}"]
        columns += [
            f"{'?' if share is None else format(share, '.1%'):>{width}}"
            for share, width in ((row["mfu"], 6), (row["scores"], 7))
        ]
        gib = "?" if row["bytes"] is None else f"{row['bytes'] / 2**30:.1f}"
        print(f"{name:22} {columns[0]} {columns[1]} {gib:>6} {columns[2]}")
    print(json.dumps([{"step": name, "batch": options.batch} | row for name, row in rows.items()]))


if __name__ == "__main__":
    main()
