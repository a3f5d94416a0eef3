"""How a command ends: with one line and a status."""

import os
import pathlib
import subprocess
import sys

import pytest

from refseg_jax.data.files import write_whole
from refseg_jax.errors import TERMINATED, UserError, command
from tests.conftest import REPO


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no\nsuch \udcff"), 2, "error: no such \\udcff\n"),
        (UserError("stopped", TERMINATED), 143, "error: stopped\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "error: a file: No space left on device\n"),
        (ImportError("Please install gcsfs"), 2, "error: gs:// needs a library"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_command_ends_in_one_line(error, status, line, capsys):
    def main(argv):
        """Says what it does."""
        raise error

    checked = command(main)
    assert checked(["--x"]) == status and checked.__doc__ == "Says what it does."
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        command(open)("/nowhere/at/all")
    assert command(len)([1, 2]) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()
    write_whole("/dev/null", b"")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_whole(path, "newer")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_who_reads_no_more_gets_no_traceback():
    program = "import sys; from refseg_jax.errors import command; sys.exit(command(lambda: {})())"
    for written in "print('x' * 10**6)", "print('x')":
        read, write = os.pipe()
        os.close(read)
        code = program.format(f"{written} or 0")
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, stdout=write, stderr=subprocess.PIPE
        )
        os.close(write)
        assert (process.returncode, process.stderr) == (141, b"")
