"""What a train step needs on TPU slices of many sizes, compiled for them without one (libtpu; a quarter of an hour).

    python benchmarks/pod.py [--only=scaling,large]

ViT-B/16 and BERT-base, 224 px, 32 words, bfloat16, model=mefn. *scaling*: 64 pairs a chip on 8, 64 and 256 v5e
chips (16,384 pairs). *large*: 65,536 pairs on v5e-256, and ViT-L/14 with BERT-large. The score's own temporaries are
those of the loss and its gradients by the features, compiled alone. Last line: JSON, one object a row.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import jax

from mefn_jax.model import dummy_inputs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout need not be installed

from configs import flickr30k
from mefn_jax import aot, losses
from mefn_jax.model import batch_shapes, build_model
from mefn_jax.runtime.sharding import abstract_params, batch_sharding, make_mesh
from mefn_jax.scoring.ring import ring_scores

LARGE = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096}
SLICES = ("2x4", "8x8", "16x16")


def config_of(batch, remat="none", large=False, **mesh):
    c = flickr30k.get_config("image=vit_b16")
    with c.unlocked():
        c.image.size, c.text.max_tokens = 224, 30  # and [CLS], [SEP]
        c.train.update(batch_size=batch, dtype="bfloat16", remat=remat)
        c.mesh.update(mesh)
        if large:
            c.image.vit.update(LARGE | {"patch": 14})
            c.text.bert.update(LARGE)
    return c


def of_scores(config, target) -> int:
    """Bytes a chip of temporaries that the loss and its gradients by the features need."""
    mesh = make_mesh(config.mesh, aot.topology_devices(target))
    model = build_model(config, aot.DEFAULT_VOCABULARY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *dummy_inputs(config))
    params, batch = abstract_params(mesh, shapes), batch_shapes(config)
    rows = batch_sharding(mesh)
    images = aot.with_batch_sharding(jax.eval_shape(model.encode_images, params, batch["images"]), rows)
    texts = aot.with_batch_sharding(jax.eval_shape(model.encode_texts, params, batch["text"], batch["text_mask"]), rows)
    loss = losses.make_loss(config.loss)(0)

    def value(matcher, of_images, of_texts, images, texts, owner):
        images = images.replace(fragments=of_images[0], pooled=of_images[1])
        texts = texts.replace(fragments=of_texts[0], pooled=of_texts[1])
        scores = ring_scores(model.score, {"matcher": matcher}, images, texts, mesh, config.train.score_tile_mib)
        return loss(scores, losses.positives_mask(owner), None, None)

    both = [(x.fragments, x.pooled) for x in (images, texts)]
    owner = aot.with_batch_sharding(batch["image_index"], rows)
    lowered = jax.jit(jax.grad(value, (0, 1, 2))).lower(params["matcher"], *both, images, texts, owner)
    return aot.compile_lowered(lowered).memory_analysis().temp_size_in_bytes


def row(name, target, config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        aot.compile_train(config, target, str(path))
        facts = json.loads(path.read_text())
    pairs, chips = config.train.batch_size, facts["chips"]
    scores = of_scores(config, target)
    return {
        "case": name,
        "topology": target,
        "pairs": pairs,
        "total_gib": facts["bytes_per_chip"]["total"] / 2**30,
        "score_rows_gib": pairs * pairs // chips * 4 / 2**30,
        "score_temporaries_gib": scores / 2**30,
        "tflops_a_chip": facts["flops_per_step"] / chips / 1e12,
        "score_share": facts["flops"]["scores"] / facts["flops_per_step"],
        "sent_gb": sum(c["bytes"] for c in facts["collectives"]) / 1e9,
        "gathered_gb": sum(c["bytes"] for c in facts["collectives"] if c["kind"] == "all-gather") / 1e9,
        "least_ms": 1e3 * facts["lower_bound_s"]["arithmetic"],
        "fits": facts["fits"],
        "compile_s": facts["compile_s"],
    }


def cases(only):
    if "scaling" in only:
        for size in SLICES:
            chips = math.prod(map(int, size.split("x")))
            yield f"64 a chip, {chips} chips", f"v5e:{size}", config_of(64 * chips)
    if "large" in only:
        yield "base, 65,536, remat", "v5e:16x16", config_of(65536, remat="blocks")
        yield "large, 16,384, fsdp 8, remat", "v5e:16x16", config_of(16384, "blocks", True, data=-1, fsdp=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="scaling,large", help="which tables")
    rows = [row(*case) for case in cases(parser.parse_args().only.split(","))]
    print()
    titles = (("GiB a chip", 11), ("rows", 6), ("score temp.", 11), ("TFLOP a chip", 13), ("scores", 7), ("sent GB", 8))
    titles += (("gathered", 9), ("at least ms", 11), ("compiled s", 10))
    print(f"{'case':30} " + " ".join(f"{title:>{width}}" for title, width in titles))
    for r in rows:
        print(
            f"{r['case']:30} {r['total_gib']:11.2f} {r['score_rows_gib']:6.3f} {r['score_temporaries_gib']:11.3f} "
            f"{r['tflops_a_chip']:13.2f} {r['score_share']:7.1%} {r['sent_gb']:8.2f} "
            f"{r['gathered_gb']:9.4f} {r['least_ms']:11.1f} {r['compile_s']:10.0f}"
            + ("" if r["fits"] else " does not fit")
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
