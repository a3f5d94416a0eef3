"""Checkpoints: the only file that imports Orbax.

A run's directory holds `checkpoints/last` (the whole train state, to resume) and
`checkpoints/best` (variables of the best evaluation so far, to predict and evaluate), and beside
them `config.json` and `tokenizer.json`, so the directory is all that inference needs. `data.json`
says what the run was trained on.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import fsspec.config
import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath

from refseg_jax import processes
from refseg_jax.data.files import write_whole
from refseg_jax.errors import UserError
from refseg_jax.sharding import path_name

# What gcsfs has listed once of a bucket it would believe for good, whatever others write there.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DATA_FILE = "data.json"


class Checkpoints:
    """The `last` and `best` checkpoints of one run. Use as a context manager: leaving waits."""

    def __init__(self, workdir: str):
        self.last = _manager(workdir, "last", max_to_keep=1)
        self.best = _manager(workdir, "best", max_to_keep=1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc) -> None:
        with contextlib.ExitStack() as stack:  # Both, whatever happens to one.
            for manager in (self.best, self.last):
                stack.enter_context(_saving(manager))
                stack.callback(manager.close)

    def save_last(self, state: Any) -> None:
        """Saves the train state under its step (in the background)."""
        step = int(state.step)
        if step not in self.last.all_steps():
            with _saving(self.last):
                self.last.save(step, args=ocp.args.StandardSave(state))

    def restore_last(self, abstract: Any) -> Any | None:
        """The last train state, laid out as `abstract` (shapes with shardings); None if none."""
        return _restore(self.last, abstract)

    def best_score(self) -> tuple[int, float] | None:
        """(step, score) of the best checkpoint, or None."""
        step = self.best.best_step()
        return None if step is None else (step, float(self.best.metrics(step)["score"]))

    def save_best(self, step: int, variables: Any, score: float) -> bool:
        """Saves `variables` if `score` beats every earlier one; says whether it did."""
        held = self.best_score()
        if held and (score <= held[1] or step == held[0]):
            return False
        # A run resumed from before its best comes by earlier steps again, perhaps with a better
        # score: Orbax saves those by force only.
        args, metrics = ocp.args.StandardSave(variables), {"score": score}
        with _saving(self.last):
            self.last.wait_until_finished()  # The processes meet for one at a time.
        with _saving(self.best):
            self.best.save(step, args=args, metrics=metrics, force=True)
            self.best.wait_until_finished()
        return True


class _Manager(ocp.CheckpointManager):
    """Orbax's, for processes that stop and fail as `stopping` and `processes` have it."""

    def reached_preemption(self, step: int) -> bool:
        """Not asked here: JAX takes who asks to be at that step, and the loop counts otherwise."""
        return False

    def _wait_for_checkpointers(self):
        # In a thread of a process that would now wait for the others, and they for it.
        try:
            super()._wait_for_checkpointers()
        except Exception as e:
            processes.report(_not_saved(self, e))
            raise


def _manager(workdir: str, name: str, **options: Any) -> ocp.CheckpointManager:
    root = epath.Path(workdir)
    if "://" not in str(workdir):
        root = root.absolute()
    if name == "best":
        options |= dict(best_fn=lambda metrics: metrics["score"], best_mode="max")
    return _Manager(
        root / "checkpoints" / name,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers=ocp.StandardCheckpointHandler(),
    )


@contextlib.contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what a disk that is full, or may not be written to, raises into a UserError."""
    try:
        yield
    except (OSError, ValueError) as e:
        if isinstance(e, ValueError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(_not_saved(manager, e)) from e


def _not_saved(manager: ocp.CheckpointManager, error: Exception) -> str:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"cannot save a checkpoint to {manager.directory}: {reason} (those that were saved before "
        "are whole: mend it and run the same command again)"
    )


def _restore(manager: ocp.CheckpointManager, abstract: Any, step: int | None = None) -> Any | None:
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    where = f"{manager.directory}/{step}"
    try:
        saved = manager.item_metadata(step)
        problems = _differences(saved, abstract)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"checkpoint {where} cannot be read: {e}") from e
    if problems:
        raise UserError(
            f"checkpoint {where} does not fit this model ({len(problems)} differences, e.g. "
            f"{'; '.join(problems[:3])}): use the config it was trained with, or another workdir"
        )
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as e:  # Orbax raises almost anything of a file that is cut off.
        reason = str(e.__cause__ or e).splitlines()[0]
        mend = "training then starts again"
        if manager.directory.name == "best":
            mend = "training then makes another" if step else "convert the published one again"
        raise UserError(
            f"checkpoint {where} is damaged, delete it: {mend} ({type(e).__name__}: {reason:.300})"
        ) from e


def _differences(saved: Any, abstract: Any) -> list[str]:
    """Paths and shapes in which a stored tree (Orbax metadata) and the wanted one differ."""

    def shape(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Keys are stored as their words.
        return getattr(leaf, "shape", None)

    def shapes(tree):
        return {path_name(p): shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    stored = shapes(getattr(saved, "tree", saved))
    wanted = shapes(abstract)
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} is not in the model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {stored[name]}, the model's is {wanted[name]}"
        for name in wanted.keys() & stored.keys()
        if stored[name] is not None and tuple(stored[name]) != tuple(wanted[name])
    ]
    return sorted(problems)


def write_config(workdir: str, config: ml_collections.ConfigDict) -> None:
    text = config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
    write_whole(epath.Path(workdir) / CONFIG_FILE, text)


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """The config a run was started with.

    Raises:
      UserError: `workdir` is not the directory of a run.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{workdir} is not the directory of a run: it has no {CONFIG_FILE}"
        ) from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None
    sections = ("data", "eval", "model", "optim", "train")
    if not isinstance(values, dict) or not all(isinstance(values.get(s), dict) for s in sections):
        raise UserError(f"{workdir} is not the directory of a run: its {CONFIG_FILE} is no run's")
    return ml_collections.ConfigDict(values)


def fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All fields of a config by their names, as JSON has them."""

    def flatten(tree, prefix=""):
        if not isinstance(tree, dict):
            return {prefix[:-1]: tree}
        return {
            k: v for key, sub in tree.items() for k, v in flatten(sub, f"{prefix}{key}.").items()
        }

    return flatten(json.loads(config.to_json_best_effort()))


def changed_fields(old: Any, new: Any, free: tuple[str, ...] = ()) -> list[str]:
    """The fields of two configs that differ, as JSON sees them; the model's name first.

    Left out are those that begin with one of `free`.
    """
    old, new = fields(old), fields(new)

    def shown(value: Any) -> Any:
        return "''" if value == "" else value

    return [
        f"{name}: {shown(old.get(name))} there, {shown(new.get(name))} now"
        for name in sorted(old.keys() | new.keys(), key=lambda name: (name != "model.name", name))
        if old.get(name) != new.get(name) and not name.startswith(free)
    ]


def check_data(workdir: str, found: dict[str, Any], resumed: bool) -> None:
    """Writes down what a run is trained on; if `resumed`, compares it.

    `found`: `data.identity`, and "root", where it is.

    The first process does so.

    Raises:
      UserError: the run in `workdir` was trained on something else.
    """
    if jax.process_index() > 0:
        return
    known = trained_on(workdir) if resumed else None
    if known and {**known, "root": None} != {**found, "root": None}:  # It may have been moved.
        were, are = (f"{x['sentences']} sentences of {x['refs']} refs" for x in (known, found))
        raise UserError(
            f"{workdir} holds a run on other training data ({known['dataset']}, {were}; now "
            f"{found['dataset']}, {are}): give another --workdir, or the same data to resume"
        )
    if known != found:
        write_whole(epath.Path(workdir) / DATA_FILE, json.dumps(found) + "\n")


def trained_on(workdir: str) -> dict[str, Any] | None:
    """What `check_data` wrote down in `workdir`; None if it did not, as in earlier versions.

    Raises:
      UserError: the file that says so is damaged.
    """
    path = epath.Path(workdir) / DATA_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as e:
        raise UserError(
            f"{path} is not valid JSON ({e}): delete it, if the data is the same"
        ) from None


def saved_steps(workdir: str, kind: str = "*") -> list[int]:
    """Steps of the run in `workdir` that have a checkpoint, "last" or "best" or of either kind."""
    folders = (epath.Path(workdir) / "checkpoints").glob(f"{kind}/*")
    # Not what a kill left half-written, which in a bucket has its name already.
    whole = ocp.utils.is_checkpoint_finalized
    return [int(folder.name) for folder in folders if folder.name.isdigit() and whole(folder)]


def best_step(workdir: str) -> int:
    """The step of the run's best checkpoint; 0 if there is none."""
    with contextlib.closing(_manager(workdir, "best", create=False)) as best:
        return best.best_step() or 0


def check_trained(workdir: str) -> None:
    """Raises a UserError where `workdir` is no run, or has no best checkpoint yet."""
    read_config(workdir)
    if not saved_steps(workdir, "best"):
        raise UserError(f"{workdir} has no best checkpoint yet: train until the first evaluation")


def load_variables(workdir: str, variables: Any, sharding: jax.sharding.Sharding) -> Any:
    """The best variables of the run in `workdir`, shaped like `variables`, laid out by `sharding`.

    Raises:
      UserError: there are none, or they do not fit.
    """
    check_trained(workdir)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), variables
    )
    while True:
        # It may lie where nothing can be written.
        with contextlib.closing(_manager(workdir, "best", create=False)) as best:
            step = best.best_step()
            try:
                return _restore(best, abstract, step)
            except UserError:
                # Unless training has put a better one into its place meanwhile.
                if jax.process_count() > 1 or best_step(workdir) == (step or 0):
                    raise
