"""How fast are the train steps at their papers' size on this GPU, against PyTorch on it?

python -m benchmarks.train_step [--model cris lavt] [--side ours cudnn eager compile] [--batch 8]
                                [--dtype bfloat16] [--steps 20] [--rounds 2] [--small]
                                [--xla_flags=--xla_gpu_enable_triton_gemm=false ...]

"cudnn", if asked for, is ours with `swin.cudnn`, of models with a Swin. The others are
benchmarks/pytorch under autocast, eager and under torch.compile: the same weights, AdamW, parameter
groups and noise, but images that are normalised already. Every side has a process of its own, and
in each round all take turns. Each `--xla_flags`, flags with spaces between, is one side more: ours
with them, which shows what they are worth. Where there is no GPU they run on the CPU, and `--small`
shrinks the models. What each process found goes to stderr when it ends. A JSON line per model and
side, with "error" if it failed, or

- step_s: median over windows of `--steps` steps, and step_s_range their extremes;
- mfu: model_tflops (products and convolutions of our forward pass, times 3, for every side) over
  what the device can do in bfloat16 in that time, if that is known;
- peak_gib: the most that arrays took, in the round where it was least: in the first it contains the
  trials of our compiler, and later rounds find its work done. PyTorch's trials are left out;
- compile_s: the first step of the first round, from start to end;
- loss: of that step, to compare (dropout and stochastic depth are drawn differently);

then a line per model: ours/eager, ours/compile and so on, ratios of samples per second, of the
sides that ran on the same device. The exit status is 1 if a side failed or had another device.
"""

import argparse
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks import paper
from refseg_jax.data.transforms import normalize_for
from refseg_jax.optim import assign_groups
from refseg_jax.sharding import batch_sharding, make_mesh, state_sharding
from refseg_jax.train import make_train_step
from refseg_jax.train_state import init_state, init_variables

SIDES = ("ours", "eager", "compile")
WINDOWS = 3  # Per round.
# Words of a device's name -> TFLOP/s of dense products in bfloat16, as NVIDIA describes it.
PEAKS = {
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{"H200 NVL": 835, "H200": 989, "A100": 312, "L4": 121},
}
# What --small makes of a recipe, where it has the field; the rest is the recipe's.
SMALL = {
    "swin": dict(embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window=4),
    "bert": dict(hidden=32, layers=4, heads=2, intermediate=64),
    "vision": dict(width=16, depths=(1, 1, 1, 1), embed_dim=32),
    "text": dict(hidden=32, layers=1, heads=2, embed_dim=32),
    **dict(dim=32, heads=4, ffn=64, neck_dims=(16, 32, 32), window=4, stages=2),
    **dict(pixel_layers=1, pixel_ffn=64, decoder_layers=1, decoder_ffn=64, align_dim=32),
    **dict(joint_dim=32, generator_dim=32, generator_layers=1, generator_ffn=64, seg_dim=32),
}


class Side(NamedTuple):
    """One side, ready to run on one device."""

    step: Callable[[], Any]  # Starts a step and returns its loss.
    wait: Callable[[], object]  # Until all of them are done.
    forget: Callable[[], object]  # The peak so far.
    peak: Callable[[], int | None]  # Bytes; None where nothing counts them.
    device: str
    versions: dict[str, str]


def ours(name: str, config: ml_collections.ConfigDict, rows: int) -> Side:
    """The step that the trainer compiles."""
    # By default JAX leaves a quarter of the memory alone.
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    model, tx, shapes = paper.paper_state(config)
    mesh = make_mesh(1, 1)
    shardings = state_sharding(shapes, mesh, config.mesh.rules, config.mesh.min_fsdp_size)
    size = config.data.image_size, config.data.max_tokens

    def init(key):
        variables = init_variables(model, key, *size)
        return init_state(variables, lambda _: tx, key, config.train.ema_decay > 0)

    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    batch = jax.device_put(paper.random_batch(config, rows), batch_sharding(mesh))
    function, device = make_train_step(config, model, tx, mesh, shardings), jax.devices()[0]

    def step():
        nonlocal state
        state, scalars = function(state, batch)
        return scalars["loss"]

    return Side(
        step,
        lambda: jax.block_until_ready(state),
        lambda: None,  # JAX knows the process's peak alone.
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
        device.device_kind,
        {"jax": jax.__version__},
    )


def theirs(name: str, config: ml_collections.ConfigDict, rows: int, compiled: bool) -> Side:
    """The same in PyTorch."""
    import torch  # Here, for our process must not load its CUDA libraries.

    from benchmarks.pytorch.load import load

    jax.config.update("jax_platforms", "cpu")  # The GPU is PyTorch's.
    torch.set_float32_matmul_precision("high")  # JAX takes TF32, too.
    torch.backends.cudnn.benchmark = True  # XLA tries the algorithms, too.
    cuda, optim = torch.cuda.is_available(), config.optim
    device = "cuda" if cuda else "cpu"

    model, _, _ = paper.paper_state(config)
    size = config.data.image_size, config.data.max_tokens
    variables = jax.jit(lambda key: init_variables(model, key, *size))(jax.random.key(0))
    twins = importlib.import_module(f"benchmarks.pytorch.{name}")
    module = getattr(twins, type(model).__name__)(model.config)
    # At first each parameter is filled with the number of its group.
    groups = assign_groups(variables["params"], optim.groups)
    numbers = jax.tree.map(lambda x, i: np.full(x.shape, i), variables["params"], groups)
    load(module, variables | {"params": numbers})
    members = [[] for _ in optim.groups]
    for parameter in module.parameters():
        members[int(parameter.flatten()[0])].append(parameter)
    load(module, variables)
    module.to(device, memory_format=torch.channels_last).train()
    # What is frozen gets gradients, as it does in ours, and no updates.
    settings = [
        {"params": each, "lr": lr * optim.lr, "weight_decay": decay * optim.weight_decay}
        for each, (_, lr, decay) in zip(members, optim.groups, strict=True)
        if lr
    ]
    optimizer = torch.optim.AdamW(settings, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)

    batch = {key: np.array(value) for key, value in paper.random_batch(config, rows).items()}
    image = torch.from_numpy(normalize_for(model, batch["image"])).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(batch["tokens"]).long()
    masks = [torch.from_numpy(batch[key]) for key in ("token_mask", "mask")]
    inputs = [x.to(device) for x in (image, tokens, *masks)]
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16")
    loss_of = torch.compile(module.loss) if compiled else module.loss

    def step():
        with autocast:
            loss = loss_of(*inputs)
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm)
        optimizer.step()
        module.zero_grad(set_to_none=True)
        return loss.detach()

    about = device, {"torch": torch.__version__}
    if not cuda:
        return Side(step, lambda: None, lambda: None, lambda: None, *about)
    memory = torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated
    return Side(step, torch.cuda.synchronize, *memory, torch.cuda.get_device_name(), about[1])


def timed(side: Side, steps: int) -> tuple[float, Any]:
    """(seconds per step, the last loss)."""
    begun = time.perf_counter()
    for _ in range(steps):
        loss = side.step()
    side.wait()
    return (time.perf_counter() - begun) / steps, loss


def work(name: str, kind: str, flags: argparse.Namespace) -> dict[str, Any]:
    """One side's round: compile_s, loss, windows (seconds per step each), peak, device, versions.

    Raises:
      FloatingPointError: the first loss is not finite.
    """
    arguments = name, step_config(name, flags), flags.batch
    if kind == "cudnn":
        arguments[1].model.swin.cudnn = True
    mine = kind in ("ours", "cudnn")
    side = ours(*arguments) if mine else theirs(*arguments, kind == "compile")
    compile_s, loss = timed(side, 1)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the first loss is {float(loss)}")
    timed(side, 2)  # In case that something compiles once more.
    side.forget()
    windows = [timed(side, flags.steps)[0] for _ in range(WINDOWS)]
    result = {"compile_s": round(compile_s, 1), "loss": round(float(loss), 5), "windows": windows}
    return result | {"peak": side.peak(), "device": side.device, "versions": side.versions}


def launch(argv: list[str], xla_flags: str, timeout: int, cache: str) -> dict[str, Any]:
    """What `work` returns in a process of its own, its compilers' caches in `cache`; or "error"."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker", *argv]
    variables = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": cache}
    variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
    out = dict(env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    try:
        process = subprocess.run(command, timeout=timeout, **out)
        return json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout} seconds"}
    except (IndexError, ValueError):
        return {"error": f"the process ended with status {process.returncode}"}


def step_config(name: str, flags: argparse.Namespace) -> ml_collections.ConfigDict:
    """The recipe at its paper's size, or a small one."""
    config = paper.paper_config(name, flags.dtype)
    if flags.small:
        config.model.update({field: x for field, x in SMALL.items() if field in config.model})
        config.data.image_size = 64
    return config


def model_flops(config: ml_collections.ConfigDict, rows: int) -> int:
    """What a train step of so many rows has to compute: three times the forward pass."""
    jax.config.update("jax_platforms", "cpu")  # The GPU is the sides'.
    return 3 * rows * paper.forward_flops(config)


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """The share of the device's peak; None for one that is not in PEAKS."""
    peak = next((most for name, most in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
    return peak and round(flops / (seconds * peak * 1e12), 4)


def summary(rounds: list[dict[str, Any]], flops: int, rows: int) -> dict[str, Any]:
    """One side's line, of what `work` returned in each round, the last of which may have failed."""
    if "error" in rounds[-1]:
        return rounds[-1]
    windows = [seconds for each in rounds for seconds in each["windows"]]
    step, peak = statistics.median(windows), min(each["peak"] or 0 for each in rounds)
    return {
        "step_s": round(step, 5),
        "step_s_range": [round(min(windows), 5), round(max(windows), 5)],
        "samples_per_s": round(rows / step, 2),
        "model_tflops": float(f"{flops / 1e12:.4g}"),
        "mfu": utilisation(flops, step, rounds[0]["device"]),
        "peak_gib": round(peak / 2**30, 2) or None,
        **{key: rounds[0][key] for key in ("compile_s", "loss", "device", "versions")},
    }


def ratios(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our samples per second over those of each other side, of the sides that have any.

    A side that did not find our device has none.
    """
    device = lines.get("ours", {}).get("device")
    ran = {side: x for side, x in lines.items() if "error" not in x and x["device"] == device}
    speeds = {side: line["samples_per_s"] for side, line in ran.items()}
    mine = speeds.pop("ours", None)
    return {f"ours/{side}": round(mine / speed, 3) for side, speed in speeds.items() if mine}


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=paper.CONFIGS, default=paper.CONFIGS)
    parser.add_argument("--side", nargs="+", choices=(*SIDES, "cudnn"), default=SIDES)
    parser.add_argument("--batch", type=paper.positive, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=paper.positive, default=20, help="per window")
    parser.add_argument("--rounds", type=paper.positive, default=2)
    parser.add_argument(
        "--timeout", type=paper.positive, default=1800, help="seconds, of a process"
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--xla_flags", action="append", default=[])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.worker:
        try:
            result = work(*flags.model, *flags.side, flags)
        except Exception as e:  # Out of memory, say, for which each library has its own class.
            traceback.print_exc()
            result = {"error": " ".join(f"{type(e).__name__}: {e}".split())[:300]}
        print(json.dumps(result))
        return int("error" in result)
    failed = False
    for name in flags.model:
        swin = "swin" in paper.paper_config(name).model
        sides = {side: (side, "") for side in flags.side if swin or side != "cudnn"}
        sides |= {f"ours {each}": ("ours", each) for each in flags.xla_flags}
        rounds = {side: [] for side in sides}
        with tempfile.TemporaryDirectory() as cache:
            for number in range(1, flags.rounds + 1):
                for side, results in rounds.items():
                    if not results or "error" not in results[-1]:
                        kind, xla_flags = sides[side]
                        only = [*argv, "--model", name, "--side", kind]
                        results.append(launch(only, xla_flags, flags.timeout, cache))
                        about = f"{name}, {side}, round {number}: {json.dumps(results[-1])}"
                        print(about, file=sys.stderr, flush=True)
        flops = model_flops(step_config(name, flags), flags.batch)
        lines = {side: summary(each, flops, flags.batch) for side, each in rounds.items()}
        for side, line in lines.items():
            about = {"model": name, "side": side, "batch": flags.batch, "dtype": flags.dtype}
            print(json.dumps(about | line), flush=True)
            failed |= "error" in line
        devices = {line["device"] for line in lines.values() if "error" not in line}
        if len(devices) > 1:
            failed = True
            print(f"{name}: not on one device: {', '.join(sorted(devices))}", file=sys.stderr)
        if compared := ratios(lines):
            print(json.dumps({"model": name} | compared), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
