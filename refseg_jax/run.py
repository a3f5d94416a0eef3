"""A run from start to end: its directory, training, evaluation, report, and the summary."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from refseg_jax import bounds, checkpoint, data, details, evaluate, processes
from refseg_jax.data.files import locked
from refseg_jax.data.pipeline import CannotShuffle
from refseg_jax.data.records import Source
from refseg_jax.data.sets import MERGED, set_name
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError, file_errors, tell
from refseg_jax.logging import read_metrics
from refseg_jax.predict import load_run, make_predict_step
from refseg_jax.report import write_report
from refseg_jax.sharding import batch_sharding, make_mesh, replicated, to_device
from refseg_jax.stopping import ending_on_signals
from refseg_jax.train import evaluation_settings, train

# What may change when a run is resumed: nothing that its parameters depend on, unless, as other
# texts are, it is found out by itself (`checkpoint.check_data`).
# Nor how a checkpoint is scored, or the best would be found among scores of different kinds.
FREE_FIELDS = (
    "eval.batch_size", "eval.examples", "mesh.", "train.log_every", "train.eval_every",
    "train.checkpoint_every",
    "data.root", "data.workers", "data.threads", "data.eval_splits", "data.text_field",
    "data.merged",
    "model.swin.cudnn",
)  # fmt: skip

# And what no score depends on, and what is scored. The tokenizer is the run's own.
FREE_IN_EVALUATION = (
    "eval.", "train.", "optim.", "init.", "seed", "data.sampling", "data.train_split",
    "data.dataset", "data.split_by", "data.merged", "data.select_split",
    "data.shapes_scenes.train", "data.tokenizer", "model.draws", "model.shut_gates",
)  # fmt: skip

# What may differ between the processes of a run: where their machine has the data, and how it is
# read. What the tokenizer does is compared.
OWN_FIELDS = ("data.root", "data.tokenizer", "data.workers", "data.threads")

# Of how many examples of each case the report shows how the mask came about.
EXPLAINED = {"best": 2, "middle": 2}


def run(
    config: ml_collections.ConfigDict, workdir: str, mode: str, begun: float | None = None
) -> dict[str, Any]:
    """Trains and evaluates in `workdir` ("both"), or does one of them. Returns the summary.

    `begun` is the time at which the program started, by default now.

    Raises:
      UserError: see `bounds.check`, `train` and `evaluate_run`.
    """
    bounds.check(config)
    with file_errors(workdir):
        return {**_run(config, workdir, mode, begun), "workdir": workdir}


def _run(
    config: ml_collections.ConfigDict, workdir: str, mode: str, begun: float | None
) -> dict[str, Any]:
    if mode == "evaluate":
        checkpoint.check_trained(workdir)  # Else `prepare` would make it a run of this config.
        if "://" not in workdir and not os.access(workdir, os.W_OK):
            raise UserError(
                f"{workdir} cannot be written to, and the scores are to be written there: copy the "
                "run to where they can"
            )
        tokenizer = prepare(
            config, workdir, FREE_FIELDS + FREE_IN_EVALUATION, "the config that it was trained with"
        )
        trained = checkpoint.read_config(workdir)
        for section in ("train", "optim", "init"):  # The report shows what the run was made with.
            config[section] = trained[section]
        config.data.tokenizer = trained.data.tokenizer
        with ending_on_signals():
            _check_alike(config, tokenizer, workdir, mode)
        return _evaluate(config, tokenizer, workdir)
    with _sole(workdir):
        tokenizer = prepare(config, workdir)
        _check_alike(config, tokenizer, workdir, mode)
        if mode == "train":
            return train(config, tokenizer, workdir, begun)
        # All at once: annotations take seconds to read, and a wrong name is known before training.
        splits = config.data.train_split, config.data.select_split, *config.data.eval_splits
        sources = data.open_sources(config.data, splits)
        summary = train(config, tokenizer, workdir, begun, sources)
        return summary | _evaluate(config, tokenizer, workdir, sources)


def _check_alike(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, workdir: str, mode: str
) -> None:
    """Raises a UserError where the processes are not parts of one run."""
    processes.check_devices()
    if not processes.sees_the_same(workdir):
        raise UserError(
            f"{workdir} is not the same folder for all processes: it must be on storage that all "
            "of them share"
        )
    given = {"mode": mode, "tokenizer": tokenizer.digest(), **checkpoint.fields(config)}
    given = {name: value for name, value in given.items() if name not in OWN_FIELDS}
    processes.check_same("the config", lambda: given)


def _evaluate(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    workdir: str,
    sources: Mapping[str, Source] | None = None,
) -> dict[str, Any]:
    """`evaluate_run`; a signal to any process ends all until the first is done with the report."""
    with ending_on_signals():
        summary = evaluate_run(config, tokenizer, workdir, sources)
        processes.wait_for_first()
    return summary


@contextlib.contextmanager
def _sole(workdir: str) -> Iterator[None]:
    """Makes the folder `workdir`, and keeps another run out of it where that can be done."""
    if "://" in workdir or jax.process_index() > 0:
        yield
        return
    try:
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    with locked(f"{workdir}/.lock", "run"):
        yield


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str,
    free: tuple[str, ...] = FREE_FIELDS,
    otherwise: str = "another --workdir, or the same config to resume",
) -> Tokenizer:
    """Makes `workdir` the directory of this run, or checks that it already is.

    Fields that begin with one of `free` may differ; `otherwise` is what to give if others do.

    Fills in what depends on the tokeniser, and writes it and the config beside the checkpoints.

    Raises:
      UserError: `workdir` holds a run with another config (the fields are listed).
    """
    root = epath.Path(workdir)
    # Without a checkpoint there is nothing that another config could spoil: a first attempt failed.
    started = bool(checkpoint.saved_steps(workdir))
    if started and not (root / checkpoint.CONFIG_FILE).exists():
        raise UserError(
            f"{workdir} has checkpoints, but no {checkpoint.CONFIG_FILE} that says what they are "
            "of: put it back, or give another --workdir"
        )
    tokenizer_path = root / checkpoint.TOKENIZER_FILE
    tokenizer = fit_tokenizer(config, str(tokenizer_path) if started else config.data.tokenizer)
    if started:
        changed = checkpoint.changed_fields(checkpoint.read_config(workdir), config, free)
        if changed:
            raise UserError(
                f"{workdir} holds a run with another config ({', '.join(changed[:8])}): "
                f"give {otherwise}"
                + (" (--mode evaluate takes other eval. fields)" if "eval." in str(changed) else "")
            )
    elif jax.process_index() == 0:
        _check_ours(root, tokenizer)
        if "://" not in workdir:  # A bucket has no folders.
            root.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_path)
        checkpoint.write_config(workdir, config)  # Last: its presence says that all is there.
    return tokenizer


def _check_ours(root: epath.Path, tokenizer: Tokenizer) -> None:
    """Raises a UserError where what a run writes first would replace what is no run's."""
    if (root / checkpoint.CONFIG_FILE).exists():
        try:
            checkpoint.read_config(str(root))
        except UserError as error:
            raise UserError(f"{error}: give another --workdir") from None
    elif (path := root / checkpoint.TOKENIZER_FILE).exists() and (
        path.read_text(encoding="utf-8") != tokenizer.text()
    ):
        raise UserError(
            f"{path} is of no run, or of one that never began: delete it, or give another --workdir"
        )


def fit_tokenizer(config: ml_collections.ConfigDict, source: str) -> Tokenizer:
    """The tokeniser that `source` names; fills in what of the config depends on it.

    Raises:
      UserError: there is none, it has more entries than the config's vocabulary, or a text may
        have more tokens than the encoder has positions.
    """
    tokenizer = data.load_tokenizer(source)
    name = "bert" if "bert" in config.model else "text"
    text_encoder = config.model[name]
    if text_encoder.vocab_size == 0:
        text_encoder.vocab_size = tokenizer.vocab_size
    if config.data.max_tokens > text_encoder.max_positions:
        raise UserError(
            f"config.data.max_tokens={config.data.max_tokens} are more than "
            f"config.model.{name}.max_positions={text_encoder.max_positions}"
        )
    if tokenizer.vocab_size > text_encoder.vocab_size:
        raise UserError(
            f"config.model.{name}.vocab_size={text_encoder.vocab_size} is too small for the "
            f"tokenizer {config.data.tokenizer}, which has {tokenizer.vocab_size} entries"
        )
    return tokenizer


def other_data(
    trained: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: str
) -> str:
    """What files about `config`'s data are named with in the run of `trained`: of its own, "".

    Else "-" and the dataset, or, where both are called the same ("prepared"), its folder. Data
    that was moved is still the run's own.
    """
    own, scored = (set_name(c.data.dataset, c.data.split_by) for c in (trained, config))
    if scored != own:
        return f"-{scored}"
    known = None if scored == "shapes" else checkpoint.trained_on(workdir)
    if known is None:
        of, now = (list(c.data.get("merged", ())) for c in (trained, config))
        return "" if scored != MERGED or of == now else f"-{scored}"
    was = known.pop("root", str(trained.data.root).rstrip("/"))
    root = data.absolute_root(config.data)
    if root == was:
        return ""
    try:
        found = data.identity(data.open_source(config.data, trained.data.train_split))
    except UserError:  # There is nothing to train on.
        found = None
    return "" if found == known else f"-{pathlib.PurePath(root).name}"


def evaluate_run(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    workdir: str,
    sources: Mapping[str, Source] | None = None,
) -> dict[str, Any]:
    """Scores the best checkpoint on every evaluation split; writes the table, JSON and report.

    Of other data than the run's own the files have its name in theirs (`other_data`). `sources`
    are the data's splits, if they are open already.

    Returns what the summary says of it: best_step, {split}/mIoU and {split}/oIoU of each split,
    {split}/mIoU_shuffled of select_split and val (the control: the same model, each image given
    another one's expression; left out where one ref has more than half of them), report. Where
    expressions may fit nothing it is gIoU, cIoU, N-acc and T-acc.

    Raises:
      UserError: there is no checkpoint, it does not fit, or a split is missing.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    while True:
        step = checkpoint.best_step(workdir)
        trained, model, variables = load_run(workdir, replicated(mesh), config)
        # Training elsewhere may have found a better one between the two.
        if jax.process_count() > 1 or checkpoint.best_step(workdir) == step:
            break
    of_which = other_data(trained, config, workdir)
    predict_fn = make_predict_step(model, batch_sharding(mesh))

    select = config.data.select_split
    splits = dict.fromkeys((select, *config.data.eval_splits))
    opened = sources or data.open_sources(config.data, splits)
    sources = {split: opened[split] for split in splits}
    for split, source in sources.items():
        processes.check_same(f"the split {split}", lambda source=source: data.identity(source))

    def sweep(split, **kwargs):
        return evaluate.evaluate(
            predict_fn,
            variables,
            sources[split],
            tokenizer,
            put=lambda batch: to_device(batch, mesh),
            **evaluation_settings(config, model, mesh),
            **kwargs,
        )

    results = {split: sweep(split, keep_examples=config.eval.examples) for split in sources}
    controls = {}
    for split in dict.fromkeys(name for name in (select, "val") if name in sources):
        try:
            controls[split] = sweep(split, shuffle_text=True)
        except CannotShuffle as error:
            if jax.process_index() == 0:
                print(f"{split}: no control, {error}", file=sys.stderr)
    shuffled = {f"{split} (shuffled expressions)": control for split, control in controls.items()}
    everything = {**results, **shuffled}
    report = epath.Path(workdir) / f"report{of_which}.html"
    if jax.process_index() == 0:
        results_path = epath.Path(workdir) / f"results{of_which}.json"
        evaluate.write_json(results_path, everything, step=step)
        write_report(
            report,
            title=f"{config.model.name} on {config.data.dataset}, step {step}",
            config_text=str(config),
            results=everything,
            curves=read_metrics(workdir),
            explained=details.explain(
                model,
                variables,
                tokenizer,
                [
                    example
                    for case, count in EXPLAINED.items()
                    for example in [e for e in results[select].examples if e.case == case][:count]
                ],
                config.data.image_size,
                config.data.max_tokens,
                config.data.letterbox,
            ),
        )
        tell(evaluate.format_table(everything))
    summary = {"best_step": step}
    for split, result in results.items():
        summary |= {f"{split}/{name}": round(v, 4) for name, v in result.headline.items()}
    for split, control in controls.items():
        summary[f"{split}/{control.score_name}_shuffled"] = round(control.score, 4)
    return {**summary, "report": str(report)}
