"""PyTorch's towers with random weights and their outputs: the reference of `encoders/pretrained/test_huggingface.py`.

    python tests/reference_towers.py [NAME ...]     # needs torch and transformers; writes tests/fixtures/<name>/

Each directory is a checkpoint as `save_pretrained` writes it, and `expected.npz` with inputs, every layer's hidden
states and the pooled output.
"""

import json
import sys
from pathlib import Path

import numpy as np

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 12}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
CLIP_IDS = {"bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 0}
TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
TINY_TEXT = TINY | {"vocab_size": 30, "max_position_embeddings": 12}
TINY_IMAGE = TINY | {"image_size": 8, "patch_size": 4}
SIGLIP_TEXT = TINY_TEXT | {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
SIGLIP = {"text_config": SIGLIP_TEXT | {"num_hidden_layers": 1}, "vision_config": TINY_IMAGE | {"num_hidden_layers": 1}}
ROBERTA = TINY_TEXT | {"layer_norm_eps": 1e-5}
DINO = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
DINO_3 = TINY_IMAGE | {"hidden_size": 16}
DISTILBERT = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "vocab_size": 30, "max_position_embeddings": 12}
OPEN_CLIP = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "layers": 2, "width": 8, "head_width": 4, "patch_size": 4, "mlp_ratio": 1.5},
    "text_cfg": {"context_length": 12, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2},
}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}
TEXTS = ("bert", "clip_text", "siglip_text", "roberta", "xlm_roberta", "distilbert", "mpnet")
PAIRS = ("clip", "siglip", "open_clip")  # both towers, of which the embeddings are compared
PADS = dict.fromkeys(("roberta", "xlm_roberta", "mpnet", "siglip", "siglip_text"), 1)  # ids of the padding other than 0
# name: (architecture, options, height and width of the input if it has pixels)
TOWERS = {
    "bert": ("bert", TEXT, None),
    "bert_relu": ("bert", TEXT | {"hidden_act": "relu", "type_vocab_size": 1, "layer_norm_eps": 1e-5}, None),
    "bert_wide_heads": (
        "bert",
        TEXT | {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_act": "gelu_new"},
        None,
    ),
    "clip_text": ("clip_text", TEXT | CLIP_IDS, None),
    "clip_text_gelu": ("clip_text", TEXT | CLIP_IDS | {"hidden_act": "gelu", "num_attention_heads": 4}, None),
    "vit": ("vit", IMAGE, (16, 16)),
    "vit_not_square": ("vit", IMAGE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-6}, (24, 40)),
    "vit_no_bias": ("vit", IMAGE | {"qkv_bias": False, "patch_size": 4}, (12, 12)),
    "clip_vision": ("clip_vision", IMAGE, (16, 16)),
    "clip_vision_not_square": ("clip_vision", IMAGE | {"num_attention_heads": 4}, (16, 32)),
    "clip": ("clip", {"text_config": TEXT | CLIP_IDS, "vision_config": IMAGE, "projection_dim": 10}, (16, 16)),
    "siglip": ("siglip", SIGLIP, (8, 8)),
    "siglip_text": ("siglip_text", SIGLIP_TEXT | {"projection_size": 10}, None),
    "siglip_vision": ("siglip_vision", TINY_IMAGE, (8, 8)),
    "siglip_vision_not_square": ("siglip_vision", TINY_IMAGE | {"num_attention_heads": 4}, (12, 16)),
    "siglip_vision_no_head": ("siglip_vision", TINY_IMAGE | {"num_hidden_layers": 1, "vision_use_head": False}, (8, 8)),
    "dinov2": ("dinov2", DINO, (12, 12)),
    "dinov2_not_square": ("dinov2", DINO | {"num_hidden_layers": 1, "qkv_bias": False}, (8, 16)),
    "dinov2_swiglu": ("dinov2", DINO | {"use_swiglu_ffn": True, "mlp_ratio": 2}, (8, 8)),
    "dinov2_registers": ("dinov2_registers", DINO | {"num_register_tokens": 3}, (8, 8)),
    "dinov2_registers_large": ("dinov2_registers", DINO | {"num_hidden_layers": 1, "use_swiglu_ffn": True}, (16, 20)),
    "dinov3": ("dinov3", DINO_3 | {"num_register_tokens": 2}, (8, 12)),
    "dinov3_gated": (
        "dinov3",
        DINO_3 | {"num_hidden_layers": 1, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True},
        (8, 8),
    ),
    "roberta": ("roberta", ROBERTA | {"type_vocab_size": 1}, None),
    "xlm_roberta": ("xlm_roberta", ROBERTA | {"num_attention_heads": 4, "type_vocab_size": 1}, None),
    "distilbert": ("distilbert", DISTILBERT, None),
    "mpnet": ("mpnet", TINY_TEXT, None),
    "open_clip": ("open_clip", OPEN_CLIP, (8, 8)),
    "open_clip_quick": ("open_clip", OPEN_CLIP | {"quick_gelu": True, "custom_text": True}, (12, 16)),
    "resnet": ("resnet", RESNET, (32, 32)),
    "resnet_basic": ("resnet", RESNET | {"layer_type": "basic", "downsample_in_first_stage": True}, (40, 64)),
    "resnet_v1": ("resnet", RESNET | {"downsample_in_bottleneck": True}, (33, 47)),
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE_TEXT = BASE | {"vocab_size": 30522, "max_position_embeddings": 514}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
DINO_BASE = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"image_size": 518, "patch_size": 14}
# The same at the sizes of the hub's checkpoints, with random weights; not among the fixtures.
FULL_SIZE = {
    "siglip_base_vision": ("siglip_vision", BASE | {"image_size": 224, "patch_size": 16}, (224, 224)),
    "siglip_so400m_vision": ("siglip_vision", SO400M | {"image_size": 224, "patch_size": 14}, (224, 224)),
    "siglip2_base_text": (
        "siglip_text",
        BASE | {"vocab_size": 256000, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1},
        None,
    ),
    "dinov2_base": ("dinov2", DINO_BASE, (224, 224)),
    "dinov2_registers_base": ("dinov2_registers", DINO_BASE, (224, 224)),
    "dinov3_base": ("dinov3", BASE | {"num_register_tokens": 4}, (224, 224)),
    "xlm_roberta_base": ("xlm_roberta", BASE_TEXT | {"vocab_size": 250002, "type_vocab_size": 1}, None),
    "distilbert_base": ("distilbert", {"vocab_size": 30522}, None),
    "mpnet_base": ("mpnet", BASE_TEXT, None),
    "open_clip_b32": (
        "open_clip",
        {
            "embed_dim": 512,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        },
        (224, 224),
    ),
}


def write(name: str, directory: Path, seed: int = 0) -> None:
    """Writes one tower of `TOWERS` or `FULL_SIZE` and its outputs."""
    import torch
    import transformers as hf

    kind, options, size = (TOWERS | FULL_SIZE)[name]
    if kind == "open_clip":
        return write_open_clip(options, size, directory, seed)
    config, model = {
        "bert": (hf.BertConfig, hf.BertModel),
        "vit": (hf.ViTConfig, hf.ViTModel),
        "resnet": (hf.ResNetConfig, hf.ResNetModel),
        "clip_text": (hf.CLIPTextConfig, hf.CLIPTextModel),
        "clip_vision": (hf.CLIPVisionConfig, hf.CLIPVisionModel),
        "clip": (hf.CLIPConfig, hf.CLIPModel),
        "siglip": (hf.SiglipConfig, hf.SiglipModel),
        "siglip_text": (hf.SiglipTextConfig, hf.SiglipTextModel),
        "siglip_vision": (hf.SiglipVisionConfig, hf.SiglipVisionModel),
        "dinov2": (hf.Dinov2Config, hf.Dinov2Model),
        "dinov2_registers": (hf.Dinov2WithRegistersConfig, hf.Dinov2WithRegistersModel),
        "dinov3": (hf.DINOv3ViTConfig, hf.DINOv3ViTModel),
        "roberta": (hf.RobertaConfig, hf.RobertaModel),
        "xlm_roberta": (hf.XLMRobertaConfig, hf.XLMRobertaModel),
        "distilbert": (hf.DistilBertConfig, hf.DistilBertModel),
        "mpnet": (hf.MPNetConfig, hf.MPNetModel),
    }[kind]
    torch.manual_seed(seed)
    tower = model(config(**options)).eval()
    randomize(tower)
    tower.save_pretrained(directory)
    np.savez(directory / "expected.npz", **compute(kind, tower, size, seed))


def write_open_clip(options: dict, size, directory: Path, seed: int) -> None:
    """Writes a CLIP of open_clip in its own layout. Images of another size than the model's are encoded after its code
    has resized the table of positions."""
    import open_clip
    import safetensors.torch
    import torch
    from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed

    torch.manual_seed(seed)
    rest = {k: v for k, v in options.items() if k != "custom_text"}
    tower = (CustomTextCLIP if options.get("custom_text") else CLIP)(**rest).eval()
    randomize(tower)
    directory.mkdir(exist_ok=True)
    state = {name: value.contiguous() for name, value in tower.state_dict().items()}
    safetensors.torch.save_file(state, directory / "open_clip_model.safetensors")
    side = options["vision_cfg"]["image_size"]
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": side}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": options, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    if size != (side, side):
        larger = rest | {"vision_cfg": rest["vision_cfg"] | {"image_size": list(size)}}
        resized = type(tower)(**larger).eval()
        resize_pos_embed(state, resized)
        resized.load_state_dict(state)
        tower = resized
    texts = captions(options["text_cfg"]["vocab_size"], seed)
    inputs = {k: fill_up(v, options["text_cfg"]["context_length"]) for k, v in texts.items()}
    inputs["pixel_values"] = np.random.default_rng(seed).normal(size=(2, 3, *size)).astype(np.float32)
    hidden, text = {}, getattr(tower, "text", tower)
    for kind, blocks in (("image", tower.visual.transformer.resblocks), ("text", text.transformer.resblocks)):
        for k, block in enumerate(blocks):
            block.register_forward_hook(lambda *x, key=f"{kind}_hidden_{k + 1}": hidden.update({key: x[2].numpy()}))
    with torch.no_grad():
        images = tower.encode_image(torch.from_numpy(inputs["pixel_values"]), normalize=True)
        texts = tower.encode_text(torch.from_numpy(inputs["input_ids"]), normalize=True)
    outputs = {"pooled": images.numpy(), "pooled_text": texts.numpy()}
    np.savez(directory / "expected.npz", **inputs, **hidden, **outputs)


def randomize(tower) -> None:
    """Changes every parameter and statistic from its initial value, so that none can be mistaken for another. Values of
    wide layers are smaller, so that states do not grow with the width."""
    import torch

    with torch.no_grad():
        for name, value in [*tower.named_parameters(), *tower.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.dtype.is_floating_point and not name.endswith(("inv_freq", "attn_mask")):  # no parameters
                if value.ndim == 1 and name.endswith("weight"):  # of a norm
                    value.add_(torch.randn_like(value) * 0.2)
                else:
                    width = value.shape[-1] if value.ndim else 1
                    scale = 0.1 if value.ndim == 4 else 0.3 * min(1.0, (16 / width) ** 0.5)
                    value.copy_(torch.randn_like(value) * scale)


def compute(kind: str, tower, size, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs and outputs of a tower: `hidden_0 ...`, `last`, `pooled`."""
    import torch

    inputs = {}
    if kind in TEXTS or kind in PAIRS:
        config = tower.config.get_text_config()
        inputs |= captions(config.vocab_size, seed, PADS.get(kind, 0))
        if kind.startswith("siglip"):  # padded to the full length, and never masked
            inputs = {k: fill_up(v, config.max_position_embeddings) for k, v in inputs.items()}
    if size:
        inputs["pixel_values"] = np.random.default_rng(seed).normal(size=(2, 3, *size)).astype(np.float32)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    if kind.startswith("siglip"):
        tensors.pop("attention_mask", None)
    with torch.no_grad():
        if kind in PAIRS:
            out = tower(**tensors)
            return inputs | {"pooled": out.image_embeds.numpy(), "pooled_text": out.text_embeds.numpy()}
        if kind in ("vit", "clip_vision", "siglip_vision"):
            tensors["interpolate_pos_encoding"] = True
        out = tower(**tensors, output_hidden_states=True)
    hidden = {f"hidden_{k}": h.numpy() for k, h in enumerate(out.hidden_states)}
    pooled = getattr(out, "pooler_output", None)
    if pooled is None:  # DistilBERT pools at the first token, and SigLIP without its head over the patches
        pooled = out.last_hidden_state[:, 0] if kind in TEXTS else out.last_hidden_state.mean(1)
    return inputs | hidden | {"last": out.last_hidden_state.numpy(), "pooled": pooled.numpy()}


def captions(vocabulary: int, seed: int, pad: int = 0) -> dict[str, np.ndarray]:
    """Returns three padded texts of different lengths. Each ends with the largest id, CLIP's end of text."""
    ids = np.random.default_rng(seed).integers(max(1, 2 * pad), vocabulary - 2, (3, 9))
    mask = np.arange(9) < np.array([[9], [5], [2]])
    ids[np.arange(3), mask.sum(1) - 1] = vocabulary - 1
    return {"input_ids": np.where(mask, ids, pad), "attention_mask": mask.astype(np.int64)}


def fill_up(x: np.ndarray, length: int) -> np.ndarray:
    """Returns ids or masks `(B, L)` padded to a length, ids with the last one of the last row, padding."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=x[-1, -1])


def main(names) -> None:
    root = Path(__file__).parent / "fixtures"
    for name in names or TOWERS:
        write(name, root / name)
        files = {p.name: p.stat().st_size for p in sorted((root / name).iterdir())}
        print(name, json.dumps(files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
