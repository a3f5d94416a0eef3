"""The front door: `python -m refseg_jax.main --config configs/alignformer.py`."""

import gc
import json
import os
import pathlib
import re
import signal
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from refseg_jax.errors import INTERRUPTED, TERMINATED, UserError, bucket_errors, fail, say, tell

config_flags.DEFINE_config_file("config", None, "A file of configs/, with `:variant` if wanted.")
flags.DEFINE_string("workdir", None, "The run's directory (default: runs/ and the config's name).")
flags.DEFINE_enum(
    "mode", "both", ["train", "evaluate", "both"], "Train, evaluate the best checkpoint, or both."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run of several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def parse_flags(argv: list[str]) -> list[str]:
    """Flags from the command line; a bad flag, config or variant is one clear line."""
    # What a config imports lies beside this package, wherever the command is given.
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
    try:
        # No shell puts a home directory behind a "=".
        argv = [
            re.sub(r"(?<==)~(?=/|$)", lambda _: os.path.expanduser("~"), a, count=1) for a in argv
        ]
        remaining = flags.FLAGS(argv)
        if flags.FLAGS.config is None:
            raise UserError("--config is missing, e.g. --config configs/alignformer.py")
        file = flags.FLAGS["config"].config_filename.partition(":")[0]
        if not os.path.exists(file):
            ours = pathlib.Path(__file__).resolve().parents[1] / "configs/alignformer.py"
            raise UserError(f"there is no config file {file}; one is {ours}")
        flags.FLAGS.config.lock()  # A config that could not be loaded says so at its first use.
        given = config_flags.get_override_values(flags.FLAGS["config"])
        epochs_alone = "train.epochs" in given and "train.steps" not in given
        if epochs_alone and (steps := flags.FLAGS.config.train.steps):
            raise UserError(
                f"--config.train.epochs={given['train.epochs']} would change nothing, as this "
                f"config has train.steps={steps}: give --config.train.steps=0 besides"
            )
        if len(remaining) > 1:
            raise UserError(f"unexpected argument {remaining[1]!r}")
        check_processes(*process_flags())
        return remaining
    except (SystemExit, BrokenPipeError):  # After --help, which to absl is a failure.
        tell()
        sys.exit(0)
    except (flags.Error, UserError, ValueError, AttributeError, KeyError, OSError, TypeError,
            ImportError, SyntaxError) as e:  # fmt: skip
        missing = e.args[0] if e.args and isinstance(e.args[0], KeyError) else e
        if isinstance(missing, KeyError):
            fail(f"the config has no field {missing.args[0]}")
        # Where a config file itself raises, the text is a traceback that ends with the reason.
        text = str(e)
        fail(text.strip().splitlines()[-1] if "Traceback" in text else text)


def process_flags() -> tuple[str | None, int | None, int | None]:
    """--coordinator, --num_processes and --process_id."""
    return flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id


def check_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises a UserError where the three flags do not name one process of a run."""
    given = [x is not None for x in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num_processes and --process_id go together: give all")
    if not all(given):
        return
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, e.g. 10.0.0.1:8476")
    if index >= count:
        raise UserError(f"--process_id={index} is not one of 0 to {count - 1} (--num_processes)")


def cpu_devices() -> int:
    """Devices that this process makes of the CPU: its share of the machine's.

    Processes with a coordinator on this machine are all on it.
    """
    coordinator, count, _ = process_flags()
    here = (coordinator or "").rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
    devices = min(flags.FLAGS.config.mesh.cpu_devices, os.cpu_count())
    return max(1, devices // (count if here else 1))


def end_on_signals() -> None:
    """Ends this process at once on signals, until something is there that does better.

    Python would heed Ctrl-C only once it is out of libraries, such as one that waits for the other
    processes. And a container's first process the kernel ends only if it asks for it.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Else it is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(_: list[str]) -> None:
    begun = time.time()
    end_on_signals()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
    option = "--xla_force_host_platform_device_count"
    if option not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {option}={cpu_devices()}"
    # To trace a model makes millions of objects; to look for garbage after every 700 of them, as
    # Python 3.11 does, took an eighth of that time.
    gc.set_threshold(50_000)
    # Late, so that --help and a typo answer at once.
    import jax

    from refseg_jax import processes, run
    from refseg_jax.stopping import Stopped

    # configs/alignformer.py:refcoco,small -> runs/alignformer_refcoco_small
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    default = "_".join([f"runs/{pathlib.Path(path).stem}", *filter(None, variant.split(","))])
    workdir = flags.FLAGS.workdir or default
    processes.use_compile_cache()
    peers = None
    try:
        peers = processes.join(*process_flags())
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.default_backend() == "cpu":
            processes.keep_memory()
        with bucket_errors():
            summary = run.run(flags.FLAGS.config, workdir, flags.FLAGS.mode, begun)
        gc.collect()  # Lets go of memory shared with input workers: Python would call it leaked.
        if jax.process_index() == 0:
            summary["seconds"] = round(time.time() - begun, 1)
            tell(json.dumps(summary))
    except UserError as e:
        traceback.clear_frames(e.__traceback__)
        gc.collect()  # As above.
        if peers and not isinstance(e, Stopped):  # That is no fault, and all stop at one step.
            peers.fail(str(e), e.status)
        fail(str(e), e.status)
    except (Exception, KeyboardInterrupt) as e:
        if isinstance(e, KeyboardInterrupt):
            traceback.clear_frames(e.__traceback__)
        if peers:
            if not peers.ending:  # Else it is what the end of another did to this one.
                traceback.print_exc()
            peers.fail(f"{type(e).__name__}: {e}", status=1)
        if isinstance(e, KeyboardInterrupt):
            say("stopped")
            sys.exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
