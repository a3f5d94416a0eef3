"""All launch scripts: linted, their help, bad arguments, dry runs, and the page about them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_ins import (
    GPU,
    JOBSET,
    KIND,
    LAUNCH,
    POD,
    REPO,
    SCRIPTS,
    TIMEOUT,
    TPU,
    TRAINING,
    bash,
    script,
)


def test_scripts_are_clean(plain):
    names = [str(path) for path in LAUNCH.glob("*.sh")]
    assert len(names) == 7
    for name in names:
        assert bash("-n", name, path=plain).returncode == 0, name
        if not name.endswith("common.sh"):
            assert "set -euo pipefail\n" in pathlib.Path(name).read_text()
            assert os.access(name, os.X_OK), name
    linter = pathlib.Path(sys.executable).with_name("shellcheck")
    linter = str(linter) if linter.exists() else shutil.which("shellcheck")
    if linter is None:
        pytest.skip("no shellcheck: pip install -r requirements-test.txt")
    done = subprocess.run([linter, *names], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_nothing(name, plain):
    done = bash(*script(name, "--help"), path=plain)
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{name} " in done.stdout and "--dry-run" in done.stdout
    assert "#!" not in done.stdout and "set -e" not in done.stdout


@pytest.mark.parametrize(
    "words, expected",
    [
        (["local.sh"], "--processes is missing"),
        (["local.sh", "--processes", "two", "--", "x"], "--processes is 'two'"),
        (["local.sh", "--processes", "0", "--", "x"], "--processes is '0'"),
        (["local.sh", "--processes", "--", "x"], "--processes needs a value"),
        (["local.sh", "--processes=", "--", "x"], "--processes needs a value"),
        (["local.sh", "--processes", "2"], "arguments of training are missing"),
        (["local.sh", "--proceses", "2"], "unknown option --proceses"),
        (["local.sh", "train"], "unexpected argument 'train'"),
        (["tpu.sh"], "one of these is missing: keep"),
        (["tpu.sh", "crate", *POD], "unexpected argument 'crate'"),
        (["tpu.sh", "create", "start", *POD], "unexpected argument 'start'"),
        (["tpu.sh", "create", "--name", "Pod"], "--name is 'Pod'"),
        (["tpu.sh", "create", "--name", "pod"], "--zone is missing"),
        (["tpu.sh", "create", *POD], "--type is missing"),
        (["tpu.sh", "create", *POD, *KIND, "--spot=yes"], "unexpected argument 'yes'"),
        (["tpu.sh", "start", *POD], "arguments of training are missing"),
        (["tpu.sh", "start", *POD, "--", "--workdir", "runs/x"], "--workdir gs://BUCKET/RUN"),
        (["tpu.sh", "start", *POD, "--", *TRAINING, "--workdir", "x"], "--workdir gs://BUCKET/RUN"),
        (["tpu.sh", "keep", *POD, *KIND, "--", "--config=gs://x"], "--workdir gs://BUCKET/RUN"),
        (["gke.sh", *JOBSET, "--", *TRAINING], "--accelerator is missing"),
        (["gke.sh", *TPU, "--", *TRAINING], "--topology is missing"),
        (["gke.sh", *TPU, "--hosts", "2", "--gpus", "4", "--", *TRAINING], "--topology is missing"),
        (["gke.sh", *GPU[:-4], "--", *TRAINING], "--hosts is missing"),
        (["gke.sh", *GPU, "--chips", "8", "--", *TRAINING], "--chips for TPUs"),
        (["gke.sh", *GPU, "--env", "A B=1", "--", *TRAINING], "--env is 'A B=1', not NAME=VALUE"),
        (["gke.sh", *GPU, "--env", "A=b\tc", "--", *TRAINING], "a line break or tab in 'A=b c'"),
        (["tpu.sh", "start", *POD, "--env", "--", *TRAINING], "--env needs a value"),
        (["slurm.sh", "--env", "A=1"], "unknown option --env"),
        (["gke.sh", *TPU, "--topology", "4by4", "--", *TRAINING], "--topology is '4by4'"),
        (["gke.sh", *TPU, "--topology", "1x2", "--", *TRAINING], "1x2 has 2 chips"),
        (["gke.sh", *GPU, "--topology", "4x4", "--", *TRAINING], "--hosts and --gpus are for GPUs"),
        (["gke.sh", *GPU, "--", "--config", "x"], "--workdir gs://BUCKET/RUN"),
        (["gke.sh", *GPU, "--", *TRAINING, "a\nb"], "a line break or tab in 'a b'"),
        (["slurm.sh", "--nodes", "2", "--", "x"], "--gpus is missing"),
        (["slurm.sh", "--nodes", "2", "--gpus", "4"], "arguments of training are missing"),
        (["slurm.sh", "--nodes", "2", "--gpus", "4", "--time", "10", "--", "x"], "10 is too short"),
        (
            ["slurm.sh", "--nodes=2", "--gpus=4", "--time=0:09:30", "--", "x"],
            "0:09:30 is too short",
        ),
        (["slurm.sh", "--nodes=2", "--gpus=4", "--time=0-0:5", "--", "x"], "0-0:5 is too short"),
        (["slurm_job.sh", "python"], "to be run by sbatch"),
        (["container.sh", "--for", "rocm", "--tag", "x"], "--for is 'rocm'"),
        (["container.sh", "--for", "tpu"], "--tag is missing"),
    ],
)
def test_bad_arguments_are_one_line(words, expected, tools):
    name, *arguments = words
    done = tools.bash(*script(name, *arguments), check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert expected in " ".join(done.stderr.split()) and "bound variable" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "a\nb" in words
    assert tools.calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["tpu.sh", "create", *POD, *KIND, "--spot"],
        ["tpu.sh", "state", *POD, "--project", "my-project"],
        ["tpu.sh", "install", *POD],
        ["tpu.sh", "start", *POD, "--env", "A=it's", "--", *TRAINING],
        ["tpu.sh", "watch", *POD],
        ["tpu.sh", "stop", *POD],
        ["tpu.sh", "delete", *POD],
        ["gke.sh", *TPU, "--topology", "4x4", "--spot", "--", *TRAINING],
        ["gke.sh", *GPU, "--env=A='b' $c", "--", *TRAINING],
        ["slurm.sh", "--nodes", "2", "--gpus", "4", "--time", "0-5", "--", *TRAINING],
        ["slurm.sh", "--nodes", "2", "--gpus", "4", "--time", "1-00:00:00", "--", *TRAINING],
        ["container.sh", "--for", "tpu", "--tag", "registry/refseg:1", "--push"],
    ],
)
def test_a_dry_run_prints_what_is_done(words, tools, plain):
    """The commands that are printed, pasted into a shell, do what the script does."""
    name, *arguments = words
    printed = bash(*script(name, "--dry-run", *arguments), path=plain)
    assert printed.returncode == 0 and printed.stderr == ""
    tools.bash(*script(name, *arguments))
    done = tools.calls
    assert done
    tools.bash("-c", printed.stdout)
    assert tools.calls == done


def test_every_command_of_the_page_is_one(plain):
    text = (REPO / "docs/launch.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    variables = "".join(f"{line}\n" for line in blocks if re.match(r"[A-Z]+=[-a-z0-9]+$", line))
    commands = [line for line in blocks if line.startswith("launch/")]
    assert {command.split()[0] for command in commands} == {
        f"launch/{name}" for name in SCRIPTS if name != "slurm_job.sh"
    }
    for command in commands:
        head, rest = command.split(maxsplit=1)
        done = bash("-c", f"{variables}{head} --dry-run {rest}", path=plain)
        assert done.returncode == 0, f"{command}: {done.stderr}"
