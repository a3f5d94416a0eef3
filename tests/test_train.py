"""Training: reproducible, shardable, and it stops where it should."""

import re
import shutil
import signal

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from refseg_jax import checkpoint, models, run, train
from refseg_jax.data import sets
from refseg_jax.errors import TERMINATED, UserError
from refseg_jax.logging import read_metrics
from refseg_jax.sharding import gatherer
from tests import preparing, tiny
from tests.toy import Toy


def make_trainer(path, **changes):
    config = tiny.config(**changes)
    tokenizer = run.prepare(config, str(path))
    with checkpoint.Checkpoints(str(path)) as checkpoints:
        return train.Trainer(config, tokenizer, checkpoints)


def take_steps(trainer, steps):
    """Losses and the final state of the first `steps` steps."""
    losses, state = [], trainer.state
    for _, batch in zip(range(steps), trainer.batches(0), strict=False):
        state, scalars = trainer.step_fn(state, train.to_device(batch, trainer.mesh))
        losses.append(float(scalars["loss"]))
    return np.array(losses), state


def leaves(tree):
    def array(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [array(x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def toy(monkeypatch):
    """The model of every config."""
    monkeypatch.setitem(models.MODELS, "alignformer", Toy)


def losses_on(path, data, fsdp):
    """Of five steps on such a mesh, whose devices hold shares of what is large and divides."""
    trainer = make_trainer(path, mesh__data=data, mesh__fsdp=fsdp, mesh__min_fsdp_size=64)
    params, moments = trainer.state.params, trainer.state.opt_state[1].inner_states[1]
    for array in jax.tree.leaves((params, moments.inner_state[0].mu)):
        shares = fsdp if fsdp > 1 else data
        if array.size < 64 or all(n % shares for n in array.shape):
            shares = 1
        assert array.addressable_shards[0].data.size == array.size // shares
    return take_steps(trainer, 5)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of five steps on one device."""
    return losses_on(tmp_path_factory.mktemp("alone"), 1, 1)


def test_fsdp_agrees_with_one_device(tmp_path, alone):
    assert np.ptp(alone) > 1e-3  # It moves at all.
    np.testing.assert_allclose(losses_on(tmp_path, 2, 4), alone, rtol=1e-5)


def test_data_parallel_agrees_with_one_device(tmp_path, toy):
    one, four = (losses_on(tmp_path / str(data), data, 1) for data in (1, 4))
    assert np.ptp(one) > 1e-3
    np.testing.assert_allclose(four, one, rtol=1e-5)


def test_a_step_gathers_what_data_parallel_devices_share(tmp_path, toy):
    trainer = make_trainer(tmp_path, mesh__data=4, mesh__fsdp=1, mesh__min_fsdp_size=64)
    params = jax.tree.leaves(trainer.state.params)
    assert not all(x.sharding.is_fully_replicated for x in params)
    gathered = jax.jit(gatherer(trainer.mesh, (), 64))(params)
    assert all(x.sharding.is_fully_replicated for x in gathered)
    batch = train.to_device(next(iter(trainer.batches(0))), trainer.mesh)
    jaxpr = str(jax.make_jaxpr(trainer.step_fn)(trainer.state, batch))
    assert jaxpr.count("= sharding_constraint") == len(params)


class Still(Toy):
    """Draws nothing, and has no statistics."""

    @nn.compact
    def __call__(self, image, tokens, token_mask, train=False):
        x = nn.Conv(self.config.dim, (4, 4), (4, 4))(image)
        x = x * (1 + token_mask.mean(1)[:, None, None, None])
        return {"logits": nn.Dense(1)(jax.nn.relu(x))[..., 0]}

    def loss(self, outputs, mask, valid, key):
        losses = optax.sigmoid_binary_cross_entropy(outputs["logits"], mask[:, 2::4, 2::4])
        return (losses.mean((1, 2)) * valid).sum() / valid.sum(), {}


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulation_changes_memory_not_the_gradient(tmp_path, monkeypatch, devices):
    monkeypatch.setitem(models.MODELS, "alignformer", Still)
    # Clipping would hide the gradient's scale.
    changes = {"optim__clip_norm": 0.0, "mesh__data": devices}
    base, state = take_steps(make_trainer(tmp_path / "base", **changes), 1)
    losses, other = take_steps(make_trainer(tmp_path / "parts", train__accumulate=4, **changes), 1)
    np.testing.assert_allclose(losses, base, rtol=1e-5)
    # Adam's moments after one step are the gradient and its square.
    assert max(np.abs(x).max() for x in leaves(state.opt_state) if x.ndim) > 1e-3
    for x, y in zip(leaves(state.opt_state), leaves(other.opt_state), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_averaged_parameters_follow_and_are_what_is_evaluated(tmp_path, toy):
    trainer = make_trainer(tmp_path)
    before = leaves(trainer.state.params)
    _, state = take_steps(trainer, 1)
    for old, new, ema in zip(before, leaves(state.params), leaves(state.ema), strict=True):
        np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, atol=1e-7)
    assert state.variables()["params"] is state.ema


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(tmp_path, alone):
    trainer = make_trainer(tmp_path, model__dtype="bfloat16")
    close, state = take_steps(trainer, 1)
    assert close != alone[:1]
    # bfloat16 has 8 bits of mantissa; the loss averages over thousands of pixels.
    np.testing.assert_allclose(close, alone[:1], rtol=2e-2)
    assert {x.dtype.name for x in leaves(state.params)} == {"float32"}

    # A batch of expressions that fit nothing, in the same program: another would take its time.
    batch = next(trainer.batches(1))
    batch["mask"][:] = False
    state, scalars = trainer.step_fn(state, train.to_device(batch, trainer.mesh))
    assert np.isfinite([float(scalars[name]) for name in ("loss", "loss_cmic", "grad_norm")]).all()
    assert all(np.isfinite(x).all() for x in leaves(state.params))


def test_two_runs_with_one_seed_are_identical_and_with_another_are_not(tmp_path, toy):
    states = [
        take_steps(make_trainer(tmp_path / str(i), seed=seed), 2)[1]
        for i, seed in enumerate((0, 0, 1))
    ]
    first, same, other = (leaves(state.params) for state in states)
    assert all(np.array_equal(x, y) for x, y in zip(first, same, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, capsys, toy
):
    config = tiny.config(train__steps=5, train__eval_every=100)
    tokenizer = run.prepare(config, str(tmp_path))
    real = train.normalize_for
    monkeypatch.setattr(train, "normalize_for", lambda *a: real(*a) * np.inf)
    with pytest.raises(UserError, match="at step 1: .*last good checkpoint"):
        train.train(config, tokenizer, str(tmp_path))
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.last.latest_step() is None

    monkeypatch.setattr(train, "normalize_for", real)
    wild = tiny.config(optim__lr=1e25, train__steps=1)  # Its loss is fine, what it leaves is not.
    assert "--config.model.dtype=bfloat16" not in capsys.readouterr().err
    with (
        monkeypatch.context() as elsewhere,
        pytest.raises(UserError, match="parameters' norm is inf at step 1"),
    ):
        elsewhere.setattr(jax, "default_backend", lambda: "tpu")
        train.train(wild, run.prepare(wild, str(tmp_path / "wild")), str(tmp_path / "wild"))
    assert "--config.model.dtype=bfloat16" in capsys.readouterr().err
    with checkpoint.Checkpoints(str(tmp_path / "wild")) as checkpoints:
        assert checkpoints.last.latest_step() is None

    config.train.update(steps=3, log_every=2)
    checkpoint.write_config(str(tmp_path), config)
    train.train(config, run.prepare(config, str(tmp_path)), str(tmp_path))
    rows = [row for row in read_metrics(str(tmp_path)) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3]  # Nothing is lost at the end.
    config.train.steps = 5
    checkpoint.write_config(str(tmp_path), config)
    monkeypatch.setattr(train, "normalize_for", lambda *a: real(*a) * np.inf)
    with pytest.raises(UserError, match="at step 4"):
        train.train(config, run.prepare(config, str(tmp_path)), str(tmp_path))
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.last.latest_step() == 3


def test_a_signal_after_the_last_step_is_heeded(tmp_path, monkeypatch, toy):
    config = tiny.config(train__steps=1)
    train.train(config, run.prepare(config, str(tmp_path)), str(tmp_path))

    def signaled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return Trainer(*arguments)

    Trainer = train.Trainer
    monkeypatch.setattr(train, "Trainer", signaled)
    with pytest.raises(UserError, match="stopped by SIGTERM at step 1, which is saved") as caught:
        train.train(config, run.prepare(config, str(tmp_path)), str(tmp_path))
    assert caught.value.status == TERMINATED


def test_a_changed_config_is_not_resumed(tmp_path):
    run.prepare(tiny.config(optim__lr=0.1), str(tmp_path))
    run.prepare(tiny.config(), str(tmp_path))  # The first attempt has saved nothing to resume.
    assert checkpoint.read_config(str(tmp_path)).optim.lr == 5e-5
    (tmp_path / "checkpoints" / "last" / "5").mkdir(parents=True)
    run.prepare(tiny.config(eval__batch_size=4), str(tmp_path))  # Free to change.
    with pytest.raises(UserError, match=r"optim.lr: 5e-05 there, 0.1 now"):
        run.prepare(tiny.config(optim__lr=0.1), str(tmp_path))


def test_another_models_checkpoint_is_refused_with_the_differences(tmp_path, monkeypatch, toy):
    make = tiny.config(train__steps=1, eval__limit_in_training=3)
    train.train(make, run.prepare(make, str(tmp_path / "a")), str(tmp_path / "a"))
    # As a damaged one is to be deleted, the finished run makes another best checkpoint.
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "best" / "1")
    train.train(make, run.prepare(make, str(tmp_path / "a")), str(tmp_path / "a"))
    assert checkpoint.best_step(str(tmp_path / "a")) == 1

    config = tiny.config(model__dim=32, init__checkpoint=str(tmp_path / "a"))
    differs = r"differs in model.dim: 16 there, 32 now\): .* does not fit this model .*has shape"
    with pytest.raises(UserError, match=differs):
        train.train(config, run.prepare(config, str(tmp_path / "b")), str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path))
    same = tiny.config(init__checkpoint="~/a")
    trainer = None
    with checkpoint.Checkpoints(str(tmp_path / "c")) as checkpoints:
        trainer = train.Trainer(same, run.prepare(same, str(tmp_path / "c")), checkpoints)
    assert trainer.origin == "all parameters from ~/a"
    other = tiny.config(
        init__checkpoint=str(tmp_path / "a"), model__heads=1, model__bert__dropout=0.2
    )
    with checkpoint.Checkpoints(str(tmp_path / "d")) as checkpoints:
        trainer = train.Trainer(other, run.prepare(other, str(tmp_path / "d")), checkpoints)
    assert trainer.origin.endswith("/a (differs in model.heads: 2 there, 1 now)")


def test_batch_that_devices_cannot_share_is_an_error(tmp_path):
    for size, accumulate, near in ((12, 1, "8 or 16"), (4, 1, "8"), (24, 2, "16 or 32")):
        changes = {"train__batch_size": size, "train__accumulate": accumulate}
        with pytest.raises(UserError, match=f"batch_size={size} .* evenly: take {near}$"):
            make_trainer(tmp_path, mesh__data=8, **changes)


def test_a_run_opens_its_data_once(tmp_path, monkeypatch, toy):
    """Annotations in the refer layout take seconds to read."""
    raw, out = preparing.write_shapes(tmp_path / "raw"), tmp_path / "out"
    assert preparing.run("refer", "--root", raw, "--dataset", "shapes", "--out", out) == 0
    opened, open_set = [], sets.open_set

    def counting(root, name, splits, **options):
        opened.append(list(splits))
        return open_set(root, name, splits, **options)

    monkeypatch.setattr(sets, "open_set", counting)
    config = tiny.config(train__steps=1, eval__examples=0)
    config.data.update(dataset="prepared", split_by="", root=str(out), eval_splits=("train",))
    summary = run.run(config, str(tmp_path / "run"), "both")
    assert summary["steps"] == 1 and "train/mIoU" in summary and "val/mIoU" in summary
    assert opened == [["train", "val"]]
    opened.clear()
    run.run(config, str(tmp_path / "run"), "train")
    assert opened == [["train", "val"]]


def test_what_stays_as_drawn_at_random_is_told(tmp_path, capsys, toy):
    groups = ((r"embedding$", 0.0, 0.0), (r"", 1.0, 1.0))
    config = tiny.config(train__steps=1, eval__examples=0, optim__groups=groups)
    train.train(config, run.prepare(config, str(tmp_path / "a")), str(tmp_path / "a"))
    told = r"WARNING: [\d,]+ parameters of Embed_0 were drawn at random and will stay so"
    assert re.search(told, capsys.readouterr().err)
    config.init.checkpoint = str(tmp_path / "a")
    train.train(config, run.prepare(config, str(tmp_path / "b")), str(tmp_path / "b"))
    assert "WARNING" not in capsys.readouterr().err
