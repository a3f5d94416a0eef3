"""The smallest config that still has every part: for tests of training and the command line."""

import ml_collections

from configs import alignformer

# As flags, for tests that start a process; `config()` sets the same. What leaves them as they are
# finds the step compiled, if another has taken one.
FIELDS = {
    "model.swin.embed_dim": 8,
    "model.swin.depths": (1, 1, 1, 1),
    "model.swin.num_heads": (1, 1, 2, 2),
    "model.bert.hidden": 16,
    "model.bert.layers": 1,
    "model.bert.heads": 2,
    "model.bert.intermediate": 16,
    "model.bert.dropout": 0.1,
    "model.dim": 16,
    "model.heads": 2,
    "model.points": 2,
    "model.pixel_layers": 1,
    "model.pixel_ffn": 16,
    "model.decoder_layers": 1,
    "model.decoder_ffn": 16,
    "model.cmic_samples": 4,
    "data.image_size": 64,
    "data.shapes_scenes.train": 40,
    "data.shapes_scenes.val": 2,
    "data.shapes_scenes.testA": 1,
    "data.shapes_scenes.testB": 1,
    "train.batch_size": 8,
    "train.steps": 10,
    "train.log_every": 1,
    "train.eval_every": 8,
    "train.checkpoint_every": 2,
    "train.ema_decay": 0.9,
    # A recipe's: at a rate from scratch Adam's first steps, which divide by gradients near 0, blow
    # rounding up to 1e-4 within five steps.
    "optim.lr": 5e-5,
    "optim.warmup_steps": 0,
    "eval.batch_size": 8,
    "eval.examples": 1,
}


def config(variant: str = "", **changes) -> ml_collections.ConfigDict:
    """The tiny config of a variant; `changes` are dotted names with "." written "__"."""
    result = alignformer.get_config(variant)
    result.mesh.data = 1
    fields = {**FIELDS, **{name.replace("__", "."): value for name, value in changes.items()}}
    for name, value in fields.items():
        *sections, field = name.split(".")
        node = result
        for part in sections:
            node = node[part]
        node[field] = value
    return result


def flags(**changes) -> list[str]:
    """The same as command-line flags."""
    fields = {**FIELDS, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--config.{name}={value}" for name, value in fields.items()]
