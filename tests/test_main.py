"""The command line: bad input is one clear line and exit status 2; a whole run prints JSON last."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import tiny

REPO = pathlib.Path(__file__).resolve().parents[1]


def main(*arguments, cwd=REPO, **env):
    return subprocess.run(
        [sys.executable, "-m", "refseg_jax.main", *arguments],
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


def test_a_whole_run_and_evaluating_it_again(tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config", "configs/alignformer.py", "--workdir", str(workdir), *tiny.flags()]
    done = main(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 6 and summary["workdir"] == str(workdir)
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
    again = main(*arguments, "--mode", "evaluate", *changes)
    assert again.returncode == 0 and "WARNING" not in again.stderr, again.stderr
    assert "steps" not in json.loads(again.stdout.splitlines()[-1])
    assert "7654" not in pathlib.Path(summary["report"]).read_text()
    assert (
        json.loads((workdir / "results.json").read_text())["results"]["val"]["protocol"] == "input"
    )
