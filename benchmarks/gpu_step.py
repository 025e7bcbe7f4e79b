"""Times the train step on one accelerator, beside the same step in PyTorch.

    python benchmarks/gpu_step.py [--batch=1024] [--steps=10] [--tiny]

ViT-B/16 and BERT-base, 224 px, 32 tokens, bfloat16, without dropout, data that lie on the device already. Ours: the
real `compile_step` with model=clip and model=mefn, both with InfoNCE. PyTorch's (needs torch and transformers): the
same towers and InfoNCE with torch.compile, autocast and fused attention, AdamW. Each runs in a process of its own.
"scores" is what scoring and the loss take, forwards and backwards. MFU counts both sides' arithmetic alike
(`mefn_jax/flops.py`). Without torch its row is left out; --tiny is to see that it runs, on a CPU. Last line: JSON, one
object a row; what is not known of a device is null.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import sys
import time
from pathlib import Path

import jax
import numpy as np

from mefn_jax.model import dummy_inputs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from configs import flickr30k
from mefn_jax import losses, optim
from mefn_jax.model import batch_shapes, build_model
from mefn_jax.runtime import flops
from mefn_jax.runtime.chips import chip_of
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, make_mesh
from mefn_jax.scoring.ring import ring_scores
from mefn_jax.training import state, step

VOCABULARY = 30522
TINY = {"width": 64, "layers": 1, "heads": 4, "mlp_width": 128}
WARM_UP = 3
EACH = 1e3  # seconds to milliseconds


def config_of(name: str, batch: int, tiny: bool):
    c = flickr30k.get_config(f"model={name},image=vit_b16")
    with c.unlocked():
        c.image.size, c.text.max_tokens = (32 if tiny else 224), 30  # and [CLS], [SEP]
        c.image.region_grids = (2,) if tiny else (7, 4, 2)
        c.loss.name = "info_nce"
        c.text.bert.dropout = 0.0
        c.train.update(batch_size=batch, dtype="bfloat16", lr_multipliers=())
        if tiny:
            c.image.vit.update(TINY)
            c.text.bert.update(TINY)
            c.embed_dim = 32
    return c


def batch_of(config) -> dict:
    """Random values of a batch's shapes; all texts are of full length."""
    rng, batch = np.random.default_rng(0), {}
    for name, x in batch_shapes(config).items():
        high = {"images": 256, "text": VOCABULARY, "text_mask": 2}.get(name, config.train.batch_size)
        batch[name] = rng.integers(1 if name == "text_mask" else 0, high, x.shape).astype(x.dtype)
    return batch | {"image_index": np.arange(config.train.batch_size, dtype=np.int32)}


def timed(run, number: int) -> float:
    """Milliseconds of one `run()`, which returns when the device is done."""
    for _ in range(WARM_UP):
        run()
    start = time.perf_counter()
    for _ in range(number):
        run()
    return EACH * (time.perf_counter() - start) / number


def ours(name: str, batch: int, steps: int, tiny: bool) -> dict:
    """Our step."""
    config = config_of(name, batch, tiny)
    mesh = make_mesh(None, jax.devices()[:1])
    model = build_model(config, VOCABULARY)
    init = functools.partial(model.init, jax.random.key(0), *dummy_inputs(config))
    factors = optim.lr_multipliers(jax.eval_shape(init), (), 1.0)
    optimizer = optim.adamw(lambda step: 1e-5, config.train.weight_decay, config.train.clip_norm, factors)
    current = state.create_state(init, optimizer, factors, mesh)
    recipe = step.make_step_config(config, model, optimizer, factors)
    run, given = step.compile_step(mesh, current, recipe), from_full_copy(batch_sharding(mesh), batch_of(config))

    def one():
        nonlocal current
        current, metrics = run(current, given)
        jax.block_until_ready(metrics)

    milliseconds = timed(one, steps)
    device = mesh.devices.flat[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    work = flops.step_flops(recipe, mesh, current.params, batch_shapes(config))
    scores = of_scores(model, current.params, given, config, mesh, steps)
    return {"milliseconds": milliseconds, "bytes": memory, "scores": scores / milliseconds, "flops": sum(work.values())}


def of_scores(model, params, given, config, mesh, steps: int) -> float:
    """Milliseconds of the scores, the loss and its gradients by features and parameters."""
    images = jax.jit(model.encode_images)(params, given["images"])
    texts = jax.jit(model.encode_texts)(params, given["text"], given["text_mask"])
    loss = losses.make_loss(config.loss)(0)
    scored = {"matcher": params["matcher"], "loss": params["loss"]}

    def value(scored, of_images, of_texts):
        with_them = images.replace(fragments=of_images[0], pooled=of_images[1])
        and_texts = texts.replace(fragments=of_texts[0], pooled=of_texts[1])
        scores = ring_scores(model.score, scored, with_them, and_texts, mesh, config.train.score_tile_mib)
        return loss(scores, losses.positives_mask(given["image_index"]), scored["loss"].get("scale"), None)

    run = jax.jit(jax.grad(value, (0, 1, 2)))
    both = [(x.fragments, x.pooled) for x in (images, texts)]
    return timed(lambda: jax.block_until_ready(run(scored, *both)), steps)


def theirs(batch: int, steps: int, tiny: bool) -> dict:
    """PyTorch's step."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of("clip", batch, tiny)
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

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = image, text
            self.of_image = torch.nn.Linear(vit.width, config.embed_dim)
            self.of_text = torch.nn.Linear(bert.width, config.embed_dim)
            self.scale = torch.nn.Parameter(torch.tensor(2.66))

        def forward(self, pixels, ids, mask):
            v = self.of_image(self.image(pixel_values=pixels).last_hidden_state[:, 0])
            t = self.of_text(self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
            v, t = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (v, t))
            scores = self.scale.exp() * v @ t.T
            target = torch.arange(len(v), device=v.device)
            both = (torch.nn.functional.cross_entropy(s, target) for s in (scores, scores.T))
            return sum(both) / 2

    model = Both().to(device).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    given = batch_of(config)
    raw = torch.from_numpy(given["images"]).to(device).permute(0, 3, 1, 2).contiguous()
    ids, mask = (torch.from_numpy(given[name]).long().to(device) for name in ("text", "text_mask"))

    def one():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(raw.float() / 127.5 - 1, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    milliseconds = timed(one, steps)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"milliseconds": milliseconds, "bytes": memory, "scores": None, "flops": None}


def alone(function, *args):
    """What `function(*args)` returns, computed in a process of its own, which has the device's memory for itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak() -> float | None:
    """The device's FLOP/s; None if `mefn_jax/chips.py` does not know it."""
    chip = chip_of(jax.devices()[0])
    return chip and chip.flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024, help="pairs a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after warm-up")
    parser.add_argument("--tiny", action="store_true", help="towers of one narrow layer")
    o = parser.parse_args()
    rows = {f"ours, {name}": alone(ours, name, o.batch, o.steps, o.tiny) for name in ("clip", "mefn")}
    if importlib.util.find_spec("torch"):
        rows["PyTorch, clip"] = alone(theirs, o.batch, o.steps, o.tiny)
        rows["PyTorch, clip"]["flops"] = rows["ours, clip"]["flops"]
    else:
        print("torch is not installed: nothing to compare with")
    known = alone(peak)
    print(f"{'':14} {'ms a step':>10} {'pairs/s':>8} {'MFU':>6} {'GiB':>6} {'scores':>7}")
    for name, row in rows.items():
        row["pairs_per_s"] = o.batch / row["milliseconds"] * EACH
        row["mfu"] = known and row["flops"] / row["milliseconds"] * EACH / known
        shown = [f"{row['milliseconds']:10.1f} {row['pairs_per_s']:8.0f}"]
        shown += [f"{'?' if x is None else format(x, '.1%'):>{w}}" for x, w in ((row["mfu"], 6), (row["scores"], 7))]
        gib = "?" if row["bytes"] is None else f"{row['bytes'] / 2**30:.1f}"
        print(f"{name:14} {shown[0]} {shown[1]} {gib:>6} {shown[2]}")
    print(json.dumps([{"step": name, "batch": o.batch} | row for name, row in rows.items()]))


if __name__ == "__main__":
    main()
