"""launch/local.sh: real processes, of a stand-in of the program."""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.stand_ins import LAUNCH, TIMEOUT, TRAINING, bash, script

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


def test_a_port_of_another_run_is_refused():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["--processes", "2", "--port", port, "--program", "/bin/false", "--", "x"]
        done = subprocess.run([LAUNCH / "local.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2 and f"port {port} is in use" in done.stderr


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
