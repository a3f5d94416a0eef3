"""Fixtures: where the real photographs and the released models' outputs lie, if they are here."""

import os
import pathlib

# Before JAX starts: eight devices, so that sharding can be tested. Others use the first.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pytest  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parents[1]


def _data_root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("REFSEG_TEST_DATA") or REPO.parent / "shared")


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Root of the real test data (`data/` and `golden/`); skips the test where it is absent."""
    root = _data_root()
    if not root.is_dir():
        pytest.skip(f"no real test data at {root}; set REFSEG_TEST_DATA to where it lies")
    return root
