"""What every config shares: defaults for each section, and how a variant is read.

`--config configs/alignformer.py:refcoco,small` calls `get_config("refcoco,small")`; any field is
overridden with `--config.section.field=value`.
"""

import difflib

from ml_collections import ConfigDict

# Variant word -> the fields of `config.data` that choose the data.
DATASETS = {
    "shapes": dict(dataset="shapes", split_by="", eval_splits=("val", "testA", "testB")),
    "refcoco": dict(dataset="refcoco", split_by="unc", eval_splits=("val", "testA", "testB")),
    "refcoco+": dict(dataset="refcoco+", split_by="unc", eval_splits=("val", "testA", "testB")),
    "refcocog_umd": dict(dataset="refcocog", split_by="umd", eval_splits=("val", "test")),
    "refcocog_google": dict(dataset="refcocog", split_by="google", eval_splits=("val",)),
    "grefcoco": dict(dataset="grefcoco", split_by="unc", eval_splits=("val", "testA", "testB")),
    "referit": dict(dataset="refclef", split_by="berkeley", eval_splits=("val", "test")),
    # What `python -m refseg_jax.data.prepare` wrote to the root, such as photos of one's own.
    "prepared": dict(dataset="prepared", split_by="", eval_splits=("val",)),
    # A training set of several, without the images of their other splits.
    "merged": dict(
        dataset="merged",
        split_by="",
        merged=("refcoco_unc", "refcoco+_unc", "refcocog_umd"),
        select_split="refcoco_unc/val",
        eval_splits=(
            *("refcoco_unc/val", "refcoco_unc/testA", "refcoco_unc/testB"),
            *("refcoco+_unc/val", "refcoco+_unc/testA", "refcoco+_unc/testB"),
            *("refcocog_umd/val", "refcocog_umd/test"),
        ),
    ),
}


# (path regex, learning-rate factor, weight-decay factor): the first that is found wins.
GROUPS = ((r"(scale|bias|bias_table)$", 1.0, 0.0), (r"", 1.0, 1.0))

# Variant words of every model: a laptop-size one, and the recipe with Swin-S.
SIZES = ("small", "swin_small")


def parse_variant(variant: str, known: tuple[str, ...] = ()) -> set[str]:
    """The words of a comma-separated variant, each a dataset, a size, or one of `known`."""
    words = {word.strip() for word in (variant or "").split(",") if word.strip()}
    choices = (*DATASETS, *SIZES, *known)
    for word in sorted(words):
        if word not in choices:
            close = difflib.get_close_matches(word, choices, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown config variant {word!r}{hint} (known: {', '.join(choices)})")
    for word in sorted(words & {"swin_small", "resnet50"}):
        if is_small(words):
            raise ValueError(
                f"config variant {variant!r}: the small model has encoders of its own; "
                f"{word} is for a whole recipe, e.g. refcoco,{word}"
            )
    if len(words & set(DATASETS)) > 1:
        raise ValueError(f"config variant {variant!r} names more than one dataset")
    return words


def get_common(name: str, words: set[str]) -> ConfigDict:
    """Defaults of every section, for the dataset that `words` name (or shapes).

    Of `model` there are its name and the encoders that all models use: Swin-B and BERT-base.
    """
    (dataset,) = words & set(DATASETS) or {"shapes"}
    embedded = dataset == "shapes"
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict(dict(name=name, dtype="float32"))
    config.model.swin = ConfigDict(
        dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12)
    )
    if "swin_small" in words:
        config.model.swin.update(embed_dim=96, num_heads=(3, 6, 12, 24), window=7)
    config.model.swin.drop_path = 0.3
    config.model.swin.positions = False  # Sine positions on the patches.
    config.model.swin.remat = False
    config.model.swin.cudnn = False  # Attention in cuDNN's kernels, on NVIDIA's GPUs.
    config.model.bert = ConfigDict(dict(hidden=768, layers=12, heads=12, intermediate=3072))
    config.model.bert.vocab_size = 0  # 0: the tokenizer's.
    config.model.bert.max_positions = 512
    config.model.bert.dropout = 0.1
    config.model.bert.remat = False

    config.data = ConfigDict(DATASETS[dataset])
    # Directory with images/ and the dataset's own folder, or a prepared one, which may be gs://.
    config.data.root = "data"
    config.data.merged = DATASETS[dataset].get("merged", ())  # The sets that "merged" is made of.
    config.data.train_split = "train"
    # The best checkpoint is chosen on it.
    config.data.select_split = DATASETS[dataset].get("select_split", "val")
    config.data.eval_splits = DATASETS[dataset]["eval_splits"]
    config.data.image_size = 480
    config.data.letterbox = False  # Pictures keep their shape in the square that they are put into.
    # Of raw data: sentences as typed, or "sent", in lower case and cleaned. What is prepared has
    # those that it was prepared with.
    config.data.text_field = "raw"
    config.data.max_tokens = 20
    # "shapes" (its grammar's own words), a tokenizer file or directory, or a Hugging Face name.
    config.data.tokenizer = "shapes" if embedded else "bert-base-uncased"
    config.data.sampling = "sentence"  # One sentence per sample; "ref": a random one per ref.
    config.data.workers = 0  # Processes that load batches; 0: threads of this one.
    config.data.threads = 2  # Of each of them, a batch each; as many compare masks in evaluation.
    config.data.shapes_scenes = ConfigDict(dict(train=20000, val=150, testA=100, testB=100))

    config.train = ConfigDict()
    config.train.steps = 0  # 0: as many as `epochs` take.
    config.train.epochs = 40
    config.train.batch_size = 32  # Over all devices.
    config.train.accumulate = 1  # Parts a batch is taken in.
    config.train.ema_decay = 0.0  # 0: no averaged parameters.
    config.train.log_every = 50  # Steps.
    config.train.eval_every = 3770
    config.train.checkpoint_every = 1000

    config.optim = ConfigDict()
    config.optim.lr = 5e-5
    config.optim.schedule = "poly"  # Or "cosine", "step", "constant".
    config.optim.power = 0.9
    config.optim.end_lr = 0.0
    config.optim.warmup_steps = 0
    config.optim.decay_steps = 0  # 0: this share of all steps.
    config.optim.decay_share = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 0.0  # 0: off.
    config.optim.groups = GROUPS

    config.eval = ConfigDict()
    config.eval.batch_size = 32
    config.eval.protocol = "original"  # Score at the image's own size; "input": at image_size.
    config.eval.select_by = "mean"  # The best checkpoint, by mIoU (gIoU); "overall": oIoU (cIoU).
    config.eval.threshold = 0.5
    # A prediction of fewer pixels is taken as "there is none"; gRefCOCO's authors use 50.
    config.eval.no_target_area = 50 if dataset == "grefcoco" else 0
    config.eval.examples = 6  # Pictures of each case (best, worst, middle) per split.
    config.eval.limit_in_training = 0  # Sentences per evaluation during training; 0: all.

    # Devices: data x fsdp, -1 for "the rest". Rules: (path regex, axis name or None per dimension).
    # Of other arrays those of so many numbers are split, over fsdp or, if that is 1 and they are
    # the optimiser's moments, over data.
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, rules=(), min_fsdp_size=2**14))
    # A machine without accelerators counts as so many devices: two small programs keep two cores
    # busier than one program with two threads does.
    config.mesh.cpu_devices = 2

    # Where parameters start; empty: from scratch. A run or a released model; encoders, by a file or
    # a Hugging Face name.
    config.init = ConfigDict(dict(checkpoint="", swin="", resnet="", darknet="", bert="", clip=""))
    return config


def use_clip(config: ConfigDict, words: set[str]) -> None:
    """Puts CLIP's ResNet-101 and its text transformer in the place of Swin and BERT."""
    if "swin_small" in words:
        raise ValueError(f"config variant word 'swin_small': {config.model.name} has no Swin")
    del config.model.swin, config.model.bert
    config.model.vision = ConfigDict(
        dict(width=64, depths=(3, 4, 23, 3), embed_dim=512, pool=True, pool_grid=7)
    )
    config.model.vision.update(frozen_stats=False, positions=False, remat=False)
    config.model.text = ConfigDict(dict(hidden=512, layers=12, heads=8, embed_dim=512))
    config.model.text.vocab_size = 0  # 0: the tokenizer's.
    config.model.text.update(max_positions=77, remat=False)
    if config.data.tokenizer == "bert-base-uncased":
        config.data.tokenizer = "openai/clip-vit-base-patch32"


def is_small(words: set[str]) -> bool:
    """Whether `words` ask for a model that trains from scratch on a laptop."""
    return "small" in words or words & set(DATASETS) <= {"shapes"}


def make_small(config: ConfigDict) -> None:
    """Makes a recipe one for a small model from scratch: docs/training.md says why it differs."""
    embedded = config.data.dataset == "shapes"
    config.data.sampling = "sentence"
    config.data.image_size = 80 if embedded else 192
    if "swin" in config.model:
        config.model.swin.update(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
        config.model.swin.update(window=5 if embedded else 6, drop_path=0.0, positions=True)
    if "bert" in config.model:
        config.model.bert.update(hidden=128, layers=2, heads=4, intermediate=256, dropout=0.0)
        config.model.bert.max_positions = 64
    if "vision" in config.model:
        config.model.vision.update(width=16, depths=(1, 1, 2, 1), embed_dim=128, positions=True)
        config.model.vision.pool_grid = config.data.image_size // 32
        config.model.text.update(hidden=128, layers=2, heads=4, embed_dim=128)
    config.optim.update(lr=1e-3, warmup_steps=100, clip_norm=1.0, b2=0.95)
    config.eval.select_by = "mean"
    config.optim.groups = GROUPS  # Nothing is pretrained, so nothing stays frozen.
    config.train.update(batch_size=16, log_every=20)
    if embedded:
        config.data.max_tokens = 16
        config.data.shapes_scenes.update(train=6000, val=100, testA=60, testB=60)
        config.train.update(steps=3750, eval_every=1250, checkpoint_every=625)
        # Unsure between a few objects, a model this small shares its belief among them.
        config.eval.update(batch_size=30, limit_in_training=300, threshold=0.2)
