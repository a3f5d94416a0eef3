"""What benchmarks/gpu_compile.py makes of a compiled program, and of its arguments."""

import importlib.util
import json
import sys

import pytest

from benchmarks import gpu_compile

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_part (p0: f32[8,4]) -> f32[8] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %flat = f32[32]{0} bitcast(%p0)
  ROOT %part = f32[8]{0} slice(%flat), slice={[0:8]}
}

%fused_product (p0: bf16[3,16,32], p1: bf16[3,32,8]) -> f32[3,16,8] {
  %p0 = bf16[3,16,32]{2,1,0} parameter(0)
  %p1 = bf16[3,32,8]{2,1,0} parameter(1)
  ROOT %dot = f32[3,16,8]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4]{0} get-tuple-element(%state), index=1
  %copy.1 = f32[4]{0} copy(%x), metadata={op_name="jit(step)/scan/layer3/copy"}
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %copy.1)
}

%until (state.1: (s32[], f32[4])) -> pred[] {
  %state.1 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %seven), direction=LT
}

ENTRY %main (a: f32[8,4], q: bf16[2,6,4,8]) -> f32[4] {
  %a = f32[8,4]{1,0} parameter(0)
  %i = s32[] constant(0)
  %x = f32[4]{0} constant({1, 2, 3, 4})
  %left = bf16[3,16,32]{2,1,0} parameter(2)
  %right = bf16[3,32,8]{2,1,0} parameter(3)
  %image = bf16[2,8,8,3]{3,2,1,0} parameter(4)
  %kernel = bf16[16,5,5,3]{3,2,1,0} parameter(5)
  %of_map = bf16[2,4,4,16]{3,2,1,0} parameter(6)
  %q = bf16[2,6,4,8]{3,2,1,0} parameter(1)
  %k = bf16[2,10,4,8]{3,2,1,0} parameter(7)
  %part.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_part, \
metadata={op_name="jit(step)/jvp(LAVT)/blocks_1_2/slice"}
  %product.1 = f32[3,16,8]{2,1,0} fusion(%left, %right), kind=kCustom, calls=%fused_product, \
metadata={op_name="jit(step)/product"}
  %gemm.1 = (f32[3,16,8]{2,1,0}, s8[1024]{0}) custom-call(%left, %right), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/gemm"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %conv.1 = (bf16[2,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=5x5 \
stride=2x2 pad=2_2x2_2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(step)/conv"}
  %conv.2 = (bf16[2,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%of_map, %kernel), window={size=5x5 \
stride=2x2 pad=2_2x2_2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput", metadata={op_name="jit(step)/conv"}
  %conv.3 = (bf16[16,5,5,3]{3,2,1,0}, u8[0]{0}) custom-call(%image, %of_map), window={size=5x5 \
stride=2x2 pad=2_2x2_2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="jit(step)/conv"}
  %attention.1 = (bf16[2,6,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/attention"}
  %attention.2 = (bf16[2,6,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(step)/attention"}
  %sorted = f32[4]{0} custom-call(%x), custom_call_target="sort", \
metadata={op_name="jit(step)/sort"}
  %all-gather-start = ((f32[8]{0}, f32[4]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%part.1, \
%x), channel_id=2, dimensions={0}
  %all-gather-done = (f32[16]{0}, f32[8]{0}) all-gather-done(%all-gather-start)
  %all-reduce-start = f32[4]{0} all-reduce-start(%x), channel_id=1, to_apply=%sum
  %all-reduce-done = f32[4]{0} all-reduce-done(%all-reduce-start)
  %state.1 = (s32[], f32[4]{0}) tuple(%i, %all-reduce-done)
  %while = (s32[], f32[4]{0}) while(%state.1), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %end = f32[4]{0} get-tuple-element(%while), index=1
}
"""
KERNELS = {
    "jvp(LAVT)/blocks*/slice": [(1, 0, 2 * 8 * 4)],  # Only of the part.
    "product": [(1, 2 * 3 * 16 * 8 * 32, 2 * 3 * 32 * (16 + 8) + 4 * 3 * 16 * 8)],
    "gemm": [(1, 2 * 3 * 16 * 8 * 32, 2 * 3 * 32 * (16 + 8) + 4 * 3 * 16 * 8)],
    "conv": [(1, 2 * 2 * 16 * 16 * 25 * 3, 2 * (2 * 64 * 3 + 16 * 75 + 2 * 16 * 16))] * 3,
    "attention": [
        (1, 2 * 2 * 2 * 4 * 6 * 10 * 8, 2 * (384 + 2 * 640 + 384)),
        (1, 2 * 5 * 2 * 4 * 6 * 10 * 8, 2 * (384 + 2 * 640 + 384 + 384)),
    ],
    "scan/layer*/copy": [(7, 0, 32)],
    "sort": [(1, 0, 32)],
}


def test_kernels_of_a_program():
    program, found = gpu_compile.Kernels(PROGRAM), {}
    for place, *kernel in program:
        found.setdefault(place, []).append(tuple(kernel))
    assert found == KERNELS and program.loops_on_data == 0
    program = gpu_compile.Kernels(PROGRAM.replace("known_trip_count", "unknown"))
    runs = {place: kernel.runs for kernel in program for place in [kernel.place]}
    assert runs["scan/layer*/copy"] == 1 and program.loops_on_data == 1
    collectives = gpu_compile.Program(PROGRAM).collectives
    assert collectives == {"all-gather": [1, 4 * (16 + 8)], "all-reduce": [1, 4 * 4]}


def test_seconds_of_a_kernel():
    gpu = gpu_compile.GPUS["H200"]
    assert gpu_compile.Kernel("", 3, 989 * 10**9, 1).seconds(gpu) == pytest.approx(3e-3)
    assert gpu_compile.Kernel("", 1, 989 * 10**9, 9600 * 10**6).seconds(gpu) == pytest.approx(2e-3)


def test_lines(monkeypatch, capsys):
    """One of each config and step that was asked for; an error is no end."""

    def compile_row(name, step, gpu, gpus, flags):
        row = {"config": name, "step": step, "gpu": gpu, "gpus": gpus, "cudnn": flags.cudnn}
        return (row | {"error": "no"} if name == "cris" else row), ""

    monkeypatch.setattr(gpu_compile, "compile_row", compile_row)
    monkeypatch.setattr(gpu_compile, "mesh_of", lambda name, gpus: None)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gpu_compile", *words])
        status = gpu_compile.main()
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        return status, [(line["config"], line["step"], line["gpus"]) for line in lines]

    both = ["--config", "cris,lavt", "--gpus", "8", "--gpu", "L4"]
    assert run(*both, "--step", "eval") == (1, [("cris", "eval", 8), ("lavt", "eval", 8)])
    # CRIS has no windows.
    assert run(*both, "--cudnn") == (0, [("lavt", "train", 8), ("lavt", "eval", 8)])
    with pytest.raises(SystemExit):
        run("--config", "cris,nobody")
    assert "'nobody' is not one of alignformer, " in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins"), reason="may be for GPUs")
def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_compile"])
    with pytest.raises(SystemExit):
        gpu_compile.main()
    assert "pip install -e .[cuda]" in capsys.readouterr().err
