"""Every config compiles for TPUs and fits them, and docs/scale.md has the tables of its record."""

import base64
import contextlib
import functools
import json
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, which is for x86-64 Linux")

from benchmarks import tpu_compile  # noqa: E402
from benchmarks.paper import CONFIGS, paper_config, product_flops  # noqa: E402
from refseg_jax.losses.contrast_kernel import fits_kernel  # noqa: E402
from refseg_jax.losses.pixel_contrast import pixel_contrast_loss  # noqa: E402
from refseg_jax.models.layers import doubling, feed_forward  # noqa: E402
from refseg_jax.models.layers.layer_norm import normalize_in_kernel  # noqa: E402
from refseg_jax.sharding import batch_sharding, jit_on_mesh, on_mesh, on_tpus, replicated  # noqa: E402

RECORD = tpu_compile.read_record()

# The scheduled text of a program: a loop of 3 rounds, and beside it a pair of all-reduces, an
# all-gather in two fusions, and an all-reduce of which each chip keeps a part.
PROGRAM = """HloModule jit_step, is_scheduled=true

%condition.1 (p.1: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %n.1 = s32[]{:T(128)} constant(3)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%beside.1 (p.4: f32[8,128]) -> f32[32,128] {
  %g.1 = f32[32,128]{1,0} all-gather(%p.4), channel_id=9
}

%beside.2 (p.5: f32[8,128]) -> f32[32,128] {
  %g.2 = f32[32,128]{1,0} all-gather(%p.5), channel_id=9
}

%body.1 (p.2: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %f.1 = bf16[8,128]{1,0} fusion(%p.2), metadata={op_name="jit(step)/M/blocks_0_1/dot"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %r.1 = bf16[8,128]{1,0:T(8,128)} all-reduce(%f.1), channel_id=1
}

ENTRY %main.1 (x.1: bf16[8,128]) -> bf16[8,128] {
  %f.2 = bf16[8,128]{1,0} fusion(%x.1), metadata={op_name="jit(step)/M/blocks_0_0/dot"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %r.2 = (f32[16]{0:T(256)S(1)}, pred[4]{0}) all-reduce-start(%f.2, %f.2), channel_id=2
  %f.3 = f32[32,128]{1,0} fusion(%x.1), kind=kOutput, calls=%beside.1
  %f.4 = f32[32,128]{1,0} fusion(%f.3), kind=kOutput, calls=%beside.2
  %r.3 = (bf16[2,128]{1,0}, bf16[4]{0}) fusion(%f.2, %f.2), kind=kCustom, calls=%all-reduce-scatter.7
  %w.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%t.1), condition=%condition.1, body=%body.1
}
"""  # noqa: E501


@pytest.mark.parametrize("step", tpu_compile.STEPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_fits_the_smallest_chip(name, step):
    row, lower = tpu_compile.trace(name, step, "v5e:2x2", 8)
    recorded = RECORD[tpu_compile.key(row)]
    assert row["model_tflops"] == recorded["model_tflops"], "docs/scale.md is of another model"
    # What was compiled for the record need not be compiled again, which takes minutes.
    if not tpu_compile.is_known(row, lower, recorded):
        recorded, _ = tpu_compile.estimate(row, lower)
    assert recorded["fits"]
    if step == "eval":
        assert not recorded["collectives"]  # No chip waits for another.
        return
    mib = {kind: moved["mib"] for kind, moved in recorded["collectives"].items()}
    assert mib["reduce-scatter"] > 40  # A fourth of the gradients, of all encoders at least,
    assert mib["all-gather"] > 200  # and the parameters that were made of it.


@pytest.mark.parametrize(
    ("name", "topology"), [("lavt", "v4:2x2x1"), ("cris", "v5p:4x8x8"), ("cris", "v6e:16x16")]
)
def test_a_step_fits_other_chips(name, topology):
    """A few of them: each generation has kernels, or forms of one, that others have not."""
    row, lower = tpu_compile.trace(name, "eval", topology, 8)
    recorded = RECORD[tpu_compile.key(row)]
    if not tpu_compile.is_known(row, lower, recorded):
        recorded, _ = tpu_compile.estimate(row, lower)
    assert recorded["fits"] and not recorded["collectives"]


def test_a_program_does_not_tell_where_its_source_is():
    mesh = tpu_compile.mesh_of("v5e:2x2")
    x = jax.ShapeDtypeStruct((4, 16, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
    scale = jnp.ones(128)
    traced = jax.jit(on_mesh(mesh, normalize_in_kernel), static_argnums=3).trace(
        x, scale, scale, 1e-5
    )
    text = str(traced.jaxpr)
    assert "pallas_call" in text and ".py" not in text and " at 0x" not in text
    (kernel,) = re.findall(r"body\\22: \\22([A-Za-z0-9+/=]+)", traced.lower().as_text())
    kernel = base64.b64decode(kernel)
    assert b"tpu" in kernel and b".py" not in kernel


def test_what_is_traced_is_told_apart():
    """By operations, by the numbers of an inner function, and by where arrays lie."""
    mesh = tpu_compile.mesh_of("v5e:2x2")

    def of(table, sharding, weight=2.0, **options):
        inner = jax.jit(lambda x: jax.lax.dot(x, table) * weight)
        function = jax.jit(lambda x: inner(x) + 1, **options)
        shapes = (jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding),)
        return tpu_compile.traced_fingerprint(function.trace(*shapes), shapes)

    table, everywhere = np.eye(4, dtype=np.float32), replicated(mesh)
    first = of(table, everywhere)
    assert of(table.copy(), everywhere) == first
    others = {
        of(2 * table, everywhere),
        of(table, batch_sharding(mesh)),
        of(table, everywhere, weight=3.0),
        of(table, everywhere, out_shardings=batch_sharding(mesh)),
        of(table, everywhere, donate_argnums=0),
    }
    assert len(others - {first}) == 5


@pytest.mark.parametrize("kind", tpu_compile.CHIPS)
def test_a_device_is_a_chip(kind):
    chip = tpu_compile.CHIPS[kind]
    host = tpu_compile.mesh_of(f"{kind}:{chip.host}")
    assert host.size == 4 and on_mesh(host, on_tpus)()
    assert tpu_compile.mesh_of(f"{kind}:{chip.pod}").size == 256


@pytest.mark.parametrize(
    ("kind", "rows", "channels"), [("v4", 1, 1), ("v5p", 2, 1), ("v5p", 2, 2), ("v5e", 2, 1)]
)
def test_a_feed_forward_fits_the_vector_memory(kind, rows, channels):
    """Both passes with the most rows, and with channels that are the most of a limit."""
    mesh = tpu_compile.mesh_of(f"{kind}:{tpu_compile.CHIPS[kind].host}")
    C = channels * feed_forward.MOST_CHANNELS
    n = rows * feed_forward.MOST_NUMBERS // feed_forward.WIDTH
    x = jax.ShapeDtypeStruct((8, n, C), jnp.bfloat16, sharding=batch_sharding(mesh))
    fits = on_mesh(mesh, feed_forward.fits_kernel)
    assert fits(x, 4 * C) and not fits(x.update(shape=(8, n, 4 * C)), 16 * C)

    def both(x, *operands):
        y, pull_back = jax.vjp(feed_forward.feed_in_kernel, x, *operands)
        return pull_back(y)

    shapes = (8, 1, 1), (C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,)
    shardings = batch_sharding(mesh), *[replicated(mesh)] * 6
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    # Without optimisation they need more.
    at = tpu_compile.compiling_at("O0") if kind == "v5p" else contextlib.nullcontext()
    with at:
        compiled = jit_on_mesh(mesh, both).lower(x, *operands).compile().as_text()
    assert "feed_forward_backward" in compiled


@pytest.mark.parametrize("level", tpu_compile.LEVELS)
@pytest.mark.parametrize(
    ("kind", "h", "w", "normed"),
    [
        ("v4", 56, 58, False),
        ("v4", 40, 42, True),
        ("v5p", 108, 101, False),
        ("v5p", 76, 73, True),
        ("v5e", 108, 101, False),
        ("v5e", 76, 73, True),
    ],
)
def test_a_doubling_fits_the_vector_memory(kind, h, w, normed, level):
    """Both passes of the largest map, with the norm before it or without."""
    mesh = tpu_compile.mesh_of(f"{kind}:{tpu_compile.CHIPS[kind].host}")
    x = jax.ShapeDtypeStruct((32, h, w, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
    fits = on_mesh(mesh, functools.partial(doubling.fits_kernel, normed=normed))
    assert fits(x) and not fits(x.update(shape=(32, h, w + 1, 128)))
    vectors = (jnp.ones(128),) * 3 if normed else None

    def both(x):
        y, pull_back = jax.vjp(doubling.double_in_kernel, x, vectors)
        return pull_back(y)

    with tpu_compile.compiling_at(level):
        compiled = jit_on_mesh(mesh, both).lower(x).compile().as_text()
    assert "doubling_backward" in compiled


@pytest.mark.parametrize("kind", ["v4", "v5p"])
def test_a_contrast_of_pixels_fits_the_vector_memory(kind):
    """Both passes of CoupAlign's map, where there is least; but a v4 loops over parts of it."""
    mesh = tpu_compile.mesh_of(f"{kind}:{tpu_compile.CHIPS[kind].host}")
    shapes = ((8, 112 * 112, 512), jnp.bfloat16), ((8, 112 * 112), jnp.bool_)
    arrays = [jax.ShapeDtypeStruct(*x, sharding=batch_sharding(mesh)) for x in shapes]
    assert on_mesh(mesh, fits_kernel)(arrays[0], 0.1) == (kind != "v4")
    assert not on_mesh(mesh, fits_kernel)(arrays[0].update(shape=(8, 1024, 4096)), 0.1)

    def both(pixels, labels):
        return jax.grad(lambda x: pixel_contrast_loss(x, labels).sum())(pixels)

    compiled = jit_on_mesh(mesh, both).lower(*arrays).compile().as_text()
    assert ("pixel_contrast_backward" in compiled) == (kind != "v4")
    assert tpu_compile.Program(compiled).loops_on_data == (2 if kind == "v4" else 0)


@pytest.mark.parametrize("kind", tpu_compile.CHIPS)
def test_no_table_of_words_takes_the_place_of_maps(kind):
    def function(x, weights, table, words):
        return (jax.nn.relu(x @ weights) @ weights).sum() + table[words].sum()

    mesh = tpu_compile.mesh_of(f"{kind}:{tpu_compile.CHIPS[kind].host}")
    shapes = (8192, 512), (512, 512), (30522, 768), (136,)
    arrays = [
        jax.ShapeDtypeStruct(x, jnp.float32, sharding=replicated(mesh)) for x in shapes[:3]
    ] + [jax.ShapeDtypeStruct(shapes[3], jnp.int32, sharding=replicated(mesh))]
    early = [
        "cross_program_prefetch_index" in jitted.lower(*arrays).compile().as_text()
        for jitted in (jax.jit(function), jit_on_mesh(mesh, function))
    ]
    assert early == [True, False]


def test_a_step_too_large_does_not_fit(monkeypatch):
    config = paper_config("lavt", "bfloat16")
    config.data.image_size = 64
    config.model.swin.update(depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 1, 1, 1))
    config.model.bert.update(layers=1)
    monkeypatch.setattr(tpu_compile, "paper_config", lambda *_: config)
    # Not remembered: the other tests mean the true one.
    monkeypatch.setattr(tpu_compile, "row_flops", tpu_compile.row_flops.__wrapped__)
    row, _ = tpu_compile.estimate(*tpu_compile.trace("lavt", "eval", "v5e:2x2", 1 << 18))
    assert not row["fits"] and row["peak_gib"] > tpu_compile.CHIPS["v5e"].gib


def test_loops_and_collectives_of_a_program():
    program = tpu_compile.Program(PROGRAM)
    assert program.cycles == {"M/blocks*/dot": 307} and not program.loops_on_data
    assert program.collectives == {
        "all-reduce": [4, 3 * 8 * 128 * 2 + 16 * 4 + 4],
        "all-gather": [1, 32 * 128 * 4],
        "reduce-scatter": [1, 2 * 128 * 2 + 4 * 2],
    }
    until = "%n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2"
    program = tpu_compile.Program(PROGRAM.replace("%n.1 = s32[]{:T(128)} constant(3)", until))
    assert program.cycles == {"M/blocks*/dot": 107} and program.loops_on_data == 1


def test_operations_of_products():
    def function(x, w, k):
        y = jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        y = jax.lax.cond(w.sum() > 0, lambda y: y @ w, lambda y: y, y)
        return jax.lax.scan(lambda y, _: (jax.jit(jnp.matmul)(y, w), None), y, length=5)[0]

    shapes = (jnp.zeros((2, 4, 4, 8)), jnp.zeros((8, 8)), jnp.zeros((3, 3, 4, 8)))
    product, conv = 2 * 2 * 16 * 8 * 8, 2 * 2 * 16 * 8 * (3 * 3 * 4)
    assert product_flops(jax.make_jaxpr(function)(*shapes).jaxpr) == conv + 6 * product


def test_operations_where_platforms_differ():
    def function(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert product_flops(jax.make_jaxpr(function)(jnp.zeros((4, 4))).jaxpr) == 2 * 4**3


def test_the_page_has_the_tables_of_the_record():
    assert tpu_compile.table(list(RECORD.values())) in (tpu_compile.DOCS / "scale.md").read_text()


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Of CRIS's evaluation step on one host of v5e; the record is a copy, and tracing finds it.

    What it is lowered to has its fingerprint for a text.
    """
    for name in ("scale.jsonl", "scale.md"):
        shutil.copy(tpu_compile.DOCS / name, tmp_path)
    monkeypatch.setattr(tpu_compile, "DOCS", tmp_path)
    row = RECORD["cris", 1, "v5e:2x2", 8]
    names = "program", "traced", "options", "libtpu", "jax", "model_tflops"
    known = {name: row[name] for name in names}

    def trace(config, step, topology, batch, dtype):
        about = dict(config=config, step=step, topology=topology, chips=4, batch_per_chip=batch)
        about |= {"dtype": dtype} | {name: known[name] for name in names[1:]}
        return about, lambda: types.SimpleNamespace(as_text=lambda: known["program"])

    monkeypatch.setattr(tpu_compile, "trace", trace)
    monkeypatch.setattr(tpu_compile, "fingerprint", lambda text: text)
    return known


def run_update(monkeypatch, *arguments):
    words = ["--config", "cris", "--step", "eval", "--topology", "v5e:2x2", "--update", *arguments]
    monkeypatch.setattr(sys, "argv", ["tpu_compile", *words])
    return tpu_compile.main()


@pytest.mark.parametrize("level", tpu_compile.LEVELS)
def test_what_is_recorded_is_not_compiled_again(recorded, level, monkeypatch):
    monkeypatch.setattr(tpu_compile, "estimate", None)
    before = [path.read_bytes() for path in sorted(tpu_compile.DOCS.iterdir())]
    assert run_update(monkeypatch, "--level", level) == 0
    assert [path.read_bytes() for path in sorted(tpu_compile.DOCS.iterdir())] == before
    # Nor what is traced to something else, or by another JAX, if the same comes out.
    for name in ("traced", "jax"):
        recorded[name] = "another"
        assert run_update(monkeypatch, "--level", level) == 0
        assert tpu_compile.read_record()["cris", 1, "v5e:2x2", 8][name] == "another"
    recorded["model_tflops"] *= 0.5
    assert run_update(monkeypatch) == 0
    row = tpu_compile.read_record()["cris", 1, "v5e:2x2", 8]
    assert row["share_of_peak"] == pytest.approx(
        RECORD["cris", 1, "v5e:2x2", 8]["share_of_peak"] / 2, abs=1e-3
    )


@pytest.mark.parametrize("what", tpu_compile.IDENTITY)
def test_another_program_or_compiler_is_compiled(recorded, what, monkeypatch, capsys):
    recorded["traced"] = recorded[what] = "another"
    levels = []

    def estimate(row, lowered, level):
        levels.append(level)
        if len(levels) > 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: no\nroom")
        return row | {"level": level, "fits": True, "peak_gib": 1.25}, ""

    monkeypatch.setattr(tpu_compile, "estimate", estimate)
    assert run_update(monkeypatch) == 0
    row = tpu_compile.read_record()["cris", 1, "v5e:2x2", 8]
    assert row["peak_gib"] == 1.25 and row[what] == "another" and "mcycles" not in row
    # An error is no end, and changes no record; on more chips the level is the lower one.
    recorded["traced"] = recorded[what] = "a third"
    before = tpu_compile.read_record()
    assert run_update(monkeypatch, "--topology", "v5e:2x2,v5e:4x4") == 1
    assert levels == ["default, -0.3"] * 2 + ["O0"] and tpu_compile.read_record() == before
    errors = [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines()[1:]]
    assert errors == ["INTERNAL: no room"] * 2


def test_a_row_keeps_its_level(recorded, monkeypatch):
    recorded["traced"] = recorded["program"] = "another"
    levels = []

    def estimate(row, lowered, level):
        levels.append(level)
        return row | {"level": level, "fits": True, "peak_gib": 1.25}, ""

    monkeypatch.setattr(tpu_compile, "estimate", estimate)
    for level, topology in (
        (tpu_compile.HARDEST, "v4:2x2x1"),  # The row that it replaces has cycles.
        ("O0", "v6e:16x16"),
        (tpu_compile.HARDEST, "v5e:2x2"),  # Also if the row there has none.
    ):
        if topology == "v5e:2x2":
            assert run_update(monkeypatch, "--level", "O0") == 0 and levels.pop() == "O0"
            recorded["traced"] = recorded["program"] = "a third"
        assert run_update(monkeypatch, "--topology", topology) == 0 and levels.pop() == level


def test_without_a_compiler_for_tpus_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(tpu_compile.importlib.util, "find_spec", lambda name: None)
    for words, status in ((["--topology", "v5e:2x2"], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["tpu_compile", *words])
        with pytest.raises(SystemExit, match=str(status)):
            tpu_compile.main()
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_the_most_rows_that_fit_are_looked_for(recorded, monkeypatch):
    recorded["traced"] = recorded["program"] = "another"
    tried = []

    def estimate(row, lowered, level):
        peak = 3 + row["batch_per_chip"] / 4
        tried.append((row["batch_per_chip"], level))
        return row | {"level": level, "peak_gib": peak, "fits": peak < 16}, ""

    monkeypatch.setattr(tpu_compile, "estimate", estimate)
    assert run_update(monkeypatch, "--step", "train") == 0
    assert tried == [(8, "default, -0.3"), (16, "O0"), (32, "O0"), (64, "O0")]
    page = (tpu_compile.DOCS / "scale.md").read_text()
    assert "| cris | v5e:2x2 | 32 | 11.0 | 19.0 |" in page
    assert "| cris | train | v5e:2x2 | 32 |" not in page
    # If 8 rows need 3.5 of 16 GiB 32 fit anyway; beside a number nothing is looked for.
    row = {"topology": "v5e:2x2", "batch_per_chip": 8, "peak_gib": 3.5}
    assert next(tpu_compile.larger_batches(row)) == 32
    tried.clear()
    assert run_update(monkeypatch, "--step", "train", "--batch", "24", "--level", "O0") == 0
    assert tried == [(24, "O0")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--topology", "v5e:3x5"], "'v5e:3x5' is no topology"),
        (["--topology", "v5e"], "'v5e' is no topology"),
        (["--topology", "v9:2x2"], "'v9' is not one of v4, "),
        (["--step", "train:foo"], "'train:foo' is not one of train, eval"),
        (["--config", "lavt:xyz"], "'lavt:xyz' is not one of "),
        (["--batch", "0"], "0 is not positive"),
        (["--dtype", "float32"], "the record is of bfloat16"),
    ],
)
def test_bad_arguments_are_told(words, expected, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_update(monkeypatch, *words)
    assert expected in capsys.readouterr().err
