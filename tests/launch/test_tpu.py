"""launch/tpu.sh: a pod of Cloud TPUs, set up, started, and kept through preemptions."""

import pathlib
import shlex
import subprocess

from tests.launch.stand_ins import KIND, POD, TRAINING, bash, option, script


def remote(tools, command, variables=None):
    """What systemd starts where a worker's shell is given `command`; `variables`: with which."""
    pathlib.Path(tools.folder, "refseg_jax").mkdir(exist_ok=True)
    tools.bash("-c", f"cd {shlex.quote(str(tools.folder))}; {command}")
    (call,) = [c for c in tools.calls if "systemd-run" in c]
    at = call.index("--")
    assert call[:2] == ["sudo", "systemd-run"] and "--property=KillMode=mixed" in call[:at]
    assert "--property=After=network-online.target" in call[:at]  # It saves to a bucket as it ends.
    assert option(call[:at], "working-directory") == str(tools.folder / "refseg_jax")
    if variables is not None:
        variables += [w.partition("=")[2] for w in call[:at] if w.startswith("--setenv=")]
    # systemd expands $NAME in what it runs, and reads $$ as $.
    assert all("$" not in word.replace("$$", "") for word in call[at:])
    return [word.replace("$$", "$") for word in call[at + 1 :]]


def test_training_starts_on_all_workers_with_the_words_unchanged(tools):
    tools.bash(*script("tpu.sh", "start", *POD, "--", *TRAINING))
    (call,) = tools.calls
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert option(call, "worker") == "all" and option(call, "zone") == "us-west4-a"
    python = str(tools.folder / "refseg_jax/.venv/bin/python")
    assert remote(tools, option(call, "command")) == [python, "-m", "refseg_jax.main", *TRAINING]


def test_training_has_the_environment(tools):
    variables = ["JAX_COMPILATION_CACHE_DIR=gs://bucket/it's", "XLA_FLAGS=--a=$b --c"]
    words = [word for variable in variables for word in ("--env", variable)]
    tools.bash(*script("tpu.sh", "start", *POD, *words, "--", *TRAINING))
    (call,) = tools.calls
    set_there = []
    started = remote(tools, option(call, "command"), set_there)
    assert started[3:] == TRAINING and set_there == ["PYTHONUNBUFFERED=1", *variables]


def test_spot_is_asked_for_and_only_then(tools):
    for spot in ([], ["--spot"]):
        tools.bash(*script("tpu.sh", "create", *POD, *KIND, *spot))
        (call,) = tools.calls
        assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
        assert [w for w in call if w == "--spot"] == spot
        assert option(call, "node-id") == "pod"
        assert option(call, "accelerator-type") == "v5litepod-16"
        assert option(call, "runtime-version") == "v2-alpha-tpuv5-lite"


def test_install_sends_the_code_to_all_workers(tools):
    tools.bash(*script("tpu.sh", "install", *POD))
    copy, command = tools.calls
    assert option(copy, "worker") == option(command, "worker") == "all"
    archive = pathlib.Path(copy[copy.index("scp") + 1])
    names = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True).stdout.split()
    assert {"pyproject.toml", "requirements.txt", "refseg_jax/main.py"} < set(names)
    assert "configs/alignformer.py" in names and not any("__pycache__" in n for n in names)
    assert not [n for n in names if n.startswith((".", "tests", "runs", "data", "build"))]
    assert "--editable '.[tpu]'" in option(command, "command")
    assert archive.name in option(command, "command")


def keep(tools, *answers, restarts=3):
    tools.answer(*answers)
    done = tools.bash(
        *script("tpu.sh", "keep", *POD, *KIND, "--spot", "--restarts", str(restarts)),
        *["--", *TRAINING],
        check=False,
    )
    steps = []
    for call in tools.calls:
        step = next(w for w in ("create", "describe", "delete", "scp", "ssh") if w in call)
        words = " ".join(call)
        if step == "ssh":
            step = next(w for w in ("systemd-run", "SubState", "install") if w in words)
        if step == "systemd-run":
            assert "'alignformer" not in words and "--config configs/alignformer.py" in words
        steps.append(step)
    return done, [s for s in steps if s not in ("describe", "SubState")]


NONE = ("describe", "ERROR: (gcloud) NOT_FOUND: there is none", 1)
START = ["scp", "install", "systemd-run"]


def active(progress, status=0):
    said = f"WARNING: a word of gcloud\nExecMainStatus={status}\nSubState={progress}"
    return ("describe", "WARNING: a word of gcloud\nACTIVE", 0), ("SubState", said, 0)


def test_keep_goes_on_after_a_preemption(tools):
    done, steps = keep(
        tools,
        NONE, ("describe", "WAITING_FOR_RESOURCES", 0), *active("dead"), *active("failed"),
        ("describe", "ACTIVE", 0), ("SubState", "no route to host", 255),
        ("describe", "SUSPENDING", 0), ("describe", "SUSPENDED", 0),
        NONE, *active("dead"), *active("failed"), *active("running"), *active("exited"),
        restarts=1,  # On each pod.
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pod = ["create", *START, "systemd-run", "delete"]
    assert steps == pod * 2
    assert "preempted" in done.stdout and done.stdout.endswith("# the run is finished\n")


def test_keep_takes_up_a_run_and_waits_for_a_worker(tools):
    done, steps = keep(
        tools, *active("running"), *active("dead"), ("scp", "not yet", 1), *active("dead"),
        *active("exited"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps == ["scp", *START, "delete"]  # Not created, and not started where a copy failed.


def test_keep_starts_what_failed_a_few_times(tools):
    failed = active("failed")
    done, steps = keep(tools, *active("running"), *failed, *failed, *failed, restarts=2)
    assert done.returncode == 2 and "--restarts 2 are used up" in done.stderr
    assert steps == ["systemd-run"] * 2  # The pod stays, for a look at its log.


def test_a_stopped_run_starts_again_and_is_no_failure(tools):
    done, steps = keep(tools, *active("failed", 143) * 3, *active("exited"), restarts=1)
    assert done.returncode == 0, done.stderr
    assert steps == ["systemd-run"] * 3 + ["delete"] and done.stdout.count("told to stop") == 3
    # But that it does not start is one.
    broken = *active("failed", 143), ("systemd-run", "no route to host", 255)
    done, steps = keep(tools, *broken * 3, restarts=2)
    assert done.returncode == 2 and "could not be started, and --restarts 2" in done.stderr
    assert steps == ["systemd-run"] * 3


def test_a_pod_that_is_gone_is_deleted_before_its_request_says_so(tools):
    gone = 'ERROR: (gcloud) This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'
    done, steps = keep(
        tools, ("describe", "ACTIVE", 0), ("SubState", gone, 1), NONE, *active("dead"),
        *active("exited"), restarts=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps == ["delete", "create", *START, "delete"]


def test_a_worker_that_is_as_new_is_installed(tools):
    lost = *active("failed"), ("systemd-run", "cd: refseg_jax: No such file or directory", 1)
    done, steps = keep(tools, *lost, *active("exited"))
    assert done.returncode == 0, done.stderr
    assert steps == ["systemd-run", *START, "delete"]


def test_a_look_asks_for_what_it_reads(tools):
    tools.answer(*active("exited"))
    tools.bash(*script("tpu.sh", "keep", *POD, *KIND), "--", *TRAINING)
    _, asked, _ = tools.calls
    assert option(asked, "command").endswith(" --property=SubState,ExecMainStatus")


def test_keep_gives_up_on_a_worker_that_does_not_answer(tools):
    up, silent = active("")[0], (
        "SubState", "pod: Permission denied (publickey)\nERROR: (gcloud) exited with 255", 255
    )  # fmt: skip
    done, steps = keep(tools, *[up, silent] * 2, *active("running"), *[up, silent] * 4, restarts=3)
    assert done.returncode == 2 and steps == []
    # The reason, in each line; and that a pod costs money until it is deleted, and how.
    line = "Permission denied (publickey) ERROR: (gcloud) exited with 255 (2 of 3)"
    assert done.stdout.count(line) == 2
    assert "Permission denied" in done.stderr and "--restarts 3 are used up" in done.stderr
    assert "delete --name pod --zone=us-west4-a" in done.stderr


def test_silence_on_one_pod_is_none_on_the_next(tools):
    up, silent = active("")[0], ("SubState", "no route to host", 255)
    done, steps = keep(
        tools, up, silent, ("describe", "SUSPENDED", 0), NONE, up, silent, *active("exited"),
        ("delete", "", 0), ("delete", "not yet", 1), restarts=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps == ["delete", "create", "delete", "delete"]  # The last one again until it is done.


def test_keep_gives_up_where_nothing_is_said(tools):
    done, steps = keep(tools, *[("describe", "", 0)] * 2, restarts=1)
    assert done.returncode == 2 and "nothing is said" in done.stderr and steps == []


def test_keep_ends_where_there_can_be_no_pod(tools):
    done, steps = keep(tools, NONE, ("create", "no such type", 1))
    assert done.returncode == 2 and "refused" in done.stderr and steps == ["create"]
    # One that there was there may be again.
    preempted = ("describe", "SUSPENDED", 0), ("delete", "", 0)
    done, steps = keep(tools, *preempted, *[NONE, ("create", "none left", 1)] * 2, restarts=1)
    assert done.returncode == 2 and steps == ["delete", "create", "create"]
    assert "refused (1 of 1)" in done.stdout + done.stderr
    done, steps = keep(tools, *[("describe", "not logged in", 1)] * 3, restarts=2)
    assert done.returncode == 2 and "not logged in" in done.stderr and steps == []


def test_a_dry_run_of_keep_shows_a_whole_round(plain):
    words = ["keep", "--dry-run", *POD, *KIND, "--spot", "--", *TRAINING]
    done = bash(*script("tpu.sh", *words), path=plain)
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout
    order = ["queued-resources create", "describe", "scp", "pip install", "systemd-run", "SubState"]
    places = [text.index(word) for word in [*order, "# after a preemption", "delete"]]
    assert places == sorted(places)
    # Of what is pasted nothing deletes the pod.
    assert not [line for line in text.splitlines() if " delete " in line and line[0] != "#"]
    assert text.count("--worker=all") == 3 and text.count("--spot") == 1
