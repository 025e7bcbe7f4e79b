"""Architectures of checkpoints that are read, by the `model_type` of config.json. (open_clip's have none.)"""

from mefn_jax.encoders.pretrained import image_towers, open_clip, text_towers

# Options of config.json that are supported with a single value only.
BUILT = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "pooler_act": "tanh",
    "query_bias": True,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}

# Kind of tower, `model_type` in config.json, function.
ARCHITECTURES = [
    ("text", "bert", text_towers.map_bert),
    ("text", "roberta", text_towers.map_roberta),
    ("text", "xlm-roberta", text_towers.map_roberta),
    ("text", "distilbert", text_towers.map_distilbert),
    ("text", "mpnet", text_towers.map_mpnet),
    ("image", "vit", image_towers.map_vit),
    ("image", "dinov2", image_towers.map_dinov2),
    ("image", "dinov2_with_registers", image_towers.map_dinov2),
    ("image", "dinov3_vit", image_towers.map_dinov3),
    ("image", "resnet", image_towers.map_resnet),
    ("image", "clip", image_towers.map_clip_vision),
    ("image", "clip_vision_model", image_towers.map_clip_vision),
    ("text", "clip", text_towers.map_clip_text),
    ("text", "clip_text_model", text_towers.map_clip_text),
    ("image", "siglip", image_towers.map_siglip_vision),
    ("image", "siglip_vision_model", image_towers.map_siglip_vision),
    ("text", "siglip", text_towers.map_siglip_text),
    ("text", "siglip_text_model", text_towers.map_siglip_text),
    ("image", open_clip.MODEL_TYPE, open_clip.map_image),
    ("text", open_clip.MODEL_TYPE, open_clip.map_text),
]
