"""What surrounds training: bounds of the config, the run's directory, and its data."""

import errno
import functools
import importlib
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

from refseg_jax import bounds, checkpoint, data, details, models, processes, run
from refseg_jax.data.files import locked
from refseg_jax.data.shapes import ShapesSource
from refseg_jax.errors import UserError
from refseg_jax.train_state import TrainState
from tests import preparing, tiny


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train__batch_size", 0, "batch_size=0: it must be 1 or more"),
        ("train__accumulate", 0, "accumulate=0"),
        ("mesh__cpu_devices", -3, "config.mesh.cpu_devices=-3: it must be 1 or more"),
        ("train__eval_every", 0, "eval_every=0"),
        ("train__log_every", -1, "log_every=-1"),
        ("train__checkpoint_every", 0, "checkpoint_every=0"),
        ("eval__batch_size", 0, "config.eval.batch_size=0"),
        ("data__max_tokens", 2, "max_tokens=2: it must be 3 or more"),
        ("data__max_tokens", 65, "max_tokens=65 are more than config.model.bert.max_positions=64"),
        ("eval__limit_in_training", -1, "limit_in_training=-1"),
        ("data__threads", -1, "threads=-1"),
        ("seed", -1, "config.seed=-1"),
        ("eval__threshold", 35.0, "threshold=35.0: it is a probability"),
        ("eval__threshold", float("nan"), "threshold=nan"),
        ("eval__protocol", "orignal", "'orignal' is not one of original, input"),
        ("eval__select_by", "oIoU", "'oIoU' is not one of mean, overall"),
        ("data__eval_splits", ("val", "tesA"), "tesA"),
        ("seed", 2**64, "config.seed="),
        ("train__ema_decay", 1.0, "config.train.ema_decay=1.0: it must be from 0 to below 1"),
        ("optim__clip_norm", -1.0, "config.optim.clip_norm=-1.0: it must be 0 or more"),
        ("optim__lr", float("inf"), "config.optim.lr=inf"),
        ("optim__decay_share", float("nan"), "config.optim.decay_share=nan"),
        ("optim__warmup_steps", -3, "config.optim.warmup_steps=-3"),
        ("model__heads", 0, "config.model.heads=0: it must be 1 or more"),
        ("model__prior", 1.0, "config.model.prior=1.0: it must be from 0 to below 1"),
        ("model__swin__drop_path", 1.0, "config.model.swin.drop_path=1.0"),
        ("model__swin__window", 0, "config.model.swin.window=0"),
        ("model__swin__depths", (1, 0, 1, 1), "config.model.swin.depths"),
        ("model__cmic_weight", -1.0, "config.model.cmic_weight=-1.0"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path, monkeypatch, field, value, message):
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match=message):
        run.run(tiny.config(**{field: value}), str(tmp_path / "run"), "both")


def test_a_second_run_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", lambda *_: {"steps": 6})
    workdir = str(tmp_path / "run")
    assert run.run(tiny.config(), workdir, "train")["steps"] == 6
    held = "from refseg_jax.data.files import locked\nimport sys\n"
    held += (
        "with locked(sys.argv[1] + '/.lock', 'run'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", held, workdir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another run is writing to {workdir}"):
            run.run(tiny.config(seed=1), workdir, "train")
        other.kill()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    assert run.run(tiny.config(), workdir, "train")["steps"] == 6
    with locked(f"{workdir}/.lock", "run"):
        pass  # It is given back.


def test_a_run_that_has_no_checkpoint_yet_is_not_evaluated(tmp_path):
    workdir = tmp_path / "run"
    run.prepare(tiny.config(), str(workdir))
    before = (workdir / checkpoint.CONFIG_FILE).read_bytes()
    with pytest.raises(UserError, match="has no best checkpoint yet"):
        run.run(tiny.config(seed=7), str(workdir), "evaluate")
    assert (workdir / checkpoint.CONFIG_FILE).read_bytes() == before
    assert not (workdir / "checkpoints").exists()


def test_a_run_that_cannot_be_written_to_is_refused_before_it_is_scored(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save_best(3, {"x": jnp.arange(2.0)}, 0.5)
    checkpoint.write_config(tmp_path, tiny.config())
    monkeypatch.setattr("os.access", lambda *_: False)  # Nobody hinders root.
    with pytest.raises(UserError, match="cannot be written to.*copy the run"):
        run.run(tiny.config(), str(tmp_path), "evaluate")


def test_to_read_a_checkpoint_writes_nothing(tmp_path):
    with checkpoint.Checkpoints(str(tmp_path / "run")) as checkpoints:
        checkpoints.save_best(3, {"x": jnp.arange(2.0)}, 0.5)
    checkpoint.write_config(tmp_path / "run", tiny.config())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "last")
    before = sorted(tmp_path.rglob("*"))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = checkpoint.load_variables(tmp_path / "run", {"x": jnp.zeros(2)}, sharding)
    np.testing.assert_array_equal(loaded["x"], [0, 1])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_is_cut_off_is_one_line(tmp_path):
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save_best(3, {"x": jnp.arange(1000.0)}, 0.5)
    checkpoint.write_config(tmp_path, tiny.config())
    best = tmp_path / "checkpoints" / "best" / "3"
    largest = max((p for p in best.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(
        UserError, match="best/3 is damaged, delete it: training then makes another"
    ) as error:
        checkpoint.load_variables(str(tmp_path), {"x": jnp.zeros(1000)}, sharding)
    assert len(str(error.value)) < 600


def test_the_step_that_is_scored_is_the_best_one_s(tmp_path):
    """A kill can leave two of them."""
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save_best(3, {"x": jnp.arange(10.0)}, 0.5)
    assert checkpoint.best_step(str(tmp_path)) == 3
    best = tmp_path / "checkpoints" / "best"
    shutil.copytree(best / "3", best / "2")
    (best / "2" / "metrics" / "metrics").write_text('{"score": 0.9}')
    assert checkpoint.best_step(str(tmp_path)) == 2
    assert checkpoint.best_step(str(tmp_path / "none")) == 0


def test_checkpoints_without_a_config_are_nobody_s(tmp_path):
    """To take the next command's for theirs would let it overwrite what they are of."""
    (tmp_path / "checkpoints" / "last" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="has checkpoints, but no config.json"):
        run.prepare(tiny.config(), str(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_what_decides_about_the_best_does_not_change_within_a_run(tmp_path):
    run.prepare(tiny.config(), str(tmp_path))
    (tmp_path / "checkpoints" / "last" / "3").mkdir(parents=True)
    other = tiny.config(eval__threshold=0.9, eval__select_by="overall", eval__batch_size=3)
    with pytest.raises(UserError, match=r"eval.select_by: .*eval.threshold: .*--mode evaluate"):
        run.prepare(other, str(tmp_path))
    run.prepare(other, str(tmp_path), run.FREE_FIELDS + run.FREE_IN_EVALUATION)


def test_an_evaluation_needs_no_field_of_training(tmp_path):
    workdir = str(tmp_path / "run")
    run.prepare(tiny.config(), workdir)
    (tmp_path / "run" / "checkpoints" / "best" / "3").mkdir(parents=True)
    other = tiny.config(train__steps=9, optim__lr=1.0)
    other.model.draws = "flax"  # Which a run of an earlier version does not have.
    free = run.FREE_FIELDS + run.FREE_IN_EVALUATION
    run.prepare(other, workdir, free)
    with pytest.raises(
        UserError, match=r"model.draws.*optim.lr: 5e-05 there, 1.0 now, train.steps"
    ):
        run.prepare(other, workdir)
    # Nor the data that the run was trained on.
    other.data.update(dataset="refcoco+", split_by="unc", select_split="testA", tokenizer="other")
    run.prepare(other, workdir, free)
    other.model.update(dim=32, name="another")
    with pytest.raises(UserError, match=r"another config \(model.name: alignformer there"):
        run.prepare(other, workdir, free)
    with pytest.raises(UserError, match=r"alignformer there, another now.*: give what it was$"):
        run.prepare(other, workdir, free, "what it was")


def test_a_run_from_before_a_field_of_speed_goes_on(tmp_path):
    run.prepare(tiny.config(), str(tmp_path))
    (tmp_path / "checkpoints" / "last" / "3").mkdir(parents=True)
    config = json.loads((tmp_path / checkpoint.CONFIG_FILE).read_text())
    del config["model"]["swin"]["cudnn"]
    (tmp_path / checkpoint.CONFIG_FILE).write_text(json.dumps(config))
    changed = tiny.config()
    changed.model.swin.cudnn = True
    run.prepare(changed, str(tmp_path))
    changed.model.swin.window = 3
    with pytest.raises(UserError, match=r"another config \(model.swin.window: \d there, 3 now\)"):
        run.prepare(changed, str(tmp_path))


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    files = {"config.json": '{"hidden_size": 768}', "tokenizer.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is|no run's: give another --workdir"):
            run.prepare(tiny.config(), str(tmp_path))
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()
    run.prepare(tiny.config(), str(tmp_path))
    (tmp_path / "config.json").unlink()  # As a run that was killed at its start.
    run.prepare(tiny.config(), str(tmp_path))


def test_the_best_is_read_again_where_training_has_replaced_it(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoint.write_config(str(tmp_path), tiny.config())
        checkpoints.save_best(1, {"x": jnp.zeros(1)}, 0.5)
        restore = checkpoint._restore

        def late(manager, abstract, step):
            if step == 1:
                checkpoints.save_best(2, {"x": jnp.ones(1)}, 0.6)
            return restore(manager, abstract, step)

        monkeypatch.setattr(checkpoint, "_restore", late)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        assert checkpoint.load_variables(str(tmp_path), {"x": jnp.zeros(1)}, here)["x"] == 1
        other = {"x": jnp.zeros(3)}
        with pytest.raises(UserError, match="does not fit"):
            checkpoint.load_variables(str(tmp_path), other, here)


def test_a_workdir_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write to --workdir={workdir}"):
            run.run(tiny.config(), str(workdir), "train")


def state_at(step):
    return TrainState(jnp.int32(step), {"x": jnp.zeros(1)}, {}, (), None, jax.random.key(0))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left\nmore")

    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError, match="checkpoints/best: RESOURCE_EXHAUSTED: no space left"):
            checkpoints.save_best(1, {"x": jnp.zeros(1)}, 0.5)


def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path, monkeypatch):
    class Full:
        def result(self, timeout=None):
            raise OSError(errno.ENOSPC, "No space left on device")

    async def begin_to_save(*_, **__):
        return [Full()]

    told = []
    monkeypatch.setattr(processes, "report", told.append)
    with (
        pytest.raises(UserError, match="checkpoints/last: .*No space left on device"),
        checkpoint.Checkpoints(str(tmp_path)) as checkpoints,
    ):
        monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", begin_to_save)
        checkpoints.save_last(state_at(1))
        checkpoints.save_best(1, {"x": jnp.zeros(1)}, 0.5)
    (message,) = told
    assert message.startswith(f"cannot save a checkpoint to {tmp_path}/checkpoints/last: ")


def test_checkpoints_do_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """JAX takes the number of the step that is asked about for where this process is."""

    def asked(step):
        raise AssertionError(f"asked at {step}")

    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked)
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        for step in (1, 2):
            checkpoints.save_last(state_at(step))
            assert checkpoints.save_best(step, {"x": jnp.zeros(1)}, step / 10)
    assert sorted(checkpoint.saved_steps(str(tmp_path))) == [2, 2]


def test_other_data_is_not_taken_for_the_runs_own(tmp_path):
    raw = preparing.write_shapes(tmp_path / "raw")
    out = tmp_path / "out"
    assert preparing.run("refer", "--root", raw, "--dataset", "shapes", "--out", out) == 0
    config = tiny.config().data
    config.update(dataset="prepared", split_by="", root=str(out))
    found = data.identity(data.open_source(config, "train"))
    config.update(dataset="shapes", split_by="unc", root=str(raw))
    assert found == data.identity(preparing.refer_sources(raw, "shapes")["train"])
    assert (found["refs"], found["sentences"]) == (12, 36)

    workdir = str(tmp_path)
    checkpoint.check_data(workdir, found, resumed=True)  # As a run of an older version.
    checkpoint.check_data(workdir, found, resumed=True)
    other = data.identity(preparing.refer_sources(raw, "shapes")["val"])
    with pytest.raises(UserError, match="36 sentences of 12 refs; now shapes, 18 sentences of 6"):
        checkpoint.check_data(workdir, other, resumed=True)
    checkpoint.check_data(workdir, other, resumed=False)
    checkpoint.check_data(workdir, other, resumed=True)
    (tmp_path / "data.json").write_text("")
    with pytest.raises(UserError, match="data.json is not valid JSON"):
        checkpoint.check_data(workdir, other, resumed=True)


def test_scores_on_other_data_of_the_same_name_do_not_replace_the_runs_own(tmp_path, monkeypatch):
    raw = preparing.write_shapes(tmp_path / "raw")
    args = ("refer", "--root", raw, "--dataset", "shapes")
    mine, moved, other = (str(tmp_path / name) for name in ("mine", "moved", "other"))
    for out in (mine, moved):
        assert preparing.run(*args, "--out", out) == 0
    assert preparing.run(*args, "--out", other, "--splits", "val") == 0

    trained = tiny.config()
    trained.data.update(dataset="prepared", split_by="", root=mine)
    workdir = str(tmp_path)

    def named(root, **changes):
        config = trained.copy_and_resolve_references()
        config.data.update(root=root, **changes)
        return run.other_data(trained, config, workdir)

    assert named(other) == ""  # A run of an older version does not know.
    stored = trained.copy_and_resolve_references()
    trained.data.update(dataset="merged", merged=("a_unc", "b_unc"))
    config = trained.copy_and_resolve_references()
    trained = ml_collections.ConfigDict(json.loads(trained.to_json()))
    assert run.other_data(trained, config, workdir) == ""
    config.data.merged = ("a_unc",)
    assert run.other_data(trained, config, workdir) == "-merged"
    trained = stored
    found = data.identity(data.open_source(trained.data, "train"))
    checkpoint.check_data(workdir, found, resumed=False)
    assert named(mine) == named(f"{mine}/") == named(moved) == ""
    checkpoint.check_data(workdir, {**found, "root": mine}, resumed=True)
    checkpoint.check_data(workdir, {**found, "root": mine}, resumed=False)
    trained.data.root = "mine"  # From here.
    monkeypatch.chdir(tmp_path)
    assert named("mine") == named(mine) == named(moved) == ""
    monkeypatch.chdir(other)
    assert named(mine) == "" and named(".") == "-other"
    assert named(other) == named(f"{other}/") == "-other"
    assert named(str(raw), dataset="shapes", split_by="unc") == "-shapes_unc"
    checkpoint.check_data(workdir, {**found, "root": mine}, resumed=True)
    checkpoint.check_data(workdir, {**found, "root": moved}, resumed=True)
    assert checkpoint.trained_on(workdir)["root"] == moved
    trained.data.train_split = "val"  # Other data than was written down.
    assert named(mine) == "-mine"


def test_without_a_control_the_scores_are_there(tmp_path, monkeypatch, capsys):
    """A validation split of one ref has no other whose expressions it could be given."""

    class OneRef(ShapesSource):
        def __len__(self):
            return 1

        num_sentences = 3

    config = tiny.config(data__eval_splits=("val",))
    source = OneRef("val", num_scenes=1, size=64)
    monkeypatch.setattr(data, "open_sources", lambda *_: {"val": source})
    monkeypatch.setattr(run, "load_run", lambda *_: (config, None, {}))
    everywhere = jnp.ones((config.eval.batch_size, 64, 64))
    monkeypatch.setattr(run, "make_predict_step", lambda *_: lambda *_: everywhere)
    monkeypatch.setattr(details, "explain", lambda *_: ())
    summary = run.evaluate_run(config, data.load_tokenizer("shapes"), str(tmp_path))
    assert summary["val/mIoU"] > 0 and not any("shuffled" in name for name in summary)
    assert (tmp_path / "report.html").exists()
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["val"]
    assert "val: no control, expressions cannot be shuffled" in capsys.readouterr().err

    # Scores on other data stand beside those on the run's own.
    trained = config.copy_and_resolve_references()
    config.data.update(dataset="refcoco+", split_by="unc")
    monkeypatch.setattr(run, "load_run", lambda *_: (trained, None, {}))
    before = (tmp_path / "report.html").read_bytes()
    summary = run.evaluate_run(config, data.load_tokenizer("shapes"), str(tmp_path))
    assert summary["report"] == str(tmp_path / "report-refcoco+_unc.html")
    assert (tmp_path / "report-refcoco+_unc.html").exists()
    assert (tmp_path / "results-refcoco+_unc.json").exists()
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        *((name, "swin.num_heads", "stages' widths") for name in ("lavt", "crossvlt")),
        ("coupalign", "bert.heads", "do not divide hidden"),
        ("coupalign", "heads", "do not divide bert.hidden"),
        ("alignformer", "heads", "a multiple of 4 and of heads=7"),
        ("cris", "text.heads", "do not divide hidden"),
        ("jmceln", "heads", "of heads=7"),
    ],
)
def test_heads_that_do_not_divide_a_width_are_an_error(name, field, message):
    config = importlib.import_module(f"configs.{name}").get_config().model
    *sections, field = field.split(".")
    node = functools.reduce(lambda part, section: part[section], sections, config)
    node[field] = 7 if isinstance(node[field], int) else (7, *node[field][1:])
    with pytest.raises(UserError, match=message):
        models.build(config)


@pytest.mark.parametrize(
    ("name", "field"),
    [("alignformer", "swin.embed_dim"), ("cris", "vision.width"), ("jmceln", "vision.width")],
)
def test_a_width_that_places_do_not_fit_is_an_error(name, field):
    config = importlib.import_module(f"configs.{name}").get_config()
    section, field = field.split(".")
    config.model[section][field] += 2
    with pytest.raises(UserError, match=f"{section}.{field}=.* a multiple of 4"):
        bounds.check(config)
    config.model[section].positions = False
    bounds.check(config)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_a_recipe_is_what_its_model_is_by_default(name):
    config = importlib.import_module(f"configs.{name}").get_config("refcoco").model
    default = models.MODELS[name].Config()
    text = "bert" if "bert" in config else "text"
    config[text].vocab_size = getattr(default, text).vocab_size  # 0 there: the tokenizer's.
    assert models.build(config).config == default
