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


def _ended(argv, stdout):
    """(status, stderr) of Python where it writes to that."""
    done = subprocess.run([sys.executable, *argv], cwd=REPO, stdout=stdout, stderr=subprocess.PIPE)
    return done.returncode, done.stderr.decode()


def test_who_reads_no_more_gets_no_traceback():
    read, write = os.pipe()
    os.close(read)
    program = "import sys; from refseg_jax.errors import command, tell; sys.exit({})"
    whole = "command(lambda: {} or 0)()"
    for written in "print('x' * 10**6)", "print('x')":
        assert _ended(["-c", program.format(whole.format(written))], write) == (141, "")
    # Of a long command what matters lies in files.
    assert _ended(["-c", program.format("tell('x', 'y') or tell('x' * 10**6) or 3")], write) == (
        3,
        "",
    )
    assert _ended(["-m", "refseg_jax.main", "--help"], write) == (0, "")
    os.close(write)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="not Linux")
def test_a_full_disk_beneath_stdout_is_named():
    program = (
        "import sys; from refseg_jax.errors import command, tell; sys.exit(command(tell)('x'))"
    )
    with open("/dev/full", "w") as full:
        assert _ended(["-c", program], full) == (2, "error: stdout: No space left on device\n")
