"""Every option, its default, and what it does. Other configurations override; nothing has a default elsewhere.

Arguments after the colon (`--config=configs/NAME.py:model=vsepp,smoke`) are closed: `model=` and `smoke`.
"""

from ml_collections import ConfigDict

from mefn_jax.config import parse_arg


def get_config(arg=""):
    """The configuration, locked: any other key is an error."""
    return finish(base(), arg)


def base():
    c = ConfigDict()
    c.model = "mefn"  # which system: a name of mefn_jax/model.py
    c.embed_dim = 256  # D, the width of the joint space of regions, words and pooled embeddings

    c.data = ConfigDict()
    c.data.dir = ""  # made by `python -m mefn_jax.data.prepare`, TFDS coco_captions, or SCAN's *_precomp; empty: drawn
    c.data.scenes = (4000, 500, 500)  # drawn scenes: how many in train, val, test
    c.data.scene_seed = 0  # drawn scenes: the seed they are drawn from
    c.data.twins_together = False  # drawn scenes: a caption and its twin's in one batch, as hard negatives
    c.data.hold_out = 0  # so many last images of train are the split held_out instead, and stand in for val
    c.data.words = ""  # written by mefn_jax.precompute, read in place of a text tower (text.arch=words)
    c.data.skip_bad = False  # leave out images that cannot be decoded (and count them) instead of stopping
    c.data.threads = 2  # threads that read and decode, each a batch ahead
    c.data.workers = 0  # processes that read and decode; 0: threads of this one

    c.image = ConfigDict()
    c.image.arch = "resnet"  # resnet, vit, or regions: precomputed ones, from data.dir
    c.image.pretrained = ""  # a checkpoint (Hugging Face layout): directory or hub name; its sizes replace those below
    c.image.size = 0  # pixels of the square input; 0: as the pretrained checkpoint had it, 224 without one
    c.image.fit = "crop"  # crop (the centre square) or squash (the whole image into a square)
    c.image.crop = 1.0  # crop: the share of the shorter side that is kept
    c.image.resample = "bilinear"  # bilinear, bicubic, lanczos or nearest
    c.image.mean = (0.485, 0.456, 0.406)  # of the pixels, per channel in [0, 1]
    c.image.std = (0.229, 0.224, 0.225)  # likewise
    c.image.scales = (7,)  # regions: a grid of at most n x n a scale, of a ResNet's last stages or a ViT's one grid
    c.image.pooling = "tower"  # pooled: the tower's own (of regions: mean), or mean, max or gpo of the regions
    c.image.regions = ConfigDict()
    c.image.regions.width = 0  # of a precomputed region; 0: as data.dir has them
    c.image.regions.projection = "linear"  # linear, or mlp: a two-layer MLP is added to it (VSE-infinity)
    c.image.regions.grid = 0  # square grids of regions are pooled to at most n x n; 0: as they are
    c.image.regions.transform = "none"  # none, or root: each region's square root of unit length
    c.image.regions.channel_dropout = 0.0  # in training, of all regions of an image at once
    c.image.resnet = ConfigDict()
    c.image.resnet.stem_width = 64  # channels of the first convolution
    c.image.resnet.depths = (3, 4, 23, 3)  # blocks in each stage (these are ResNet-101's)
    c.image.resnet.widths = (256, 512, 1024, 2048)  # channels of each stage
    c.image.resnet.bottleneck = True  # 1x1-3x3-1x1 blocks; False: two 3x3
    c.image.resnet.stem_pool = True  # 7x7 stem and max-pooling; False: a 3x3 stem for small images
    c.image.resnet.norm = "group"  # group, or batch: BatchNorm on stored statistics, for pretrained weights
    c.image.resnet.stride_first = False  # a stage's stride on its first 1x1 (v1), not on the 3x3 (v1.5)
    c.image.resnet.stride_all = False  # the first stage halves the size too
    c.image.resnet.stochastic_depth = 0.0  # chance of leaving out the last block's branch; falls to 0 at the first
    c.image.vit = ConfigDict()
    c.image.vit.width = 384  # (these are ViT-S/16's)
    c.image.vit.layers = 12  # Transformer blocks
    c.image.vit.heads = 6  # attention heads
    c.image.vit.mlp_width = 1536  # hidden width of the blocks' MLP
    c.image.vit.patch = 16  # pixels a patch side
    c.image.vit.stem = ()  # widths of 3x3 stride-2 convolutions before patches are cut; () for the original
    c.image.vit.dropout = 0.0  # in attention, and after attention and MLP
    c.image.vit.stochastic_depth = 0.0  # as for resnet
    c.image.vit.pool = "mean"  # pooled: mean of the patches, class (token), or tanh (of a layer on it)
    c.image.vit.table = ()  # rows and columns of the position table; () for those of the input
    c.image.vit.embed_norm = False  # CLIP's norm before the first block
    c.image.vit.bias = True  # of query, key and value
    c.image.vit.activation = "gelu"  # a name of ACTIVATIONS in mefn_jax/encoders/transformer.py
    c.image.vit.eps = 1e-6  # of the norms

    c.text = ConfigDict()
    c.text.arch = "bert"  # bert, clip (causal), gru, or words: a frozen tower's, from data.words
    c.text.pretrained = ""  # a checkpoint: directory or hub name; its sizes and tokenizer replace ours
    c.text.vocab_size = 0  # of the embedding; 0: the tokenizer's
    c.text.max_words = 32  # wordpieces kept of a caption, without [CLS] and [SEP]
    c.text.lower_case = True  # captions in lower case; must agree with what the data set was prepared with
    c.text.punctuation = "keep"  # keep or drop; must agree likewise
    c.text.pooling = "tower"  # pooled: the tower's own, or mean, max or gpo of the words
    c.text.channel_dropout = 0.0  # in training, of all words of a text at once, before their projection
    c.text.bert = ConfigDict()
    c.text.bert.width = 768  # (these are BERT-base's)
    c.text.bert.layers = 12  # Transformer blocks
    c.text.bert.heads = 12  # attention heads
    c.text.bert.mlp_width = 3072  # hidden width of the blocks' MLP
    c.text.bert.max_positions = 512  # positions with an embedding
    c.text.bert.dropout = 0.1  # in the embeddings, in attention, and after attention and MLP
    c.text.bert.stochastic_depth = 0.0  # as for images
    c.text.bert.segments = 2  # rows of the segment embedding, of which the first is used
    c.text.bert.pooler = False  # pooled: BERT's tanh layer on [CLS]; False: [CLS] itself
    c.text.bert.activation = "gelu"  # a name of ACTIVATIONS in mefn_jax/encoders/transformer.py
    c.text.bert.eps = 1e-12  # of the norms
    c.text.clip = ConfigDict()
    c.text.clip.width = 512  # (these are CLIP ViT-B's)
    c.text.clip.layers = 12  # as for bert
    c.text.clip.heads = 8  # as for bert
    c.text.clip.mlp_width = 2048  # as for bert
    c.text.clip.max_positions = 77  # as for bert
    c.text.clip.dropout = 0.0  # as for bert
    c.text.clip.stochastic_depth = 0.0  # as for bert
    c.text.clip.activation = "quick_gelu"  # as for bert
    c.text.clip.eps = 1e-5  # as for bert
    c.text.words = ConfigDict()
    c.text.words.width = 0  # of a cached word; 0: as data.words has them
    c.text.gru = ConfigDict()  # its states are embed_dim wide and not projected, as in VSE++ and SCAN
    c.text.gru.word_width = 300  # of the word embedding
    c.text.gru.layers = 1  # one on top of another
    c.text.gru.bidirectional = True  # SCAN; False: VSE++
    c.text.gru.dropout = 0.0  # on the embeddings and between layers

    c.augment = ConfigDict()  # random changes in training, from (seed, epoch, caption)
    c.augment.crop = 1.0  # the smallest share of the image's area that a random crop keeps; 1: no random crop
    c.augment.flip = 0.0  # chance of mirroring, never where a caption of the image says left or right
    c.augment.colour = 0.0  # strength of brightness, contrast and saturation: factors in 1 - x to 1 + x
    c.augment.words = 0.0  # chance that a word is masked, replaced or dropped (VSE-infinity: 0.2)
    c.augment.regions = 0.0  # chance that a region is left out (VSE-infinity: 0.2)

    c.matcher = ConfigDict()  # MEFN's own (DESIGN 3); the ablations are names of `model`
    c.matcher.entropy = "shannon"  # shannon, gaussian, bernoulli or none
    c.matcher.attend = "both"  # local attention: both, words (attend to regions) or regions (attend to words)
    c.matcher.global_input = "weighted"  # global branch: pooled plus weighted fragments, or pooled alone
    c.matcher.init_scale = 9.0  # initial lambda, the inverse temperature of entropy and attention
    c.matcher.init_sharpness = 4.0  # initial kappa, how sharply low entropy gets weight
    c.matcher.background = 0  # vectors of a learned background, whose level is taken from the score; 0: none
    c.matcher.init_background_scale = 20.0  # initial scale of these levels

    c.loss = ConfigDict()
    c.loss.name = "triplet"  # triplet, info_nce (a learned scale) or siglip (a learned scale and bias)
    c.loss.margin = 0.2  # triplet: of the hinge, in score units (Eq. 2's alpha is twice this)
    c.loss.anchors = "both"  # triplet: both, image (Eq. 2 as printed) or text
    c.loss.warmup_steps = -1  # triplet: steps from the sum over negatives to the hardest alone; -1: the sum for good

    c.loss.negatives = "global"  # global: all texts of the batch; local: those on the same device

    c.mesh = ConfigDict()  # how the devices are arranged; one may be -1, what is left (sharding.py)
    c.mesh.data = -1  # copies of the parameters, each with its rows of the batch
    c.mesh.fsdp = 1  # devices that a copy is spread over, which also split the batch
    c.mesh.tensor = 1  # devices that a copy is spread over, with the same rows of the batch

    c.train = ConfigDict()
    c.train.steps = 0  # length in steps; exactly one of steps and epochs is not 0
    c.train.epochs = 30.0  # length in passes over all (image, caption) pairs
    c.train.batch_size = 128  # pairs a step, over all devices
    c.train.seed = 0  # of the parameters, the dropout and the order of examples
    c.train.start = "random"  # random, or linear: projections, and MEFN's background, from the training data (start.py)
    c.train.learning_rate = 5e-4  # peak, of AdamW
    c.train.warmup = 0.05  # share of the steps over which the learning rate rises; then a cosine to 0
    c.train.weight_decay = 0.05  # on matrices; not on biases, norms and scalars
    c.train.clip_norm = 2.0  # the gradient's largest global norm
    c.train.multipliers = ()  # "regex:factor" of the learning rate, the first that is found in a path; factor 0 freezes
    c.train.dtype = "float32"  # of the towers (but not the GRU): float32 or bfloat16; parameters and scores are float32
    c.train.remat = "none"  # what the towers compute again, going back: none, dots (all but products) or blocks (all)
    c.train.tile_mib = 64.0  # MiB an array of regions by words while scoring (recomputed.py); on a CPU 2 is fast
    c.train.encoder_parts = 1  # the encoders take the batch in so many parts (the scores are of all of it; parts.py)
    c.train.layer_decay = 1.0  # factor of the learning rate a Transformer layer further from the output
    c.train.ema = 0.0  # decay a step of an average of the parameters, which is then evaluated beside them; 0: none
    c.train.log_every = 50  # steps a log line
    c.train.eval_every = 1000  # steps between evaluations on val; also evaluates at the end
    c.train.save_every = 1000  # steps between checkpoints; also saves after each evaluation and at the end

    c.eval = ConfigDict()
    c.eval.batch_size = 128  # images or captions encoded at once
    c.eval.val_images = 1000  # evaluations in training score the first so many images of val; 0: all
    c.eval.explained = 2  # pairs of val that are drawn for TensorBoard at each evaluation
    c.eval.tile_mib = 0.0  # MiB an array of regions by words on a device while scoring; 0: 1 on a CPU, else 8
    return c


def finish(c, arg):
    """Applies the arguments to the overrides made so far, and locks."""
    options = parse_arg(arg, model=c.model, smoke=False)
    c.model = options["model"]
    if c.model == "vsepp" or c.model.startswith("scan"):
        c.loss.warmup_steps = 500  # they are the hardest-negative form
    if c.model == "clip":
        c.loss.name = "info_nce"
    if options["smoke"]:
        shrink(c)
    return c.lock()


def shrink(c):
    """`smoke`: the same path with tiny towers, in seconds."""
    c.embed_dim = 32
    c.data.dir = c.image.pretrained = c.text.pretrained = ""
    c.data.scenes = (64, 24, 24)
    c.image.size = 64
    c.image.scales = tuple(min(n, 4) for n in c.image.scales)
    c.image.resnet.update(stem_width=8, depths=(1, 1, 1, 1), widths=(8, 16, 16, 32), stem_pool=False)
    c.image.vit.update(width=32, layers=1, heads=2, mlp_width=64, patch=16, stem=())
    c.text.max_words = 16
    for tower in (c.text.bert, c.text.clip):
        tower.update(width=32, layers=1, heads=2, mlp_width=64, max_positions=64)
    c.text.gru.word_width = 16
    c.matcher.background = min(c.matcher.background, 8)
    c.loss.warmup_steps = min(c.loss.warmup_steps, 4)
    c.train.update(steps=8, epochs=0.0, batch_size=16, log_every=2, eval_every=4, save_every=4)
    c.eval.update(batch_size=16, explained=0)
