"""Compiles the train step for TPU slices of many sizes on a machine without TPUs, and reports its memory and traffic
(needs libtpu; takes a quarter of an hour).

    python benchmarks/pod.py [--only=scaling,large,systems]

ViT-B/16 and BERT-base, 224 px, 32 words, bfloat16, model=mefn. *scaling*: 64 pairs per chip on 8, 64 and 256 v5e chips
(16,384 pairs). *large*: 65,536 pairs on v5e-256, and ViT-L/14 with BERT-large. *systems*: other systems, 16,384 rows on
v5e-256; a system's name is one of them. The temporaries of the scores are those
of a program that computes only the loss and its gradients with respect to the features. The last line is JSON, one
object for each row.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from configs import flickr30k
from mefn_jax import aot
from mefn_jax.encoders.inputs import batch_shapes, dummy_inputs
from mefn_jax.model import build_model, split_constants
from mefn_jax.runtime.sharding import abstract_params, batch_sharding, make_mesh
from mefn_jax.training import step
from mefn_jax.training.hyperparameters import hyperparameters_from_config
from mefn_jax.training.loss_inputs import EncodedBatch

LARGE = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096}
SLICES = ("2x4", "8x8", "16x16")
SYSTEMS = ("visita", "sfe", "esa", "mate")


def make_config(batch, remat="none", large=False, model="mefn", **mesh):
    """Returns the configuration of a case."""
    config = flickr30k.get_config(f"image=vit_b16,model={model}")
    with config.unlocked():
        config.image.size, config.text.max_tokens = 224, 30  # 32 with [CLS] and [SEP]
        config.train.update(batch_size=batch, dtype="bfloat16", remat=remat)
        config.mesh.update(mesh)
        if large:
            config.image.vit.update(LARGE | {"patch": 14})
            config.text.bert.update(LARGE)
    return config


def score_temporaries(config, target) -> int:
    """Returns the bytes of temporaries per chip for the loss and its gradients with respect to the features."""
    mesh = make_mesh(config.mesh, aot.topology_devices(target))
    model = build_model(config, aot.DEFAULT_VOCABULARY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
    params, batch = abstract_params(mesh, shapes), batch_shapes(config)
    row_sharding = batch_sharding(mesh)
    images = aot.with_batch_sharding(jax.eval_shape(model.encode_images, params, batch["images"]), row_sharding)
    texts = aot.with_batch_sharding(
        jax.eval_shape(model.encode_texts, params, batch["text"], batch["text_mask"]), row_sharding
    )
    step_config, hyper = step.make_step_config(config, model, None), hyperparameters_from_config(config, steps=1000)

    def loss_from_features(params, image_arrays, text_arrays, constants, images, texts, rows, teacher_scores):
        images = images.replace(fragments=image_arrays[0], pooled=image_arrays[1])
        texts = texts.replace(fragments=text_arrays[0], pooled=text_arrays[1])
        encoded = EncodedBatch(model, params | {"constants": constants}, images, texts, rows, teacher_scores)
        return step.loss_from_features(encoded, hyper, 0, step_config=step_config, mesh=mesh)

    params, constants = split_constants(params)
    params = {name: params[name] for name in ("matcher", "hubness", "loss")}
    feature_arrays = [(x.fragments, x.pooled) for x in (images, texts)]
    rows = {name: batch[name] for name in ("image_index", "caption_index", "epoch", "view")}
    pairs = config.train.batch_size
    teacher_scores = jax.ShapeDtypeStruct((pairs, pairs), jnp.float32)
    rows, teacher_scores = aot.with_batch_sharding((rows, teacher_scores), row_sharding)
    lowered = jax.jit(jax.grad(loss_from_features, (0, 1, 2))).lower(
        params, *feature_arrays, constants, images, texts, rows, teacher_scores
    )
    return aot.compile_lowered(lowered).memory_analysis().temp_size_in_bytes


def measure_case(name, target, config) -> dict:
    """Compiles a case and returns its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        aot.compile_train(config, target, str(path))
        report = json.loads(path.read_text())
    pairs, chips = config.train.batch_size, report["chips"]
    temporaries = score_temporaries(config, target)
    return {
        "case": name,
        "topology": target,
        "pairs": pairs,
        "total_gib": report["bytes_per_chip"]["total"] / 2**30,
        "score_rows_gib": pairs * pairs // chips * 4 / 2**30,
        "score_temporaries_gib": temporaries / 2**30,
        "tflops_a_chip": report["flops_per_step"] / chips / 1e12,
        "score_share": report["flops"]["scores"] / report["flops_per_step"],
        "sent_gb": sum(collective["bytes"] for collective in report["collectives"]) / 1e9,
        "gathered_gb": sum(c["bytes"] for c in report["collectives"] if c["kind"] == "all-gather") / 1e9,
        "least_ms": 1e3 * report["lower_bound_s"]["arithmetic"],
        "fits": report["fits"],
        "compile_s": report["compile_s"],
    }


def list_cases(only):
    """Yields the cases: name, target, configuration."""
    if "scaling" in only:
        for size in SLICES:
            chips = math.prod(map(int, size.split("x")))
            yield f"64 a chip, {chips} chips", f"v5e:{size}", make_config(64 * chips)
    if "large" in only:
        yield "base, 65,536, remat", "v5e:16x16", make_config(65536, remat="blocks")
        yield "large, 16,384, fsdp 8, remat", "v5e:16x16", make_config(16384, "blocks", True, data=-1, fsdp=8)
    for model in SYSTEMS:
        if "systems" in only or model in only:
            yield f"{model}, 16,384", "v5e:16x16", make_config(16384, model=model)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="scaling,large", help="cases to compile, separated by commas")
    rows = [measure_case(*case) for case in list_cases(parser.parse_args().only.split(","))]
    print()
    titles = (("GiB a chip", 11), ("rows", 6), ("score temp.", 11), ("TFLOP a chip", 13), ("scores", 7), ("sent GB", 8))
    titles += (("gathered", 9), ("at least ms", 11), ("compiled s", 10))
    print(f"{'case':30} " + " ".join(f"{title:>{width}}" for title, width in titles))
    for row in rows:
        print(
            f"{row['case']:30} {row['total_gib']:11.2f} {row['score_rows_gib']:6.3f} "
            f"{row['score_temporaries_gib']:11.3f} {row['tflops_a_chip']:13.2f} {row['score_share']:7.1%} "
            f"{row['sent_gb']:8.2f} {row['gathered_gb']:9.4f} {row['least_ms']:11.1f} {row['compile_s']:10.0f}"
            + ("" if row["fits"] else " does not fit")
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
