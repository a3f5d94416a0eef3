"""How a command ends: with one line and a status."""

import pytest

from refseg_jax.errors import TERMINATED, UserError, command


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
