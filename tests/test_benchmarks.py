"""What the benchmarks of a GPU make of their measurements, and that both sides are the same."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from benchmarks import attention, train_step


def measured(*windows, peak=None, device="cpu", loss=1.0):
    """What a side's process says of one round."""
    about = {"peak": peak, "device": device, "versions": {}}
    return {"compile_s": 9.0, "loss": loss, "windows": list(windows), **about}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 0.5),
        ("NVIDIA H100 PCIe", 0.6541),
        ("NVIDIA H200 NVL", 0.5922),
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
    ours = {"samples_per_s": 3, "device": "NVIDIA H100"}
    eager, failed = ours | {"samples_per_s": 2}, {"error": "memory"}
    lines = {"ours": ours, "eager": eager, "compile": failed}
    assert train_step.ratios(lines) == {"ours/eager": 1.5}
    assert train_step.ratios(lines | {"ours": failed}) == {}
    assert train_step.ratios(lines | {"eager": eager | {"device": "cpu"}}) == {}


def test_a_side_that_fails_leaves_the_others_running(monkeypatch, capsys):
    calls = []

    def launch(argv, xla_flags, timeout, cache):
        calls.append(argv[-1])
        return {"error": "memory"} if argv[-1] == "eager" else measured(0.1)

    monkeypatch.setattr(train_step, "launch", launch)
    monkeypatch.setattr(train_step, "model_flops", lambda config, rows: rows)
    assert train_step.main(["--model", "lavt", "--rounds", "2"]) == 1
    assert calls == ["ours", "eager", "compile", "ours", "compile"]
    ours, eager, compiled, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["samples_per_s"] == compiled["samples_per_s"] == 80
    assert eager["error"] == "memory" and last == {"model": "lavt", "ours/compile": 1.0}


def test_flags_are_a_side_of_their_own(monkeypatch, capsys):
    def launch(argv, xla_flags, timeout, cache):
        assert argv[-2:] == ["--side", "ours"]
        return measured(0.1 if xla_flags else 0.2, device="cpu" if "=2" in xla_flags else "GPU")

    monkeypatch.setattr(train_step, "launch", launch)
    monkeypatch.setattr(train_step, "model_flops", lambda config, rows: rows)
    arguments = ["--model", "lavt", "--side", "ours", "--xla_flags=--a=1 --b=1"]
    assert train_step.main(arguments) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last == {"model": "lavt", "ours/ours --a=1 --b=1": 0.5}
    assert train_step.main([*arguments, "--xla_flags=--a=2"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == last
    assert "lavt: not on one device: GPU, cpu" in printed.err


def test_a_process_with_flags_that_it_does_not_know():
    result = train_step.launch(["--model", "lavt", "--side", "ours"], "--xla_no_flag=1", 60, "no")
    assert result["error"].startswith("the process ended with status")


def test_a_process_that_says_nothing(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    result = train_step.launch([], "", 60, "unused")
    assert result == {"error": "the process ended with status 1"}


@pytest.mark.parametrize(
    "one",
    [
        attention.Attention("windows", (4, 4, 2, 8), 4),
        attention.Attention("windows", (4, 4, 2, 8), 4, regions=((0, 0, 1, 1), (0, 1, 1, 2))),
        attention.Attention("cells", (2, 5, 2, 8), 5),
        attention.Attention("cells", (2, 5, 2, 8), 5, causal=True),
    ],
    ids=["windows", "regions", "cells", "words"],
)
def test_attention_is_the_same_for_cudnn(one, monkeypatch):
    arguments = one.arguments()
    dot_product = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **b: dot_product(*a, **b)
    )
    ours, theirs = (np.float32(f(*arguments)) for f in (one.ours, one.cudnn))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-2)  # Of bfloat16.


def test_attentions_of_a_model():
    assert attention.attentions_of("cris", 2) == {
        attention.Attention("cells", (2, 17, 8, 64), 17, causal=True): 12,
        attention.Attention("cells", (2, 169, 32, 64), 169): 1,
    }
    line = attention.measure(attention.Attention("attention", (2, 3, 2, 8), 5, True), 1)
    assert line["ours_ms"] > 0 and "error" in line  # There is no cuDNN.
