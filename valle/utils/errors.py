"""The one exception for what a user can mend: commands print it as one line and exit with code 2."""


class UserError(Exception):
    """Bad input. The message is one line: which object, what was found, what was expected, what to do."""
