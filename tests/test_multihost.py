"""Several processes train one run: as one process does, each reading its share, ending together.

Run as a program, this file is one of the processes: the front door, with a model that compiles in a
second, a record of the rows that are read, and, if asked for, slow or with a fault.
"""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from absl import app

from refseg_jax import checkpoint, main, models, processes, train
from refseg_jax.data import pipeline
from refseg_jax.errors import TERMINATED, UserError
from tests import tiny
from tests.test_train import leaves
from tests.toy import Toy

REPO = pathlib.Path(__file__).resolve().parents[1]
STEPS, ROWS = 24, 8
TIMEOUT = 600  # Seconds; far beyond what a process takes, so that a hang ends.


def one_process(reads: str, pause: str, fault: str) -> None:
    """Records batches in the file `reads`; `pause` seconds before each is used.

    `fault`: at which batch it fails, or, as a negative number, sends itself SIGTERM.
    """
    sys.modules["torch"] = None  # TensorBoard's writer loads it where it is; that takes seconds.
    models.MODELS["alignformer"] = Toy
    load, to_device, steps = pipeline._Batches._load, train.to_device, []

    def recorded(self, sentences, texts):
        with open(reads, "a") as file:  # Threads read; one short line is written at once.
            file.write(json.dumps([type(self).__name__, list(sentences)]) + "\n")
        return load(self, sentences, texts)

    def slow(batch, mesh):
        steps.append(time.sleep(float(pause)))
        if len(steps) == int(fault):
            raise UserError("this process is told to fail")
        if len(steps) == -int(fault):
            signal.raise_signal(signal.SIGTERM)
        return to_device(batch, mesh)

    pipeline._Batches._load, train.to_device = recorded, slow
    app.run(main.main, flags_parser=main.parse_flags)


class Group:
    """The processes of one run on this machine, and what they printed."""

    def __init__(self, workdir, count, *, pause=0.0, fault=0, devices=2, apart=False, **changes):
        """`apart`: the last process has a folder of its own where the others have `workdir`."""
        self.workdir = workdir
        workdir.parent.mkdir(exist_ok=True)
        settings = dict(
            data__image_size=32, train__batch_size=ROWS, train__eval_every=5,
            train__checkpoint_every=4, optim__lr=1e-3, mesh__cpu_devices=devices,
            mesh__min_fsdp_size=8, **{"train__steps": STEPS, "mesh__data": -1, **changes},
        )  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        port = free_port()
        self.processes = []
        for i in range(count):
            joining = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
            command = [
                *(sys.executable, "-m", "tests.test_multihost"),
                *(self.path(i, "reads"), str(pause), str(fault * (i == count - 1))),
                *("--config", "configs/alignformer.py", "--workdir"),
                workdir.with_name("apart") if apart and i == count - 1 else workdir,
                *tiny.flags(**settings),
                *([*joining, f"--process_id={i}"] if count > 1 else []),
            ]
            with open(self.path(i, "stdout"), "w") as out, open(self.path(i, "stderr"), "w") as err:
                process = subprocess.Popen(
                    command, cwd=REPO, env=environment, stdout=out, stderr=err
                )
            self.processes.append(process)

    def path(self, i, what):
        return self.workdir.parent / f"{self.workdir.name}-{i}.{what}"

    def text(self, i, what):
        return self.path(i, what).read_text()

    def fail(self, why):
        for process in self.processes:
            process.kill()
        said = (f"--- process {i}\n{self.text(i, 'stdout')}{self.text(i, 'stderr')}"
                for i in range(len(self.processes)))  # fmt: skip
        pytest.fail("\n".join([f"{self.workdir.name}: {why}", *said]), pytrace=False)

    def until(self, ready, what, status=None):
        """Waits until `ready()`.

        The group is killed if that takes too long or a process ends otherwise than with `status`.
        """
        deadline = time.time() + TIMEOUT
        while not ready():
            found = [process.poll() for process in self.processes]
            if set(found) - {None, status} or time.time() > deadline:
                self.fail(f"no {what} in {TIMEOUT} s, or bad exit statuses: {found}")
            time.sleep(0.05)

    def ended(self, status):
        """Waits for the end, which must be with exit status `status` everywhere."""
        self.until(lambda: {p.poll() for p in self.processes} == {status}, "end", status)

    def metrics(self):
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def errors(self, i):
        return [s for s in self.text(i, "stderr").splitlines() if s.startswith("error: ")]

    def reads(self, i, kind):
        """Sentence numbers of every batch that process i loaded, in any order."""
        rows = (json.loads(line) for line in self.text(i, "reads").splitlines())
        return [sentences for name, sentences in rows if name == kind]


def free_port():
    """A port that nobody listens on, below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """whole: 1 process, 2 devices, unbroken. stopped: 2 processes, SIGTERM to the second of them,
    again and again. one: it goes on with 2, which get SIGKILL, then with 1 process of 1 device.
    four: it goes on with 4. faulty: 2, the second fails. apart: 2 without a folder in common. cut:
    SIGTERM in an evaluation; it goes on."""
    root = tmp_path_factory.mktemp("groups")
    found = {"stopped": Group(root / "stopped", 2, pause=0.25)}
    try:
        stopped = found["stopped"]
        found["whole"] = Group(root / "whole", 1)
        stopped.until(lambda: len(stopped.metrics()) >= 7, "seventh row of metrics")

        def ended():
            stopped.processes[1].send_signal(signal.SIGTERM)
            return {process.poll() for process in stopped.processes} == {TERMINATED}

        stopped.until(ended, "end", TERMINATED)
        found["whole"].ended(0)
        found["faulty"] = Group(root / "faulty", 2, fault=3)
        found["apart"] = Group(root / "together", 2, apart=True)
        # Its sixth batch is the first of the evaluation after five steps.
        cut = found["cut"] = Group(root / "cut", 1, fault=-6, train__steps=6)
        # More sentences at once than the devices of `four` can share.
        four = {"mesh__data": 2, "mesh__fsdp": 2, "eval__batch_size": 6}
        for name in ("one", "four"):
            shutil.copytree(stopped.workdir, root / name)
        killed = found["one"] = Group(root / "one", 2, pause=0.25)
        found["four"] = Group(root / "four", 4, devices=1, **four)
        begun = len(killed.metrics())
        killed.until(lambda: len(killed.metrics()) >= begun + 3, "third row of metrics")
        for process in killed.processes:
            process.kill()
        killed.ended(-signal.SIGKILL)
        found["one"] = Group(root / "one", 1, devices=1)
        cut.ended(TERMINATED)
        assert rows(cut, "val/mIoU") == {} and "at step 5, which is saved" in cut.errors(0)[0]
        found["cut"] = Group(root / "cut", 1, train__steps=6)
        found["faulty"].ended(2)
        found["apart"].ended(2)
        found["cut"].ended(0)
        found["one"].ended(0)
        found["four"].ended(0)
        yield found
    finally:
        for group in found.values():
            for process in group.processes:
                process.kill()


def rows(group, *names):
    """{step: values} of the metric rows that have all of `names`."""
    return {
        row["step"]: [row[name] for name in names] for row in group.metrics() if names[0] in row
    }


def saved(group, kind):
    with checkpoint.Checkpoints(str(group.workdir)) as checkpoints:
        manager = getattr(checkpoints, kind)
        (step,) = manager.all_steps()
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        args = checkpoint.ocp.args.StandardRestore(fallback_sharding=here)
        return step, leaves(manager.restore(step, args=args))


def test_sigterm_to_one_process_saves_and_ends_all_at_one_step(groups):
    stopped = groups["stopped"]
    (step,) = [int(path.name) for path in (stopped.workdir / "checkpoints/last").iterdir()]
    assert 7 <= step < STEPS
    for i in range(2):
        (line,) = stopped.errors(i)
        assert f"stopped by SIGTERM at step {step}, which is saved" in line
        assert "Traceback" not in stopped.text(i, "stderr")
    assert max(rows(stopped, "loss")) == step


@pytest.mark.parametrize("name", ["stopped", "one", "four"])
def test_losses_are_those_of_one_process(groups, name):
    expected, losses = (
        rows(groups["whole"], "loss", "grad_norm"),
        rows(groups[name], "loss", "grad_norm"),
    )
    assert list(expected) == list(range(1, STEPS + 1))
    assert list(losses) == list(expected)[: len(losses)]
    assert len(losses) == STEPS or name == "stopped"
    # The same numbers in another order of summation: float32 rounding, carried on by Adam.
    for step, values in losses.items():
        np.testing.assert_allclose(values, expected[step], rtol=2e-5, err_msg=f"step {step}")
    assert np.ptp(list(expected.values()), axis=0).min() > 1e-2  # They move at all.


@pytest.mark.parametrize("name", ["one", "four"])
def test_a_restart_on_other_processes_ends_where_an_unbroken_run_ends(groups, name):
    for kind in ("last", "best"):
        (step, expected), (other, arrays) = saved(groups["whole"], kind), saved(groups[name], kind)
        assert step == other
        for x, y in zip(expected, arrays, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "four"])
def test_scores_are_the_same_to_the_last_digit(groups, name):
    def results(group):
        found = json.loads((group.workdir / "results.json").read_text())["results"]
        return [{**scores, "seconds": 0} for scores in found.values()]

    expected = results(groups["whole"])
    assert expected[0]["sentences"] == 18 and 18 % ROWS and 0.01 < expected[0]["mIoU"] < 0.5
    assert results(groups[name]) == expected
    scores = [rows(groups[which], "val/mIoU", "val/oIoU") for which in ("whole", "stopped", name)]
    assert scores[0] == scores[2] and scores[1].items() <= scores[0].items() and scores[1]


def test_each_process_reads_its_rows_only(groups):
    whole, four = groups["whole"], groups["four"]
    begun = max(rows(groups["stopped"], "loss"))
    batches = {kind: whole.reads(0, kind) for kind in ("TrainBatches", "EvalBatches")}
    assert len(batches["TrainBatches"]) == STEPS
    # While training 18 sentences at a time; at the end 18, 9, 9, and 18 with shuffled words.
    evaluations = rows(whole, "val/mIoU")
    assert len(batches["EvalBatches"]) == 3 * len(evaluations) + 3 + 2 + 2 + 3
    scored = rows(groups["stopped"], "val/mIoU")
    assert set(scored) <= set(evaluations)
    left = {
        "TrainBatches": STEPS - begun,
        "EvalBatches": len(batches["EvalBatches"]) - 3 * len(scored),
    }
    for kind, everything in batches.items():
        assert {len(batch) for batch in everything} == {ROWS}
        for i in range(4):
            mine = four.reads(i, kind)
            assert len(mine) == left[kind]
            # Threads load them: in which order they do is no matter.
            quarters = [batch[i * ROWS // 4 : (i + 1) * ROWS // 4] for batch in everything]
            assert all(batch in quarters for batch in mine)


def test_only_the_first_process_prints_and_writes(groups):
    four = groups["four"]
    summary = json.loads(four.text(0, "stdout").splitlines()[-1])
    assert summary["steps"] == STEPS and pathlib.Path(summary["report"]).is_file()
    assert 0 < summary["seconds_to_first_step"] < summary["seconds"]
    assert sum("seconds_to_first_step" in row for row in four.metrics()) == 2  # Each start's.
    assert "first step after" in four.text(0, "stderr")
    for i in range(1, 4):
        # XLA's collectives between CPUs tell who is connected; Orbax warns of what took long.
        said = four.text(i, "stdout").splitlines()
        assert not [line for line in said if not line.startswith("[Gloo]")]
        stderr = four.text(i, "stderr")
        assert not [word for word in ("first step", "mIoU", f"/{STEPS}") if word in stderr]


def test_an_evaluation_that_was_cut_is_made_when_the_run_goes_on(groups):
    assert list(rows(groups["cut"], "val/mIoU")) == [5, 6]
    assert [row["step"] for row in groups["cut"].metrics()] == [1, 2, 3, 4, 5, 5, 6, 6]


def test_processes_without_a_folder_in_common_are_told_at_the_start(groups):
    for i in range(2):
        (line,) = groups["apart"].errors(i)
        assert "is not the same folder for all processes" in line
        assert "Traceback" not in groups["apart"].text(i, "stderr")


def test_an_error_in_one_process_ends_all_with_one_line(groups):
    for i in range(2):
        (line,) = groups["faulty"].errors(i)
        assert line.endswith("this process is told to fail")
        assert line.startswith("error: process 1: ") == (i == 0)
        assert "Traceback" not in groups["faulty"].text(i, "stderr")


def test_processes_that_differ_are_told(monkeypatch):
    stored = {}
    client = types.SimpleNamespace(
        key_value_set=stored.__setitem__,
        blocking_key_value_get=lambda name, _: stored[name],
        wait_at_barrier=lambda *_: None,
    )
    monkeypatch.setattr(processes.distributed.global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def as_process(i, values):
        monkeypatch.setattr(jax, "process_index", lambda: i)
        monkeypatch.setattr(processes, "_meetings", itertools.count())
        processes.check_same("the config", lambda: values)

    ours = {"seed": 0, "eval_splits": ("val",), "far": float("inf")}
    as_process(0, ours)
    as_process(1, ours)
    with pytest.raises(UserError) as error:
        as_process(1, {**ours, "seed": 5, "new": None})
    assert str(error.value) == (
        "the config must be the same for all processes, but is not (seed: 0 in process 0, 5 in "
        "process 1)"
    )

    devices = [types.SimpleNamespace(process_index=i) for i in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match="2 in process 0, 1 in process 1"):
        processes.check_devices()
    devices.pop()
    processes.check_devices()


def test_a_port_that_is_taken_is_an_error():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # As the coordinator's is.
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be had"):
            processes.join(f"localhost:{port}", 2, 0)


if __name__ == "__main__":
    one_process(*(sys.argv.pop(1) for _ in range(3)))
