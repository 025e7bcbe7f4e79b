"""Mapping of text towers: BERT and its relatives, CLIP's and SigLIP's.

Each function takes the object of config.json and the tensors' headers, and returns a `Mapping`.
"""

from mefn_jax.encoders.bert import BERT
from mefn_jax.encoders.clip_text import CLIPText
from mefn_jax.encoders.pretrained.mapping import (
    CLIP_BLOCK,
    DENSE,
    SAME,
    Mapping,
    find_prefix,
    make_text,
    map_block,
    map_linear,
    map_norm,
    read_bounded,
    read_sizes,
)
from mefn_jax.encoders.siglip_text import SigLIPText

_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "norm_2": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "norm_1": "sa_layer_norm",
    "mlp_in": "ffn.lin1",
    "mlp_out": "ffn.lin2",
    "norm_2": "output_layer_norm",
}
_MPNET_BLOCK = _BERT_BLOCK | {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "out": "attention.attn.o",
    "norm_1": "attention.LayerNorm",
}


MPNET_BUCKETS = 32  # `transformers` ignores the option
_BERT_SIZES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}


def _map_bert_like(c: dict, prefix: str, block: dict, layers: str, pooler: bool, **fields) -> Mapping:
    """Returns the mapping of BERT or a relative, with the names of its blocks and where they stand; `fields` are those
    of our module in which it differs."""
    segments = c.get("type_vocab_size", 0)
    sizes = {"eps": 1e-12} | {k: c[v] for k, v in _BERT_SIZES.items() if v in c}
    module = BERT(type_vocab_size=segments, pooler=pooler, **sizes, **fields)
    tables = [("words", "word"), ("positions", "position"), *([("segments", "token_type")] if segments else [])]
    rows = [(f"{prefix}embeddings.{theirs}_embeddings.weight", (ours, "embedding"), SAME) for ours, theirs in tables]
    rows += map_norm(f"{prefix}embeddings.LayerNorm", "norm" if segments else "embed_norm")
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", block, f"{prefix}{layers}.{k}.")
    if pooler:
        rows += map_linear(f"{prefix}pooler.dense", "pooler")
    return Mapping(module, rows, make_text())


def map_bert(c: dict, tensors: dict) -> Mapping:
    """Maps BERT."""
    p = find_prefix(tensors, "embeddings.word_embeddings.weight", "", "bert.")
    return _map_bert_like(c, p, _BERT_BLOCK, "encoder.layer", p + "pooler.dense.weight" in tensors)


def map_roberta(c: dict, tensors: dict) -> Mapping:
    """Maps RoBERTa and XLM-R, which count positions from the padding's id on."""
    p = find_prefix(tensors, "embeddings.word_embeddings.weight", "", "roberta.")
    pad = read_bounded(c, "pad_token_id", 0, c["max_position_embeddings"] - 2)
    return _map_bert_like(c, p, _BERT_BLOCK, "encoder.layer", p + "pooler.dense.weight" in tensors, pad_id=pad)


def map_distilbert(c: dict, tensors: dict) -> Mapping:
    """Maps DistilBERT, which has no segments and no pooler."""
    p = find_prefix(tensors, "embeddings.word_embeddings.weight", "", "distilbert.")
    return _map_bert_like(c, p, _DISTILBERT_BLOCK, "transformer.layer", False)


def map_mpnet(c: dict, tensors: dict) -> Mapping:
    """Maps MPNet, whose positions count from the padding on, and whose attention has a bias for each distance."""
    p = find_prefix(tensors, "embeddings.word_embeddings.weight", "", "mpnet.")
    buckets = read_bounded(c, "relative_attention_num_buckets", MPNET_BUCKETS, MPNET_BUCKETS)
    pooler = p + "pooler.dense.weight" in tensors
    mapping = _map_bert_like(c, p, _MPNET_BLOCK, "encoder.layer", pooler, pad_id=1, distance_buckets=buckets)
    mapping.rows.append((f"{p}encoder.relative_attention_bias.weight", ("distances", "embedding"), SAME))
    return mapping


def map_clip_text(c: dict, tensors: dict) -> Mapping:
    """Maps CLIP's text tower."""
    p = find_prefix(tensors, "embeddings.token_embedding.weight", "text_model.", "")
    module = CLIPText(vocab_size=c["vocab_size"], max_positions=c["max_position_embeddings"], **read_sizes(c))
    rows = _map_clip_like(module, p)
    projection = "text_projection.weight", DENSE, (c["hidden_size"], c["projection_dim"])
    return Mapping(module, rows, make_text(), ("vision_model.", "visual_projection."), projection)


def map_siglip_text(c: dict, tensors: dict) -> Mapping:
    """Maps SigLIP's and SigLIP 2's text tower. The id for padding is the tokenizer's, not that of config.json."""
    p = find_prefix(tensors, "embeddings.token_embedding.weight", "text_model.", "")
    head_width = c.get("projection_size") or c["hidden_size"]
    module = SigLIPText(
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        pad_id=c.get("pad_token_id") or 0,
        head_width=head_width,
        **read_sizes(c),
    )
    rows = _map_clip_like(module, p) + map_linear(f"{p}head", "head")
    return Mapping(module, rows, make_text(), ("vision_model.",), joint_width=head_width)


def _map_clip_like(module, prefix: str) -> list:
    """Returns the rows that the text towers of CLIP and SigLIP have in common."""
    rows = [
        (f"{prefix}embeddings.token_embedding.weight", ("words", "embedding"), SAME),
        (f"{prefix}embeddings.position_embedding.weight", ("positions", "embedding"), SAME),
        *map_norm(f"{prefix}final_layer_norm", "norm"),
    ]
    for k in range(module.layers):
        rows += map_block(f"layer_{k}", CLIP_BLOCK, f"{prefix}encoder.layers.{k}.")
    return rows
