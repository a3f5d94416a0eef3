"""Fixtures: where the real photographs and the released models' outputs lie, if they are here."""

import gc
import itertools
import os
import pathlib

REPO = pathlib.Path(__file__).resolve().parents[1]

# Before JAX starts: eight devices, so that sharding can be tested (other tests use the first),
# machine code that is compiled fast rather than fast, and one cache of compiled programs for all
# tests and the processes they start. All of it on the CPU: what compiles for TPUs finds none.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPO / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    """First what processes are set up for during a minute, so that one worker has all of it."""
    items.sort(key=lambda item: item.path.stem != "test_multihost")


def pytest_collection_finish():
    """To look for garbage among all that was imported, after a few new objects, takes long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def _data_root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("REFSEG_TEST_DATA") or REPO.parent / "shared")


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Root of the real test data (`data/` and `golden/`); skips the test where it is absent."""
    root = _data_root()
    if not root.is_dir():
        pytest.skip(f"no real test data at {root}; set REFSEG_TEST_DATA to where it lies")
    return root


@pytest.fixture
def like_a_tpu(monkeypatch):
    """Call it, and what is traced from then on is what a TPU runs, where that differs."""

    def choose():
        monkeypatch.setattr(
            "jax.lax.platform_dependent",
            lambda *arguments, default, tpu=None, **others: (tpu or default)(*arguments),
        )

    return choose


def _slice_at_numbers(patch):
    """Spares interpreted kernels three operations per constant index, in case it is negative.

    They take half of the time. What is patched is JAX's own: where it is gone, only time is lost.
    """
    try:
        from jax._src.state import discharge

        slice_of = discharge._maybe_convert_to_dynamic_slice
    except (ImportError, AttributeError):
        return

    def slice_at(indexer):
        found = slice_of(indexer)
        if found:
            arrays, *others = found
            starts = [getattr(index, "start", index) for index in indexer.indices]
            starts = [i if isinstance(i, int) else x for i, x in zip(starts, arrays, strict=True)]
            found = tuple(starts), *others
        return found

    patch.setattr(discharge, "_maybe_convert_to_dynamic_slice", slice_at)


def _check_blocks(grid, out_specs, compiler_params, **_):
    """Each block of results is written by one core, in steps that follow one another.

    Of what a grid calls parallel, each of a TPU's two cores may take a part; and a block that is
    come back to is not read again. Interpreted kernels know neither.
    """
    import jax

    parallel = [i for i, x in enumerate(compiler_params.dimension_semantics) if x == "parallel"]
    for spec in jax.tree.leaves(out_specs):
        with jax.ensure_compile_time_eval():
            steps = [
                (tuple(map(int, spec.index_map(*step))), *(step[i] for i in parallel))
                for step in itertools.product(*map(range, grid))
            ]
        blocks = [block for (block, *_), _ in itertools.groupby(steps)]
        assert len(blocks) == len(set(blocks)), f"{spec} writes to a block twice"


@pytest.fixture(scope="module")
def interpreted():
    """Kernels run on the CPU, in any dtype; for the rest of the module.

    They are traced once for arrays of the same shapes: a test that changes what they are made of
    needs other shapes than those before.
    """
    import jax
    from jax.experimental import pallas as pl

    pallas_call = pl.pallas_call

    def interpret(kernel, **options):
        _check_blocks(**options)
        return pallas_call(kernel, **({"interpret": True} | options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.experimental.pallas.pallas_call", interpret)
        _slice_at_numbers(patch)
        jax.clear_caches()  # Of kernels that are traced already.
        yield
    jax.clear_caches()
