"""The launch scripts: linted, dry-run, run against stand-ins of the clouds' tools, and, the local
launcher, for real.

A stand-in writes down how it was called and gives the answer that it was told to give. That a cloud
takes what the scripts ask for is not tested here.
"""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = REPO / "launch"
BASH = shutil.which("bash")
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "common.sh")
TIMEOUT = 240  # Seconds; far beyond what anything takes, so that a hang ends.
BUCKET = "gs://bucket/run 1"
# What a shell, YAML, Kubernetes or systemd would spoil if it were not quoted.
TRAINING = [
    "--config",
    "configs/alignformer.py:refcoco,small",
    f"--workdir={BUCKET}",
    '--config.data.root=gs://bucket/it\'s "mine" & yours',
    "--config.optim.groups=((r'(scale|bias)$', 1.0, 0.0), ('$(HOME)$$ %h #', 0.1, 1.0))",
]
POD = ["--name", "pod", "--zone", "us-west4-a"]
KIND = ["--type", "v5litepod-16", "--runtime", "v2-alpha-tpuv5-lite"]
JOBSET = ["--name", "run", "--image", "registry/refseg:1"]
TPU = [*JOBSET, "--accelerator", "tpu-v5-lite-podslice"]
GPU = [*JOBSET, "--accelerator", "nvidia-l4", "--hosts", "3", "--gpus", "8"]
# All that the scripts may use of a machine; the real tools of a cloud are never within reach.
PLAIN = ("awk", "bash", "cat", "dirname", "env", "gzip", "id", "mkdir", "sh", "sleep", "tar")
TOOLS = ("docker", "gcloud", "kubectl", "sbatch", "scancel", "scontrol", "srun", "sudo")

STAND_IN = """#!{python} -SE
import json, os, pathlib, sys, time
name, calls = os.path.basename(sys.argv[0]), pathlib.Path(os.environ["CALLS"])
stdin = sys.stdin.read() if name == "kubectl" else ""
with calls.open("a") as file:
    file.write(json.dumps([name, *sys.argv[1:], *([stdin] if stdin else [])]) + "\\n")
answers = pathlib.Path(os.environ["ANSWERS"])
left = json.loads(answers.read_text()) if answers.exists() else []
for i, (words, text, status) in enumerate(left):
    if words in " ".join([name, *sys.argv[1:]]):
        answers.write_text(json.dumps(left[:i] + left[i + 1 :]))
        print(text)
        sys.exit(status)
"""


class Tools:
    """Stand-ins of the clouds' tools: `calls` has the words of every call, in order."""

    def __init__(self, folder: pathlib.Path, plain: pathlib.Path):
        self.folder = folder
        self.path = f"{folder / 'bin'}:{plain}"
        self._calls, self._answers = folder / "calls", folder / "answers"
        self.environ = {"CALLS": str(self._calls), "ANSWERS": str(self._answers)}
        for name in TOOLS:
            tool = folder / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(STAND_IN.format(python=sys.executable))
            tool.chmod(0o755)
        (folder / "bin" / "sleep").symlink_to(shutil.which("true"))

    def answer(self, *answers: tuple[str, str, int]) -> None:
        """(words, text, exit status): for the next call with `words` in it, once."""
        self._answers.write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        """The calls so far; they are forgotten."""
        if not self._calls.exists():
            return []
        lines = self._calls.read_text().splitlines()
        self._calls.unlink()
        return [json.loads(line) for line in lines]

    def bash(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs bash where the tools are the stand-ins."""
        done = bash(*arguments, path=self.path, **self.environ)
        assert not check or done.returncode == 0, done.stderr
        return done


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of programs, for PATH: PLAIN and no others."""
    folder = tmp_path_factory.mktemp("plain")
    for name in PLAIN:
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.fixture
def tools(tmp_path, plain):
    return Tools(tmp_path, plain)


def bash(*arguments, path, **environ):
    return subprocess.run(
        [BASH, *arguments], capture_output=True, text=True, timeout=TIMEOUT, cwd=REPO,
        env={"PATH": path, "HOME": "/nowhere", "PYTHON": sys.executable, **environ},
    )  # fmt: skip


def script(name, *arguments):
    return [str(LAUNCH / name), *arguments]


def option(call, name):
    """The value of --name=value in a call."""
    (value,) = [word.partition("=")[2] for word in call if word.startswith(f"--{name}=")]
    return value


# All scripts.


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
        (["tpu.sh", "keep", *POD, *KIND, "--", "--config=gs://x"], "--workdir gs://BUCKET/RUN"),
        (["gke.sh", *JOBSET, "--", *TRAINING], "--accelerator is missing"),
        (["gke.sh", *TPU, "--", *TRAINING], "--hosts is missing"),
        (["gke.sh", *TPU, "--topology", "4by4", "--", *TRAINING], "--topology is '4by4'"),
        (["gke.sh", *TPU, "--topology", "1x2", "--", *TRAINING], "1x2 has 2 chips"),
        (["gke.sh", *GPU, "--topology", "4x4", "--", *TRAINING], "--hosts and --gpus are for GPUs"),
        (["gke.sh", *GPU, "--", "--config", "x"], "--workdir gs://BUCKET/RUN"),
        (["gke.sh", *GPU, "--", *TRAINING, "a\nb"], "a line break or tab in 'a b'"),
        (["slurm.sh", "--nodes", "2", "--", "x"], "--gpus is missing"),
        (["slurm.sh", "--nodes", "2", "--gpus", "4"], "arguments of training are missing"),
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
        ["tpu.sh", "start", *POD, "--", *TRAINING],
        ["tpu.sh", "watch", *POD],
        ["tpu.sh", "stop", *POD],
        ["tpu.sh", "delete", *POD],
        ["gke.sh", *TPU, "--topology", "4x4", "--spot", "--", *TRAINING],
        ["gke.sh", *GPU, "--", *TRAINING],
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


# Cloud TPU.


def remote(tools, command):
    """What systemd starts where a worker's shell is given `command`."""
    pathlib.Path(tools.folder, "refseg_jax").mkdir(exist_ok=True)
    tools.bash("-c", f"cd {shlex.quote(str(tools.folder))}; {command}")
    (call,) = [c for c in tools.calls if "systemd-run" in c]
    at = call.index("--")
    assert call[:2] == ["sudo", "systemd-run"] and "--property=KillMode=mixed" in call[:at]
    assert option(call[:at], "working-directory") == str(tools.folder / "refseg_jax")
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


def active(progress):
    return ("describe", "WARNING: a word of gcloud\nACTIVE", 0), ("SubState", progress, 0)


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
    assert steps == ["systemd-run", "systemd-run"]  # The pod stays, for a look at its log.


def test_keep_ends_where_there_can_be_no_pod(tools):
    done, steps = keep(tools, NONE, ("create", "no such type", 1))
    assert done.returncode == 2 and "refused" in done.stderr and steps == ["create"]
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
    assert text.count("--worker=all") == 3 and text.count("--spot") == 1


# Kubernetes.

# A mapping has these keys and no others (a "?" at the end: or not), a list has items such as its
# only one, <int> and <str> are types; all else is as it stands here. The fields are those of JobSet
# v1alpha2, Job batch/v1 and the pod of core/v1.
SCHEMA = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: <str>
  annotations?:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: <int>
    rules:
    - name: <str>
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: <int>
        parallelism: <int>
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget}]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: <int>
            serviceAccountName: <str>
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator?: <str>
              cloud.google.com/gke-tpu-topology?: <str>
              cloud.google.com/gke-accelerator?: <str>
              cloud.google.com/gke-spot?: "true"
            containers:
            - name: <str>
              image: <str>
              securityContext?: {privileged: true}
              args: [<str>]
              resources:
                limits:
                  google.com/tpu?: <int>
                  nvidia.com/gpu?: <int>
              volumeMounts: [{name: memory, mountPath: /dev/shm}]
            volumes: [{name: memory, emptyDir: {medium: Memory}}]
"""


def check(value, schema, path=""):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        known = {key.removesuffix("?"): part for key, part in schema.items()}
        missing = {key for key in schema if not key.endswith("?")} - value.keys()
        assert value.keys() <= known.keys() and not missing, f"{path}: {set(value)}"
        for key, part in value.items():
            check(part, known[key], f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for item in value:
            check(item, schema[0], f"{path}[]")
    else:
        expected = {"<int>": int, "<str>": str}.get(schema, type(schema))
        assert type(value) is expected, f"{path}: {value!r}"
        assert schema in ("<int>", "<str>", value), f"{path}: {value!r}"


def jobset(tools, *arguments):
    """The document, the Job's and the pod's spec, the container, and the words it runs with."""
    tools.bash(*script("gke.sh", *arguments, "--", *TRAINING))
    (call,) = tools.calls
    assert call[:-1] == ["kubectl", "create", "--filename", "-"]
    document = yaml.safe_load(call[-1])
    check(document, yaml.safe_load(SCHEMA))
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Kubernetes expands $(NAME), and reads $$ as $.
    words = [re.sub(r"\$\$", "$", word) for word in container["args"]]
    return document, job, pod, container, words


@pytest.mark.parametrize(
    "arguments, hosts, chips",
    [
        (["--topology", "4x4"], 4, 4),
        (["--topology", "2x2x4"], 4, 4),
        (["--topology", "2x4", "--chips", "8"], 1, 8),
        (["--topology", "16x16", "--spot"], 64, 4),
    ],
)
def test_a_slice_has_a_pod_on_every_host(arguments, hosts, chips, tools):
    document, job, pod, container, words = jobset(tools, *TPU, *arguments)
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    selector = pod["nodeSelector"]
    assert selector.pop("cloud.google.com/gke-tpu-accelerator") == "tpu-v5-lite-podslice"
    assert selector.pop("cloud.google.com/gke-tpu-topology") == arguments[1]
    assert list(selector) == ["cloud.google.com/gke-spot"] * ("--spot" in arguments)
    assert container["image"] == "registry/refseg:1" and document["metadata"]["name"] == "run"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert words == TRAINING  # GKE tells JAX the rest.
    assert all("$" not in word.replace("$$", "") for word in container["args"])


def test_gpu_pods_are_told_where_they_are(tools):
    _, job, pod, container, words = jobset(tools, *GPU, "--restarts", "4")
    assert job["parallelism"] == job["completions"] == 3
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert words[: len(TRAINING)] == TRAINING
    assert words[len(TRAINING) :] == [
        "--coordinator", "run-workers-0-0.run:8476", "--num_processes", "3",
        "--process_id", "$(JOB_COMPLETION_INDEX)",
    ]  # fmt: skip


# SLURM.


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


# Containers.


def test_the_container_runs_the_front_door():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    values = {}
    for word, value in steps:
        values.setdefault(word, []).append(value)
    (base,) = values["FROM"]
    assert re.fullmatch(r"python:3\.\d+(\.\d+)?-slim-\w+", base)  # A tag that stays what it is.
    assert json.loads(values["ENTRYPOINT"][0]) == ["python", "-m", "refseg_jax.main"]
    assert steps[-1][0] == "ENTRYPOINT" and values["ARG"] == ["EXTRA=cuda"]
    assert any("pip install" in run and ".[$EXTRA]" in run for run in values["RUN"])
    assert set(values) == {"FROM", "ENV", "WORKDIR", "COPY", "ARG", "RUN", "ENTRYPOINT"}
    lines = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line for line in lines if not line.startswith("#")]
    assert allowed[0] == "*"  # Nothing goes in but what is named: no data, runs or credentials.
    for copy in values["COPY"]:
        *sources, _ = copy.split()
        for source in sources:
            assert (REPO / source).exists() and f"!{source.split('/')[0]}" in allowed
    copied = [c.split()[0] for c in values["COPY"]]
    assert {"configs", "refseg_jax"} <= set(copied)
    extras = (REPO / "pyproject.toml").read_text()
    assert "\ncuda = [" in extras and "\ntpu = [" in extras


def test_a_container_is_built_for_what_it_runs_on(tools):
    tag = "registry/refseg:1"
    tools.bash(*script("container.sh", "--for", "tpu", "--tag", tag, "--push"))
    build, push = tools.calls
    assert build[:2] == ["docker", "build"] and build[-1] == str(REPO)
    assert option(build, "build-arg") == "EXTRA=tpu" and option(build, "tag") == tag
    assert option(build, "file") == str(LAUNCH / "Dockerfile") and push == ["docker", "push", tag]


# Local processes, for real.

PROGRAM = """#!{python}
import fcntl, json, os, pathlib, signal, subprocess, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
me, out = words["--process_id"], pathlib.Path(words["--workdir"])

def note(number, _):
    with (out / f"signals{{me}}").open("a") as file:
        file.write(signal.Signals(number).name + " ")
    if words["--do"] == "wait":
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # Long enough for a signal too many.

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(2))  # As a run that was saved.
if words["--do"] == "hang" and me == "0":
    lock = open(out / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    # A worker of its own.
    subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()], stdout=-3, stderr=-3)
environ = {{k: v for k, v in os.environ.items() if k.startswith("JAX_")}}
(out / f"{{me}}.tmp").write_text(json.dumps([words, environ]))
(out / f"{{me}}.tmp").rename(out / f"{{me}}.json")
if words["--do"] == "finish":
    sys.exit(0)
if words["--do"] == "hang" and me == "1":
    while len(list(out.glob("*.json"))) < 3:
        time.sleep(0.01)
    sys.exit(7)
for _ in range(60000):
    time.sleep(0.01)
"""


def local(tmp_path, do, processes=3):
    program = tmp_path / "stand in"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return subprocess.Popen(
        [LAUNCH / "local.sh", "--processes", str(processes), "--program", program, "--grace", "3"]
        + ["--", "--workdir", tmp_path, "--do", do, "--text", "a 'b' $c"],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def written(tmp_path, pattern, count):
    """The files of a pattern, once there are `count`."""
    deadline = time.monotonic() + TIMEOUT
    while len(files := sorted(tmp_path.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{len(files)} of {count} {pattern}"
        time.sleep(0.02)
    return files


def test_local_processes_know_who_they_are(tmp_path):
    process = local(tmp_path, "finish")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and output == ""
    records = [json.loads(file.read_text()) for file in written(tmp_path, "*.json", 3)]
    assert [words["--process_id"] for words, _ in records] == ["0", "1", "2"]
    for words, environ in records:
        assert words["--num_processes"] == "3" and words["--coordinator"] == "localhost:8476"
        assert words["--text"] == "a 'b' $c"
        assert environ["JAX_PLATFORMS"] == "cpu"
        assert environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] == "gloo"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_reaches_every_local_process_once(name, tmp_path):
    process = local(tmp_path, "wait")
    written(tmp_path, "*.json", 3)
    if name == "SIGINT":  # A terminal sends Ctrl-C to all that it holds for the same program.
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2 and output == ""
    got = [file.read_text() for file in written(tmp_path, "signals*", 3)]
    assert got == [f"{name} "] * 3


def test_a_failing_local_process_ends_the_others(tmp_path):
    process = local(tmp_path, "hang")  # 1 fails; the others catch SIGTERM and stay.
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 7, output
    assert output.startswith("process 1 ended with status 7")
    asked = [file.read_text() for file in written(tmp_path, "signals*", 2)]
    assert asked == ["SIGTERM "] * 2
    with (tmp_path / "lock").open("w") as lock:  # Held by the worker for as long as it lives.
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a worker of a killed process goes on"
                time.sleep(0.05)


def test_a_local_dry_run_has_a_line_per_process(plain):
    words = ["--dry-run", "--processes", "2", "--", *TRAINING]
    done = bash(*script("local.sh", *words), path=plain)
    *commands, wait = done.stdout.splitlines()
    assert done.returncode == 0 and wait == "wait" and len(commands) == 2
    for i, command in enumerate(commands):
        words = shlex.split(command)
        assert words[-1] == "&" and words[-3:-1] == ["--process_id", str(i)]
        at = words.index(sys.executable)
        assert words[0] == "env" and words[at + 1 : at + 3] == ["-m", "refseg_jax.main"]
        assert words[at + 3 : at + 3 + len(TRAINING)] == TRAINING


# The documentation.


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
