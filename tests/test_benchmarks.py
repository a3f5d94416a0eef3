"""What benchmarks/train_step.py makes of its measurements; the sides themselves run on a GPU."""

import json
import shutil
import sys

import pytest

from benchmarks import train_step


def measured(*windows, peak=None, device="cpu", loss=1.0):
    """What a side's process says of one round."""
    about = {"peak": peak, "device": device, "versions": {}}
    return {"compile_s": 9.0, "loss": loss, "windows": list(windows), **about}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 0.5),
        ("NVIDIA H100 PCIe", 0.6541),
        ("NVIDIA A100-SXM4-80GB", 1.5849),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_utilisation(device, expected):
    assert train_step.utilisation(989e12, 2.0, device) == expected


def test_summary_of_rounds():
    rounds = [
        measured(0.5, 0.2, peak=3 * 2**30, device="NVIDIA H100"),
        measured(0.3, peak=2**30, device="NVIDIA H100", loss=2.0),
    ]
    line = train_step.summary(rounds, flops=int(2967e11), rows=6)
    assert line["step_s"] == 0.3 and line["step_s_range"] == [0.2, 0.5]
    assert line["samples_per_s"] == 20 and line["mfu"] == 1
    assert line["peak_gib"] == 1 and line["loss"] == 1
    assert train_step.summary([measured(1.0)], 1, 1)["peak_gib"] is None
    assert train_step.summary([*rounds, {"error": "memory"}], 1, 1) == {"error": "memory"}


def test_ratios_of_the_sides_that_ran():
    ours, eager, failed = {"samples_per_s": 3}, {"samples_per_s": 2}, {"error": "memory"}
    lines = {"ours": ours, "eager": eager, "compile": failed}
    assert train_step.ratios(lines) == {"ours/eager": 1.5}
    assert train_step.ratios(lines | {"ours": failed}) == {}


def test_a_side_that_fails_leaves_the_others_running(monkeypatch, capsys):
    calls = []

    def launch(argv, timeout, cache):
        calls.append(argv[-1])
        return {"error": "memory"} if argv[-1] == "eager" else measured(0.1)

    monkeypatch.setattr(train_step, "launch", launch)
    monkeypatch.setattr(train_step, "model_flops", lambda config, rows: rows)
    assert train_step.main(["--model", "lavt", "--rounds", "2"]) == 1
    assert calls == ["ours", "eager", "compile", "ours", "compile"]
    ours, eager, compiled, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["samples_per_s"] == compiled["samples_per_s"] == 80
    assert eager["error"] == "memory" and last == {"model": "lavt", "ours/compile": 1.0}


def test_a_process_that_says_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    result = train_step.launch([], 60, "unused")
    assert result == {"error": "the process ended with status 1"}
