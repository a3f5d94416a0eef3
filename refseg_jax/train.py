"""Training: one pure step, and the loop around it."""

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from refseg_jax import checkpoint, data, evaluate, models
from refseg_jax.data import pipeline
from refseg_jax.data.records import Source
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.data.transforms import normalize_for
from refseg_jax.errors import UserError
from refseg_jax.logging import MetricWriter, Recorder, check_finite, read_metrics
from refseg_jax.optim import frozen_at_random, make_optimizer
from refseg_jax.predict import make_predict_step
from refseg_jax.processes import agree, check_same, meet
from refseg_jax.sharding import (
    batch_sharding,
    gatherer,
    jit_on_mesh,
    make_mesh,
    replicated,
    state_sharding,
    to_device,
)
from refseg_jax.stopping import Stopped, StopRequest
from refseg_jax.train_state import TrainState, init_state, init_variables
from refseg_jax.weights.initial import load_initial


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    gather: Callable[[Any], Any] = lambda params: params,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on a batch (see `data/pipeline.py` for its arrays).

    With `accumulate` = A the B rows are taken in A parts of B/A, whose gradients are averaged:
    the same update, but for what is each part's own (batch statistics, random draws such as
    dropout and CMIC's samples, and the sum of the pixels' weights that LAVT's and CrossVLT's loss
    is divided by), in 1/A of the activation memory.
    `gather` makes of the parameters, as they are stored, what the model is applied to.
    Returns the next state and float32 scalars: loss, grad_norm, and the model's own.
    """
    step_key = jax.random.fold_in(state.key, state.step)
    gathered = gather(state.params)

    def loss_fn(params, model_state, part, key):
        dropout_key, loss_key = jax.random.split(key)
        outputs, updated = model.apply(
            {"params": params, **model_state},
            normalize_for(model, part["image"]),
            part["tokens"],
            part["token_mask"],
            train=True,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )
        loss, scalars = model.loss(outputs, part["mask"], part["valid"], loss_key)
        return loss, (updated, {"loss": loss, **scalars})

    def one_part(model_state, part, key):
        grads, (model_state, scalars) = jax.grad(loss_fn, has_aux=True)(
            gathered, model_state, part, key
        )
        return model_state, (grads, scalars)

    if accumulate == 1:
        model_state, (grads, scalars) = one_part(state.model_state, batch, step_key)
    else:
        # Row i of part a is row i * A + a of the batch, so every device keeps its own rows.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(step_key, accumulate)
        model_state, stacked = jax.lax.scan(
            lambda carry, xs: one_part(carry, *xs), state.model_state, (parts, keys)
        )
        grads, scalars = jax.tree.map(lambda x: x.mean(0), stacked)

    # Without it XLA's CPU compiler fuses the optimiser into the gradients' reductions, which are
    # then computed several times over: the step took 1.6 times as long.
    grads = jax.lax.platform_dependent(
        grads, cpu=jax.lax.optimization_barrier, default=lambda grads: grads
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    scalars["grad_norm"] = optax.global_norm(grads)
    state = state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema
    )
    return state, scalars


def make_train_step(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: Any,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Jitted `train_step` on a mesh: its state laid out by `shardings`, and given up for the next.

    The batch's rows lie over all devices; the scalars on each of them.
    """
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
        gather=gatherer(mesh, config.mesh.rules, config.mesh.min_fsdp_size),
    )
    return jit_on_mesh(
        mesh,
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def total_steps(config: ml_collections.ConfigDict, source: Any) -> int:
    """config.train.steps, or as many steps as config.train.epochs over `source` take."""
    if config.train.steps:
        return config.train.steps
    samples = source.num_sentences if config.data.sampling == "sentence" else len(source)
    return math.ceil(config.train.epochs * samples / config.train.batch_size)


class FirstStep:
    """Times the way to the end of the first step. Use as a context manager.

    Attributes:
      seconds: from `begun` (a time, by default now) to that end; None before it.
      compiling: how many of them went into compiling, or reading what was compiled before.
    """

    def __init__(self, begun: float | None = None):
        self.begun = time.time() if begun is None else begun
        self.seconds, self.compiling = None, 0.0

    def __enter__(self) -> "FirstStep":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *exc):
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event, seconds, **_):
        if self.seconds is None and event == "/jax/core/compile/backend_compile_duration":
            self.compiling += seconds

    def taken(self, scalars: dict[str, jax.Array]) -> str:
        """Waits for `scalars` of the first step, and returns a line that says how long it took."""
        jax.block_until_ready(scalars)
        self.seconds = time.time() - self.begun
        return f"first step after {self.seconds:.1f} s (of which compiling {self.compiling:.1f} s)"


class Trainer:
    """All that a run is made of: data, model, optimiser, mesh, state and the compiled step.

    Building it restores what there is to restore, in this order: this run's last checkpoint >
    `config.init.checkpoint` > pretrained encoders (`config.init.swin`, `.bert` ...) > scratch.
    `origin` says what came from where.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        tokenizer: Tokenizer,
        checkpoints: checkpoint.Checkpoints,
        sources: Mapping[str, Source] | None = None,
    ):
        self.config = config
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
        size, accumulate, devices = config.train.batch_size, config.train.accumulate, self.mesh.size
        below = size - size % (accumulate * devices)
        if below != size:
            near = [n for n in (below, below + accumulate * devices) if n]
            raise UserError(
                f"config.train.batch_size={size} with config.train.accumulate={accumulate} gives "
                f"{size / accumulate:g} rows at a time, which {devices} devices cannot share "
                f"evenly: take {' or '.join(map(str, near))}"
            )
        splits = config.data.train_split, config.data.select_split
        sources = sources or data.open_sources(config.data, splits)
        self.source, self.select_source = (sources[split] for split in splits)
        self.tokenizer = tokenizer
        self.model = models.build(config.model)
        self.steps = total_steps(config, self.source)
        self.sampled = pipeline.TrainBatches(
            self.source,
            self.tokenizer,
            image_size=config.data.image_size,
            max_tokens=config.data.max_tokens,
            batch_size=config.train.batch_size,
            letterbox=config.data.letterbox,
            num_steps=self.steps,
            seed=config.seed,
            sampling=config.data.sampling,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        key, init_key = jax.random.split(jax.random.key(config.seed))

        def make_tx(params):
            return make_optimizer(config.optim, params, self.steps)[0]

        def init(init_key, key, loaded):
            variables = init_variables(
                self.model, init_key, config.data.image_size, config.data.max_tokens
            )
            variables = unflatten_dict({**flatten_dict(variables), **flatten_dict(loaded)})
            return init_state(variables, make_tx, key, config.train.ema_decay > 0)

        abstract = jax.eval_shape(init, init_key, key, {})
        self.num_params = sum(x.size for x in jax.tree.leaves(abstract.params))
        self.tx, self.schedule = make_optimizer(config.optim, abstract.params, self.steps)
        shardings = state_sharding(
            abstract, self.mesh, config.mesh.rules, config.mesh.min_fsdp_size
        )
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        self.frozen_at_random: dict[str, int] = {}
        self.state = checkpoints.restore_last(abstract)
        if self.state is not None:
            self.origin = f"resumed at step {int(self.state.step)}"
        else:
            if (checkpoints.best_score() or (1,))[0] == 0:
                raise UserError(
                    "this --workdir holds a converted checkpoint and no training to resume: to "
                    "train on from it, give it as --config.init.checkpoint with another --workdir"
                )
            loaded, self.origin = load_initial(
                config, {"params": abstract.params, **abstract.model_state}
            )
            self.frozen_at_random = frozen_at_random(
                abstract.params, loaded.get("params", {}), config.optim.groups
            )
            self.state = jax.jit(init, out_shardings=shardings)(init_key, key, loaded)
        self.step_fn = make_train_step(config, self.model, self.tx, self.mesh, shardings)

    def batches(self, start_step: int):
        loading = self.config.data
        return pipeline.train_iterator(
            self.sampled, start_step, workers=loading.workers, threads=loading.threads
        )


def evaluation_settings(
    config: ml_collections.ConfigDict, model: nn.Module, mesh: Mesh
) -> dict[str, Any]:
    """The arguments of `evaluate.evaluate` that config and model set, for the devices of `mesh`.

    They get batches that they can share evenly, of `eval.batch_size` or a few more.
    """
    return dict(
        image_size=config.data.image_size,
        max_tokens=config.data.max_tokens,
        batch_size=-(-config.eval.batch_size // mesh.size) * mesh.size,
        letterbox=config.data.letterbox,
        bicubic=getattr(model, "resizes_probabilities", False),
        protocol=config.eval.protocol,
        threshold=config.eval.threshold,
        no_target_area=config.eval.no_target_area,
        workers=config.data.workers,
        threads=config.data.threads,
    )


def train(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    workdir: str,
    begun: float | None = None,
    sources: Mapping[str, Source] | None = None,
) -> dict[str, Any]:
    """Trains to the last step, resuming what `workdir` holds.

    `sources`: the data's train and select_split, if they are open already.

    Returns what the summary says of it: steps, and seconds_to_first_step since the time `begun`
    (by default now), if there was a step to take.

    Raises:
      Stopped: the run was told to stop.
      UserError: the loss or the gradient is not finite (the last good checkpoint is kept), or
        something in config or data is wrong.
    """
    with (
        StopRequest() as stop,  # Outermost, as leaving the checkpoints waits until they are saved.
        checkpoint.Checkpoints(workdir) as checkpoints,
        FirstStep(begun) as first,
    ):
        if not agree(checkpoints.last.latest_step() or 0):
            raise UserError(
                f"the processes find different checkpoints in {workdir}: it must be on storage "
                "that all of them share"
            )
        trainer = Trainer(config, tokenizer, checkpoints, sources)
        start = stop.start = int(trainer.state.step)
        if config.data.dataset != "shapes":  # Which are what the config says.
            found = data.identity(trainer.source)
            check_same("the training data", lambda: found)
            root = data.absolute_root(config.data)
            checkpoint.check_data(workdir, {**found, "root": root}, resumed=start > 0)
        writer = MetricWriter(workdir, start, trainer.steps, active=jax.process_index() == 0)
        try:
            samples = trainer.steps * config.train.batch_size
            writer.say(
                f"{config.model.name}: {trainer.num_params:,} parameters, {trainer.origin}, "
                f"steps {start} to {trainer.steps} of {config.train.batch_size} samples "
                f"({samples / trainer.sampled.samples_per_epoch:.3g} epochs), "
                f"{trainer.source.num_sentences} sentences of {len(trainer.source)} refs, "
                f"{trainer.mesh.size} {jax.default_backend()} device(s)"
            )
            if config.model.dtype == "float32" and jax.default_backend() != "cpu":
                writer.say(
                    "activations are float32: --config.model.dtype=bfloat16 is what TPUs and GPUs "
                    "are fast with, and most of our kernels are for it"
                )
            if frozen := trainer.frozen_at_random:
                modules = ", ".join(sorted({path.split("/")[0] for path in frozen}))
                writer.say(
                    f"WARNING: {sum(frozen.values()):,} parameters of {modules} were drawn at "
                    "random and will stay so, as config.optim.groups do not train them: give what "
                    "is pretrained (--config.init.*, docs/weights.md), or other groups"
                )
            checked = min(10_000, trainer.source.num_sentences)
            cut = pipeline.count_truncated(
                trainer.source, tokenizer, config.data.max_tokens, limit=checked
            )
            if cut:
                writer.say(
                    f"{cut} of {checked} training expressions are longer than "
                    f"config.data.max_tokens={config.data.max_tokens} and lose their end"
                )
            _loop(trainer, checkpoints, writer, stop, first, start, workdir)
        finally:
            writer.close()
        gc.collect()  # Lets go of the last batches; while the checkpoints end Grain frees them.
    if stop.signal:  # After the last step, or while it was saved.
        raise Stopped(stop.signal, trainer.steps)
    summary = {"steps": trainer.steps}
    if first.seconds is not None:
        summary["seconds_to_first_step"] = round(first.seconds, 1)
    return summary


def _loop(trainer, checkpoints, writer, stop, first, start, workdir):
    config, total = trainer.config, trainer.steps
    predict_fn = make_predict_step(trainer.model, batch_sharding(trainer.mesh))
    # Once for all batches of an evaluation. One device has everything, and needs no copy of it.
    gather = gatherer(trainer.mesh, config.mesh.rules, config.mesh.min_fsdp_size)
    shared = trainer.mesh.size > trainer.mesh.shape["fsdp"] == 1
    gather = jax.jit(gather) if shared else lambda params: params
    select_source = trainer.select_source
    check_same(f"the split {select_source.split}", lambda: data.identity(select_source))
    state = trainer.state
    trainer.state = None  # The step consumes its buffers.

    def evaluation_due(step):
        return step == total or step % config.train.eval_every == 0

    def score(step, state):
        def put(batch):
            if stop.signal:  # The step is saved, and scored when the run goes on.
                raise Stopped(stop.signal, step)
            return to_device(batch, trainer.mesh)

        variables = state.variables()
        result = evaluate.evaluate(
            predict_fn,
            {**variables, "params": gather(variables["params"])},
            select_source,
            trainer.tokenizer,
            put=put,
            limit=config.eval.limit_in_training,
            verbose=False,
            **evaluation_settings(config, trainer.model, trainer.mesh),
        )
        selected_by = result.selected_by(config.eval.select_by)
        best = checkpoints.save_best(step, variables, selected_by)
        scores = result.metrics.items()
        known = {f"{result.split}/{name}": v for name, v in scores if math.isfinite(v)}
        writer.write(step, known)  # Last: it says that the step has been scored.
        writer.say(
            f"step {step}: {result.split} {evaluate.spell(result.headline)}"
            + (" (best so far)" if best else "")
        )
        if step == total:
            stop.after(total + 1)  # Heeded by `train`.

    scored = _scored(workdir, start, select_source.split) and checkpoints.best_score() is not None
    if start and evaluation_due(start) and not scored:
        since, compiling = time.time(), first.compiling
        score(start, state)
        first.begun, first.compiling = first.begun + time.time() - since, compiling
    elif start == total:
        stop.after(total + 1)
    record = Recorder(writer, trainer.schedule, config.train, total)
    norm = jax.jit(optax.tree.norm)
    # Closed also where an error ends this: Grain's workers cannot be left to the end of Python.
    with contextlib.closing(trainer.batches(start)) as batches:
        for step, batch in enumerate(batches, start + 1):
            batch = to_device(batch, trainer.mesh)
            if first.seconds is None:
                writer.say("compiling the train step, unless it has been compiled before")
                trainer.step_fn.lower(state, batch).compile()
                meet()
            state, scalars = trainer.step_fn(state, batch)
            record.add(step, scalars)
            if first.seconds is None:
                writer.say(first.taken(scalars))
                record.once["seconds_to_first_step"] = first.seconds
            stopping, evaluating = stop.after(step), evaluation_due(step)
            if not (evaluating or stopping or step % config.train.checkpoint_every == 0):
                continue
            record.flush()  # A step that went wrong must not be saved,
            check_finite("the parameters' norm", float(norm(state.params)), step)  # nor its update.
            checkpoints.save_last(state)
            if stopping:
                raise Stopped(stop.signal, step)
            if evaluating:
                score(step, state)
            record.restart_clock()


def _scored(workdir: str, step: int, split: str) -> bool:
    """Whether the metrics have scores of `step`; as process 0 sees it, and tells all."""
    found = jax.process_index() == 0 and any(
        name.startswith(f"{split}/")
        for row in read_metrics(workdir)
        if row["step"] == step
        for name in row
    )
    meet()
    return bool(multihost_utils.broadcast_one_to_all(np.int32(found)))
