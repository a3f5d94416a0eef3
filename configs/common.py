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
}


def parse_variant(variant: str, known: tuple[str, ...]) -> set[str]:
    """The words of a comma-separated variant, each checked against the datasets and `known`."""
    words = {word.strip() for word in (variant or "").split(",") if word.strip()}
    choices = (*DATASETS, *known)
    for word in sorted(words):
        if word not in choices:
            close = difflib.get_close_matches(word, choices, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown config variant {word!r}{hint} (known: {', '.join(choices)})")
    if len(words & set(DATASETS)) > 1:
        raise ValueError(f"config variant {variant!r} names more than one dataset")
    return words


def get_common(words: set[str]) -> ConfigDict:
    """Defaults of every section but `model`, with the dataset that `words` names (or shapes)."""
    (dataset,) = words & set(DATASETS) or {"shapes"}
    embedded = dataset == "shapes"
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict(DATASETS[dataset])
    config.data.root = "data"  # Directory with images/ and the dataset's own folder.
    config.data.train_split = "train"
    config.data.select_split = "val"  # The best checkpoint is chosen on it.
    config.data.eval_splits = DATASETS[dataset]["eval_splits"]
    config.data.image_size = 480
    config.data.max_tokens = 20
    # "shapes" (its grammar's own words), a tokenizer file or directory, or a Hugging Face name.
    config.data.tokenizer = "shapes" if embedded else "bert-base-uncased"
    config.data.sampling = "sentence"  # One sentence per sample; "ref": a random one per ref.
    config.data.workers = 0  # Processes that load batches; 0: threads of this one.
    config.data.threads = 2
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
    config.optim.schedule = "poly"  # Or "cosine", "constant".
    config.optim.power = 0.9
    config.optim.end_lr = 0.0
    config.optim.warmup_steps = 0
    config.optim.decay_steps = 0  # 0: until the last step.
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 0.0  # 0: off.
    # (path regex, learning-rate factor, weight-decay factor): the first that is found wins.
    config.optim.groups = ((r"(scale|bias|bias_table)$", 1.0, 0.0), (r"", 1.0, 1.0))

    config.eval = ConfigDict()
    config.eval.batch_size = 32
    config.eval.protocol = "original"  # Score at the image's own size; "input": at image_size.
    config.eval.threshold = 0.5
    config.eval.examples = 6  # Pictures of each case (best, worst, middle) per split.
    config.eval.limit_in_training = 0  # Sentences per evaluation during training; 0: all.

    # Devices: data x fsdp, -1 for "the rest". Rules: (path regex, axis name or None per dimension).
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, rules=(), min_fsdp_size=2**14))
    # A machine without accelerators counts as so many devices: two small programs keep two cores
    # busier than one program with two threads does.
    config.mesh.cpu_devices = 2

    # Where parameters start; empty: from scratch. A run's workdir, and Hugging Face safetensors.
    config.init = ConfigDict(dict(checkpoint="", swin="", bert=""))
    return config
