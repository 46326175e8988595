"""The one exception that a user's mistake raises.

Commands print its text as one sentence on standard error and exit with code 2; everything else that escapes is a bug
and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a config, a file or an argument: one sentence that names it and says what would be right."""


def run_command(main: Callable[[], int]) -> int:
    """The exit code of main(); 141, as of a program that SIGPIPE ended, where what reads its output has left (`| head`)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141
    return code
