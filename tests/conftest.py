"""Fixtures: where the real photographs and the released models' outputs lie, if they are here."""

import os
import pathlib

REPO = pathlib.Path(__file__).resolve().parents[1]

# Before JAX starts: eight devices, so that sharding can be tested (other tests use the first), and
# one cache of compiled programs for all tests and the processes they start.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPO / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import pytest  # noqa: E402


def _data_root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("REFSEG_TEST_DATA") or REPO.parent / "shared")


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Root of the real test data (`data/` and `golden/`); skips the test where it is absent."""
    root = _data_root()
    if not root.is_dir():
        pytest.skip(f"no real test data at {root}; set REFSEG_TEST_DATA to where it lies")
    return root
