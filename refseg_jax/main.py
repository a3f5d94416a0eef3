"""The front door: `python -m refseg_jax.main --config configs/alignformer.py`."""

import json
import os
import pathlib
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from refseg_jax.errors import UserError

config_flags.DEFINE_config_file("config", None, "A file of configs/, with `:variant` if wanted.")
flags.DEFINE_string("workdir", None, "The run's directory (default: runs/ and the config's name).")
flags.DEFINE_enum(
    "mode", "both", ["train", "evaluate", "both"], "Train, evaluate the best checkpoint, or both."
)


def fail(message: str) -> None:
    """One line on stderr, and exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
    """Flags from the command line; a bad flag, config or variant is one clear line."""
    try:
        remaining = flags.FLAGS(argv)
        if flags.FLAGS.config is None:
            raise UserError("--config is missing, e.g. --config configs/alignformer.py")
        flags.FLAGS.config.lock()  # A config that could not be loaded says so at its first use.
        if len(remaining) > 1:
            raise UserError(f"unexpected argument {remaining[1]!r}")
        return remaining
    except (flags.Error, UserError, ValueError, AttributeError, KeyError, OSError, TypeError) as e:
        # Where a config file itself raises, the text is a traceback that ends with the reason.
        text = str(e)
        fail(text.strip().splitlines()[-1] if "Traceback" in text else text)


def main(_: list[str]) -> None:
    begun = time.time()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
    option = "--xla_force_host_platform_device_count"
    if option not in os.environ.get("XLA_FLAGS", ""):
        count = min(flags.FLAGS.config.mesh.cpu_devices, os.cpu_count())
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {option}={count}"
    from refseg_jax import run  # Late, so that --help and a typo answer at once.

    # configs/alignformer.py:refcoco,small -> runs/alignformer_refcoco_small
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    default = "_".join([f"runs/{pathlib.Path(path).stem}", *filter(None, variant.split(","))])
    try:
        summary = run.run(flags.FLAGS.config, flags.FLAGS.workdir or default, flags.FLAGS.mode)
    except UserError as e:
        fail(str(e))
    summary["seconds"] = round(time.time() - begun, 1)
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
