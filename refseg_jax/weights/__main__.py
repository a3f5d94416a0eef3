"""A released checkpoint -> the directory of a run, which `predict` and evaluation use:

python -m refseg_jax.weights --config configs/crossvlt.py:refcoco --checkpoint FILE --workdir W
"""

import collections
import json
import pathlib
import re
import tempfile
from typing import Any

import ml_collections
from absl import app, flags, logging

from refseg_jax.errors import UserError, command
from refseg_jax.main import parse_flags

flags.DEFINE_string("checkpoint", None, "The released checkpoint: a file, or its directory.")
flags.DEFINE_string(
    "text_checkpoint", None, "The text encoder's, where it is not in --checkpoint (LAVT's lavt)."
)
flags.declare_key_flag("config")
flags.declare_key_flag("workdir")


def convert_run(
    config: ml_collections.ConfigDict, source: str, text_source: str | None, workdir: str
) -> dict[str, Any]:
    """Makes `workdir` the directory of a run whose best checkpoint is the released one.

    Returns what to print: parameters (their number), arrays, origin, dropped (keys left out on
    purpose, numbers as "*", and how many there are of each), beside (what else the file holds).
    `workdir` appears whole at the end, or not at all.

    Raises:
      UserError: `workdir` is in use, the model has no released checkpoints, or a checkpoint is
        missing, damaged, or does not fit the config.
    """
    import jax  # Late, so that --help and a typo answer at once.

    from refseg_jax import bounds, checkpoint, models, run, train_state
    from refseg_jax.weights.files import read_checkpoint
    from refseg_jax.weights.initial import origin
    from refseg_jax.weights.released import TABLES, with_text
    from refseg_jax.weights.tables import convert_variables

    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: convert to a folder of this machine, then copy it")
    root = pathlib.Path(workdir)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{workdir} is not empty: give another --workdir")
    if config.model.name not in TABLES:
        raise UserError(
            f"there are no released checkpoints of {config.model.name} that could be converted "
            f"(of {', '.join(TABLES)} there are)"
        )
    bounds.check(config)
    read = read_checkpoint(source)  # Before a tokenizer is asked for, which may take long.
    run.fit_tokenizer(config, config.data.tokenizer)
    arrays = read.arrays
    if text_source:
        arrays = with_text(config.model.name, arrays, read_checkpoint(text_source).arrays)
    model = models.build(config.model)
    variables = jax.eval_shape(
        lambda: train_state.init_variables(
            model, jax.random.key(0), config.data.image_size, config.data.max_tokens
        )
    )
    try:
        loaded = convert_variables(arrays, variables, TABLES[config.model.name])
    except UserError as error:
        raise UserError(f"{read.path}: {error}") from error

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
            whole = pathlib.Path(scratch) / root.name
            run.prepare(config, str(whole))
            with checkpoint.Checkpoints(str(whole)) as checkpoints:
                # Step 0, and below any score that an evaluation could give.
                checkpoints.save_best(0, loaded.tree, -1.0)
            whole.replace(root)
    except OSError as error:
        raise UserError(f"cannot write --workdir {workdir}: {error}") from error
    kinds = collections.Counter(re.sub(r"\d+", "*", key) for key in loaded.dropped)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(loaded.tree["params"])),
        "arrays": len(jax.tree.leaves(loaded.tree)),
        "origin": f"{read.path} ({origin(loaded)})",
        "dropped": dict(kinds),
        "beside": read.beside,
        "workdir": workdir,
    }


@command
def main(_: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
    values = flags.FLAGS
    for name in ("checkpoint", "workdir"):
        if not values[name].value:
            raise UserError(f"--{name} is missing")
    done = convert_run(values.config, values.checkpoint, values.text_checkpoint, values.workdir)
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
