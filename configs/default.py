"""Every option, its default, and what it does. The other configurations override some of them.

Arguments after the colon (`--config=configs/NAME.py:model=vsepp,smoke`) choose a system (`model=NAME`) and tiny sizes
(`smoke`). On the command line, `--config.section.option=value` overrides one option.
"""

from ml_collections import ConfigDict

from mefn_jax.config import parse_arg, set_dotted
from mefn_jax.matching.systems import find_system, matcher_options


def get_config(arg=""):
    """Returns the configuration, locked: an unknown option is an error."""
    options = parse_arg(arg, model="mefn", smoke=False)
    return finish(base(options["model"]), options)


def base(model="mefn"):
    """Returns all options of a system with their defaults, unlocked. A configuration file overrides some of them, and
    then `finish` sets those that the system requires."""
    c = ConfigDict()
    c.model = model  # the system: a name of MODELS in mefn_jax/matching/systems.py
    c.embed_dim = 256  # D, the width of the joint space of regions, words and pooled embeddings

    c.data = ConfigDict()
    c.data.dir = ""  # a prepared data set, TFDS coco_captions, SCAN's *_precomp, or A:0.7,B:0.3; empty: drawn scenes
    c.data.scenes = (4000, 500, 500)  # drawn scenes: numbers of scenes in train, val, test
    c.data.scene_seed = 0  # drawn scenes: seed they are drawn from
    c.data.pair_twins = False  # drawn scenes: put a caption and that of its twin into one batch, as hard negatives
    c.data.negatives = ""  # file from eval.py mine: puts pairs and their hard negatives into one batch
    c.data.negatives_per_pair = 1  # with data.negatives: the number of hard negatives beside a pair
    c.data.views = 1  # rows of a batch for each pair, which differ by their random augmentation alone
    c.data.held_out_images = 0  # the last N training images: split held_out; training evaluates on it instead of val
    c.data.cached_text = ""  # folder written by mefn_jax.precompute, read instead of running a text tower
    c.data.skip_undecodable = False  # leave out (and count) images that cannot be decoded, instead of stopping
    c.data.threads = 2  # threads that read and decode, each one batch ahead
    c.data.workers = 0  # processes that read and decode; 0: threads of the training process

    c.image = ConfigDict()
    c.image.arch = "resnet"  # resnet, vit, or regions (precomputed, from data.dir)
    c.image.pretrained = ""  # checkpoint in Hugging Face layout: directory or hub name; its sizes replace those below
    c.image.size = 0  # side of the square input in pixels; 0: that of the pretrained checkpoint, else 224
    c.image.resize = "crop"  # crop (the center square), squash (the whole image into a square), or squash_crop (both)
    c.image.crop = 1.0  # crop, squash_crop: fraction of the (shorter) side that is kept
    c.image.resample = "bilinear"  # bilinear, bicubic, lanczos or nearest
    c.image.mean = (0.485, 0.456, 0.406)  # mean of the pixels per channel, in [0, 1]
    c.image.std = (0.229, 0.224, 0.225)  # standard deviation of the pixels per channel
    c.image.region_grids = (7,)  # n x n regions a scale: (7, 7, 7) of a ResNet's last stages; (7, 4, 2) of a ViT's grid
    c.image.pooling = "tower"  # pooled embedding: tower (its own; arch=regions: the mean), mean, max, gpo or esa
    c.image.regions = ConfigDict()
    c.image.regions.width = 0  # channels of a precomputed region; 0: as in data.dir
    c.image.regions.projection = "linear"  # linear, or mlp: a two-layer MLP is added to it (VSE-infinity)
    c.image.regions.grid = 0  # average-pool a square grid of regions to at most n x n; 0: keep it
    c.image.regions.power_norm = False  # unit length, then the signed square root of each channel
    c.image.regions.channel_dropout = 0.0  # training: drops a channel in all regions of an image
    c.image.resnet = ConfigDict()
    c.image.resnet.stem_width = 64  # channels of the first convolution
    c.image.resnet.depths = (3, 4, 23, 3)  # blocks in each stage (default: ResNet-101)
    c.image.resnet.widths = (256, 512, 1024, 2048)  # channels of each stage
    c.image.resnet.bottleneck = True  # 1x1-3x3-1x1 blocks; False: two 3x3
    c.image.resnet.stem_pool = True  # 7x7 stem and max-pooling; False: a 3x3 stem for small images
    c.image.resnet.norm = "group"  # group, or batch: BatchNorm with stored statistics, for pretrained weights
    c.image.resnet.stride_in_1x1 = False  # stride of a stage in its first 1x1 (v1) instead of the 3x3 (v1.5)
    c.image.resnet.downsample_first_stage = False  # the first stage halves the size too
    c.image.resnet.stochastic_depth = 0.0  # rate at the last block; falls linearly to 0 at the first
    c.image.vit = ConfigDict()
    c.image.vit.width = 384  # channels (default: ViT-S/16)
    c.image.vit.layers = 12  # Transformer blocks
    c.image.vit.heads = 6  # attention heads
    c.image.vit.mlp_width = 1536  # hidden width of the MLP
    c.image.vit.patch = 16  # side of a patch in pixels
    c.image.vit.stem = ()  # widths of 3x3 stride-2 convolutions before the patches are cut; (): none
    c.image.vit.dropout = 0.0  # in attention, after attention and after the MLP
    c.image.vit.stochastic_depth = 0.0  # as for resnet
    c.image.vit.pool = "mean"  # mean of the patches, class token, pooler (a tanh layer on it), or attention (SigLIP)
    c.image.vit.registers = 0  # learned tokens without a position (DINOv2 with registers: 4)
    c.image.vit.position_grid = ()  # rows and columns of the position table; (): those of the input
    c.image.vit.antialias = False  # smooth the position table where it is made smaller
    c.image.vit.rotation_base = 0.0  # rotated attention (RoPE) in place of a position table (DINOv3: 100); 0: a table
    c.image.vit.embed_norm = False  # CLIP's norm before the first block
    c.image.vit.qkv_bias = True  # bias of query, key and value
    c.image.vit.key_bias = True  # bias of the key, too (DINOv3: False)
    c.image.vit.gated = False  # gated MLP (SwiGLU)
    c.image.vit.layer_scale = False  # a learned scale of each residual branch (DINO)
    c.image.vit.activation = "gelu"  # a name of ACTIVATIONS in mefn_jax/encoders/transformer.py
    c.image.vit.eps = 1e-6  # of the norms

    c.text = ConfigDict()
    c.text.arch = "bert"  # bert, clip (causal), siglip, gru, or cached: a frozen tower's features (data.cached_text)
    c.text.pretrained = ""  # checkpoint: directory or hub name; its sizes and tokenizer replace those below
    c.text.vocab_size = 0  # rows of the word embedding; 0: the tokenizer's
    c.text.max_tokens = 32  # wordpieces kept of a caption, without [CLS] and [SEP]
    c.text.start_token = True  # captions begin with [CLS] (or the token of that role); SigLIP's do not
    c.text.lower_case = True  # lower-case captions; must be as the data set was prepared
    c.text.punctuation = "keep"  # keep or drop; must be as the data set was prepared
    c.text.pooling = "tower"  # pooled embedding: the tower's own, or mean, max, gpo or esa of the words
    c.text.channel_dropout = 0.0  # training: drops a channel in all words of a text, before the projection
    c.text.bert = ConfigDict()
    c.text.bert.width = 768  # channels (default: BERT-base)
    c.text.bert.layers = 12  # Transformer blocks
    c.text.bert.heads = 12  # attention heads
    c.text.bert.mlp_width = 3072  # hidden width of the MLP
    c.text.bert.max_positions = 512  # rows of the position embedding
    c.text.bert.dropout = 0.1  # after the embeddings, in attention, after attention and after the MLP
    c.text.bert.stochastic_depth = 0.0  # as for images
    c.text.bert.type_vocab_size = 2  # rows of the segment embedding; only the first is used; 0: none (DistilBERT)
    c.text.bert.pad_id = -1  # id of the padding, after which positions count (RoBERTa, XLM-R: 1); -1: from 0 on (BERT)
    c.text.bert.distance_buckets = 0  # rows of a table of biases of attention by distance (MPNet: 32); 0: none
    c.text.bert.pooler = False  # pooled output: BERT's tanh layer on [CLS]; False: [CLS] itself
    c.text.bert.activation = "gelu"  # a name of ACTIVATIONS in mefn_jax/encoders/transformer.py
    c.text.bert.eps = 1e-12  # of the norms
    c.text.clip = ConfigDict()
    c.text.clip.width = 512  # channels (default: CLIP ViT-B)
    c.text.clip.layers = 12  # as for bert
    c.text.clip.heads = 8  # as for bert
    c.text.clip.mlp_width = 2048  # as for bert
    c.text.clip.max_positions = 77  # as for bert
    c.text.clip.dropout = 0.0  # as for bert
    c.text.clip.stochastic_depth = 0.0  # as for bert
    c.text.clip.activation = "quick_gelu"  # as for bert
    c.text.clip.eps = 1e-5  # as for bert
    c.text.siglip = ConfigDict()  # padded to max_positions, and the padding is read too
    c.text.siglip.width = 768  # channels (default: SigLIP ViT-B)
    c.text.siglip.layers = 12  # as for bert
    c.text.siglip.heads = 12  # as for bert
    c.text.siglip.mlp_width = 3072  # as for bert
    c.text.siglip.max_positions = 64  # as for bert, and the length to which captions are padded
    c.text.siglip.pad_id = 0  # id of the padding; a checkpoint's tokenizer replaces it
    c.text.siglip.head_width = 0  # channels of the pooled output; 0: width
    c.text.siglip.dropout = 0.0  # as for bert
    c.text.siglip.stochastic_depth = 0.0  # as for bert
    c.text.siglip.activation = "gelu_pytorch_tanh"  # as for bert
    c.text.siglip.eps = 1e-6  # as for bert
    c.text.cached = ConfigDict()
    c.text.cached.width = 0  # channels of a cached word; 0: as in data.cached_text
    c.text.gru = ConfigDict()  # its states have embed_dim channels and are not projected, as in VSE++ and SCAN
    c.text.gru.word_width = 300  # channels of the word embedding
    c.text.gru.layers = 1  # stacked layers
    c.text.gru.bidirectional = True  # True as in SCAN; False as in VSE++
    c.text.gru.dropout = 0.0  # on the embeddings and between layers

    c.augment = ConfigDict()  # training only; draws follow from (seed, epoch, caption)
    c.augment.crop = 1.0  # random crop: smallest fraction of the image's area; 1: no random crop
    c.augment.flip = 0.0  # probability of mirroring, never if a caption of the image says left or right in any language
    c.augment.color_jitter = 0.0  # x: brightness, contrast and saturation factors in 1 - x to 1 + x
    c.augment.word_noise = 0.0  # probability that a word is masked, replaced or dropped (VSE-infinity: 0.2)
    c.augment.region_dropout = 0.0  # probability that a region is left out (VSE-infinity: 0.2)

    c.matcher = ConfigDict(matcher_options(model))  # the fields of the system's class in mefn_jax/matching/

    c.loss = ConfigDict()
    c.loss.name = "triplet"  # triplet, sel, info_nce (learned scale), siglip (scale and bias), or a sum of LOSSES
    c.loss.triplet_weight = 1.0  # info_nce_triplet: weight of the triplet loss in the sum of both
    c.loss.margin = 0.2  # triplet, sel: margin in score units (alpha of the paper's Eq. 2 is twice this)
    c.loss.anchors = "both"  # triplet, sel: both, image (the paper's Eq. 2 as printed) or text
    c.loss.hard_negative_ramp = -1  # triplet, sel: steps from all negatives to the hardest; 0: at once, -1: never
    c.loss.skip_equal_captions = False  # captions with the same text are not negatives of each other
    c.loss.negatives = "global"  # negatives come from: global (all devices) or local (the same device)

    c.mesh = ConfigDict()  # device mesh; one size may be -1: the remaining devices (runtime/sharding.py)
    c.mesh.data = -1  # copies of the parameters, each with its own rows of the batch
    c.mesh.fsdp = 1  # devices that share one copy of the parameters and split the batch
    c.mesh.tensor = 1  # devices that share one copy of the parameters and the same rows of the batch

    c.train = ConfigDict()
    c.train.steps = 0  # length in steps; set exactly one of steps and epochs
    c.train.epochs = 30.0  # length in passes over all (image, caption) pairs
    c.train.batch_size = 128  # rows a step, over all devices: pairs, or data.views rows for each pair
    c.train.seed = 0  # of the parameters, the dropout and the order of examples
    c.train.init = "random"  # random, or cca: projections from the training data (training/cca_init.py)
    c.train.init_from = ""  # run, exported model, or OWNER/NAME on the hub, whose parameters this run begins with
    c.train.init_new = ""  # regex of paths of parameters that are drawn anew all the same; "^loss/": the loss's
    c.train.learning_rate = 5e-4  # peak, of AdamW
    c.train.warmup_fraction = 0.05  # fraction of the steps with a rising learning rate; then a cosine to 0
    c.train.weight_decay = 0.05  # on matrices; not on biases, norms and scalars
    c.train.clip_norm = 2.0  # largest global norm of the gradient
    # Rules "regex:factor": the first that matches a parameter's path scales its learning rate; 0 freezes the parameter.
    c.train.lr_multipliers = ()  # for example ("image/backbone:0.1", "text/backbone:0")
    c.train.lora = ConfigDict()  # adapters of the towers' matrices (encoders/lora.py); the rest of the tower is frozen
    c.train.lora.rank = 0  # rank of the adapters; 0: no adapters
    c.train.lora.alpha = 16.0  # scale of the adapters, divided by the rank
    c.train.lora.matrices = "attention/(query|value)/kernel$"  # regex of paths; "^image/.*kernel$": one tower
    c.train.dtype = "float32"  # of the towers, but not of the GRU: float32 or bfloat16; parameters stay float32
    c.train.remat = "none"  # activation checkpointing: none; dots (keep matrix products); blocks (keep blocks' inputs)
    c.train.score_chunk_mib = 64.0  # MiB of the products of regions and words that a device keeps while scoring
    c.train.score_tile_mib = 64.0  # MiB of one regions x words array within such a chunk; on a CPU 0.5 is fast
    c.train.grad_cache_chunks = 1  # encode the batch in N chunks (gradient caching); negatives come from all of it
    c.train.layer_decay = 1.0  # learning-rate factor for each Transformer layer away from the output
    c.train.ema_decay = 0.0  # decay per step of the averaged parameters, which are evaluated too; 0: no average
    c.train.patience = 0  # stop after this many evaluations on val in a row without a higher rSum; 0: never
    c.train.log_every = 50  # steps between log lines
    c.train.eval_every = 1000  # steps between evaluations on val; also evaluates at the end
    c.train.save_every = 1000  # steps between checkpoints; also saves after each evaluation and at the end

    c.log = ConfigDict()
    c.log.to = ""  # trackers beside TensorBoard, separated by commas: wandb, mlflow, trackio
    c.log.project = "mefn-jax"  # project in which the trackers group the runs

    c.eval = ConfigDict()
    c.eval.batch_size = 128  # images or captions encoded at once
    c.eval.val_images = 1000  # evaluations during training use the first N images of val; 0: all
    c.eval.explained_pairs = 2  # pairs of val drawn for TensorBoard at each evaluation
    c.eval.score_tile_mib = 0.0  # MiB of one regions x words array on a device; 0: 1 on a CPU, else 8
    for key, value in find_system(model).defaults.items():
        set_dotted(c, key, value)
    return c


def finish(c, options):
    """Sets what the system requires and, with `smoke`, tiny sizes, and locks the configuration. `options` are those
    after the colon."""
    for key, value in find_system(c.model).requires.items():
        set_dotted(c, key, value)
    if options["smoke"]:
        shrink(c)
    return c.lock()


def shrink(c):
    """Sets tiny sizes (`smoke`): the whole path runs in seconds."""
    c.embed_dim = 32
    c.data.dir = c.image.pretrained = c.text.pretrained = ""
    c.data.scenes = (64, 24, 24)
    c.image.size = 64
    c.image.region_grids = tuple(min(n, 4) for n in c.image.region_grids)
    c.image.resnet.update(stem_width=8, depths=(1, 1, 1, 1), widths=(8, 16, 16, 32), stem_pool=False)
    c.image.vit.update(width=32, layers=1, heads=2, mlp_width=64, patch=16, stem=())
    c.text.max_tokens = 16
    for tower in (c.text.bert, c.text.clip, c.text.siglip):
        tower.update(width=32, layers=1, heads=2, mlp_width=64, max_positions=64)
    c.text.gru.word_width = 16
    for option, size in {"hub_vectors": 8, "concepts": 8, "layers": 1, "mlp_width": 32}.items():
        if option in c.matcher:
            c.matcher[option] = min(c.matcher[option], size)
    c.loss.hard_negative_ramp = min(c.loss.hard_negative_ramp, 4)
    c.train.update(steps=8, epochs=0.0, batch_size=16, log_every=2, eval_every=4, save_every=4)
    c.eval.update(batch_size=16, explained_pairs=0)
