"""The one kind of error that a user can cause: the command line prints its sentence and exits with status 2."""


class UserError(ValueError):
    """A setting, file or model that cannot be used; the message says what is wrong, where, and what would be right."""
