"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do about it.

    The command lines print it as a single line and exit with status 2; everything else is a bug
    and keeps its traceback.
    """
