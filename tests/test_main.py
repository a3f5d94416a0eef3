"""The command line: bad input is one line, a whole run prints JSON last, a killed one goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from refseg_jax import checkpoint
from refseg_jax.errors import TERMINATED
from tests import tiny
from tests.test_train import leaves

REPO = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = sys.executable, "-m", "refseg_jax.main"


def main(*arguments, cwd=REPO, **env):
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "--config is missing"),
        (["--config", "configs/alignforma.py"], "there is no config file configs/alignforma.py"),
        (["--config", "alignformer"], "there is no config file alignformer"),
        (["--config", "configs/alignformer.py:refcocco"], "did you mean 'refcoco'"),
        (["--config", "configs/alignformer.py:refcoco,refcoco+"], "more than one dataset"),
        (["--config", "configs/lavt.py:swin_small"], "the small model has encoders of its own"),
        (["--config", "configs/cris.py:refcoco,small,resnet50"], "whole recipe, e.g. refcoco,resn"),
        (["--config", "configs/alignformer.py", "--config.optim.rl=1"], "has no field 'rl'"),
        (["--config", "configs/alignformer.py", "--config.optm.lr=1"], 'Did you mean "optim"'),
        (["--config", "configs/alignformer.py", "--config.optim.lr=fast"], "fast"),
        (["--config", "configs/alignformer.py", "--config.train.epochs=2"], "train.steps=3750: gi"),
        (["--config", "configs/alignformer.py", "--workdri=x"], "workdri"),
        (["--config", "configs/alignformer.py", "train"], "unexpected argument 'train'"),
        (["--config", "configs/alignformer.py:refcoco", "--config.data.root=nowhere",
          "--config.data.tokenizer=shapes"], "config.data.root=nowhere: nowhere/refcoco/"),
        (["--config", "configs/alignformer.py", "--config.data.train_split=trian"], "trian"),
        (["--config", "configs/alignformer.py", "--config.model.fusion=both"], "fusion='both'"),
        (["--config", "configs/alignformer.py", "--config.data.sampling=all"], "sampling"),
        (["--config", "configs/alignformer.py", "--mode", "evaluate"], "not the directory of a"),
        (["--config", "configs/alignformer.py", "--process_id=0"], "go together"),
        (["--config", "configs/alignformer.py", "--coordinator=here", "--num_processes=2",
          "--process_id=0"], "HOST:PORT"),
        (["--config", "configs/alignformer.py", "--coordinator=here:1", "--num_processes=2",
          "--process_id=2"], "--process_id=2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, expected, tmp_path):
    if not any("workd" in a for a in arguments):
        arguments = [*arguments, "--workdir", str(tmp_path)]
    done = main(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_no_failure():
    done = main("--help")
    assert done.returncode == 0 and "--config" in done.stdout and done.stderr == ""


def test_a_config_is_found_from_elsewhere(tmp_path):
    """As where the package is installed and not the current folder."""
    (tmp_path / "refseg_jax").symlink_to(REPO / "refseg_jax")
    config = f"{REPO}/configs/alignformer.py:refcocco"
    done = main("--config", config, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "did you mean 'refcoco'" in done.stderr, done.stderr
    (tmp_path / "own.py").write_text("import nonsense")
    done = main("--config", f"{tmp_path}/own.py")
    assert done.returncode == 2 and done.stderr == "error: No module named 'nonsense'\n"


def test_a_home_is_found_behind_an_equals_sign(tmp_path):
    (tmp_path / "data").mkdir()
    done = main(
        *("--config=configs/alignformer.py:refcoco", "--config.data.tokenizer=shapes"),
        *("--config.data.root=~/data", "--workdir=~/run"), HOME=str(tmp_path),
    )  # fmt: skip
    expected = f"config.data.root={tmp_path}/data: {tmp_path}/data/refcoco/"
    assert done.returncode == 2 and expected in done.stderr, done.stderr


def small(workdir):
    """Arguments for a run of the tiny config."""
    config = "--config", "configs/alignformer.py"
    return [*config, "--workdir", str(workdir), *tiny.flags(mesh__data=1)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(its directory, the process that is done with it); it took 10 steps."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = main(*small(workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_whole_run_and_evaluating_it_again(whole_run):
    workdir, done = whole_run
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 10 and summary["workdir"] == str(workdir)
    assert summary["seconds"] > summary["seconds_to_first_step"] > 0
    for name in ("val/mIoU", "val/oIoU", "testA/mIoU", "testB/oIoU", "val/mIoU_shuffled"):
        assert 0 <= summary[name] <= 1
    html = pathlib.Path(summary["report"]).read_text()
    assert html.count("data:image/") > 3 and "http" not in html.replace("http://www.w3.org", "")
    results = json.loads((workdir / "results.json").read_text())["results"]
    assert results["val"]["sentences"] == 2 * 9 and results["val"]["protocol"] == "original"
    assert results["val"]["by_kind"]
    assert (workdir / "tensorboard").is_dir()

    changes = "--config.eval.protocol=input", "--config.train.steps=7654"
    again = main(*small(workdir), "--mode", "evaluate", *changes)
    assert again.returncode == 0 and "WARNING" not in again.stderr, again.stderr
    assert "steps" not in json.loads(again.stdout.splitlines()[-1])
    assert "7654" not in pathlib.Path(summary["report"]).read_text()
    assert (
        json.loads((workdir / "results.json").read_text())["results"]["val"]["protocol"] == "input"
    )


def final_params(workdir):
    with checkpoint.Checkpoints(str(workdir)) as checkpoints:
        step = checkpoints.last.latest_step()
        return step, leaves(checkpoints.last.restore(step))


def test_a_run_killed_twice_ends_where_an_unbroken_one_ends(whole_run, tmp_path):
    """Bit for bit, with everything that has state: optimiser, averages, dropout keys, data."""
    (unbroken, _), broken = whole_run, tmp_path / "broken"

    def steps_taken():
        metrics = broken / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def kill_after(steps, number, *flags):
        steps += steps_taken()
        process = subprocess.Popen(
            [*PROGRAM, *small(broken), *flags],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        deadline = time.time() + 300
        while steps_taken() < steps:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=180)
        return process.returncode, stderr

    status, stderr = kill_after(3, signal.SIGTERM, "--config.data.workers=1")
    assert b"Traceback" not in stderr
    assert status == TERMINATED and b"stopped by SIGTERM at step" in stderr
    status, stderr = kill_after(1, signal.SIGKILL)
    assert status == -signal.SIGKILL and b"resumed at step" in stderr
    done = main(*small(broken))
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    (step, expected), (resumed_step, resumed) = final_params(unbroken), final_params(broken)
    assert step == resumed_step == 10
    assert all(np.array_equal(x, y) for x, y in zip(expected, resumed, strict=True))

    rows, expected = ([json.loads(s) for s in (d / "metrics.jsonl").read_text().splitlines()]
                      for d in (broken, unbroken))  # fmt: skip
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    assert [r.get("loss") for r in rows] == [r.get("loss") for r in expected]
