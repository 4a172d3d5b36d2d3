"""Errors that a user can mend."""


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


class Untrusted(UserError):
    """A name that would run code, in a file that the user has not written."""
