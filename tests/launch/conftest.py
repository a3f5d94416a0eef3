"""Fixtures: folders of programs that a launch script finds and nothing else."""

import shutil

import pytest

from tests.launch.stand_ins import PLAIN, Tools


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of programs, for PATH: PLAIN and no others."""
    folder = tmp_path_factory.mktemp("plain")
    for name in PLAIN:
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.fixture
def tools(tmp_path, plain):
    """Stand-ins of the clouds' tools, which no call has reached yet."""
    return Tools(tmp_path, plain)
