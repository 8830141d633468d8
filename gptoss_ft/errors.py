"""Errors that are the user's to mend: each says what, where and the cure in one line."""


class UserError(ValueError):
    """Bad input or an unusable environment; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class RestUnreadableError(UserError):
    """A fault in a file of rows behind which nobody can tell where the next row begins."""


class ConfigError(UserError):
    """A key, value or argument that cannot be accepted; nothing has been written."""

    exit_code = 2
