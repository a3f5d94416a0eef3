"""launch/slurm.sh and the job that it queues."""

import shutil
import sys

import pytest

from tests.launch.stand_ins import LAUNCH, TRAINING, bash, option, script


def test_slurm_has_a_process_per_gpu_that_sees_all(tools):
    options = ["--nodes", "2", "--gpus", "4", "--cpus", "6", "--time", "4:00:00"]
    tools.bash(*script("slurm.sh", *options, "--", *TRAINING))
    (call,) = tools.calls
    at = call.index(str(LAUNCH / "slurm_job.sh"))
    assert call[at + 1 :] == [sys.executable, "-m", "refseg_jax.main", *TRAINING]
    assert option(call[:at], "nodes") == "2" and option(call[:at], "time") == "4:00:00"
    assert option(call[:at], "ntasks-per-node") == option(call[:at], "gpus-per-node") == "4"
    assert option(call[:at], "cpus-per-task") == "6" and "--requeue" in call[:at]
    assert option(call[:at], "signal").startswith("B:USR1@")
    assert not any("gpus-per-task" in word for word in call)


@pytest.mark.parametrize(
    "signals, status, expected",
    [
        ([], 0, []),
        ([], 3, []),
        (["USR1"], 2, [["scancel", "--signal=TERM", "77"], ["scontrol", "requeue", "77"]]),
        (["USR1"], 0, [["scancel", "--signal=TERM", "77"]]),  # Finished in the last minutes.
        (["TERM"], 2, []),  # Canceled: it must not come back.
        (["TERM"], 143, []),
    ],
)
def test_a_job_at_its_limit_is_saved_and_queued_again(signals, status, expected, tools):
    send = "".join(f"kill -s {name} $PPID; " for name in signals)
    step = tools.folder / "bin/srun"
    sleep = shutil.which("sleep")
    lines = ["#!/bin/sh", f'echo "$@" >{tools.folder}/srun', send, f"{sleep} 0.3"]
    step.write_text("\n".join([*lines, f"exit {status}\n"]))
    done = bash(
        *script("slurm_job.sh", "python", "a b"), path=tools.path,
        SLURM_JOB_ID="77", SLURM_CPUS_PER_TASK="6", **tools.environ,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert tools.calls == expected
    words = (tools.folder / "srun").read_text().split()
    assert words[-3:] == ["python", "a", "b"] and "--cpus-per-task=6" in words
    assert "--gpu-bind=none" in words and "--kill-on-bad-exit=1" in words


@pytest.mark.parametrize(
    "at, expected", [("2026-12-01T03:04:52", ["show", "requeue"]), ("None", ["show"])]
)
def test_a_job_that_was_preempted_with_time_to_save_is_queued_again(at, expected, tools):
    (tools.folder / "bin/srun").write_text("#!/bin/sh\nexit 143\n")
    tools.answer(("show", f"PreemptEligibleTime=2026-12-01T00:00:00 PreemptTime={at}", 0))
    done = bash(
        *script("slurm_job.sh", "python"), path=tools.path, SLURM_JOB_ID="77", **tools.environ
    )
    assert done.returncode == 143, done.stderr
    assert [call[:1] + call[1:2] for call in tools.calls] == [
        ["scontrol", word] for word in expected
    ]


def test_a_controller_that_does_not_answer_is_asked_again(tools):
    step = tools.folder / "bin/srun"
    step.write_text(f"#!/bin/sh\nkill -s USR1 $PPID\n{shutil.which('sleep')} 0.3\nexit 2\n")
    tools.answer(("scancel", "", 1), ("scontrol", "", 1))
    done = bash(
        *script("slurm_job.sh", "python"), path=tools.path, SLURM_JOB_ID="77", **tools.environ
    )
    assert done.returncode == 2, done.stderr
    assert [call[0] for call in tools.calls] == ["scancel"] * 2 + ["scontrol"] * 2


@pytest.mark.parametrize(
    ("time", "enough"),
    [("10", False), ("0:10:00", False), ("9:59", False), ("10:30", True), ("0-0:11", True)],
)
def test_a_job_has_time_to_be_saved(time, enough, tools):
    options = ["--nodes", "1", "--gpus", "1", "--time", time, "--dry-run"]
    done = tools.bash(*script("slurm.sh", *options, "--", *TRAINING), check=False)
    assert (done.returncode == 0) == enough and ("too short" in done.stderr) != enough
