"""How commands end when they cannot do what they were asked to: exceptions that are printed as one line."""


class UserError(Exception):
    """Bad input; exit code 2. The message is one line: which object, what was found, what was expected, what to do."""


class Unfinished(Exception):
    """Asked to end before the work was done, and everything is saved; exit code 75. The message says how to go on."""
