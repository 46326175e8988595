"""The one exception that a user's mistake raises.

Commands print its text as one sentence on standard error and exit with code 2; everything else that escapes is a bug
and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in a config, a file or an argument: one sentence that names it and says what would be right."""
