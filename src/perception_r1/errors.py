"""The one kind of error that a user can cause: the command line prints its sentence and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager

_MOST_TOLD = 300
"""Characters of a library's reason."""


class UserError(ValueError):
    """A setting, file or model that cannot be used; the message says what is wrong, where, and what would be right."""


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library makes of odd files into a sentence: what cannot be used, the reason, what would be right.

    Raises:
        UserError: Anything was raised inside; a `UserError` stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if not isinstance(error, OSError | ImportError):  # those speak for themselves
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{what} ({reason[:_MOST_TOLD]}); {remedy}.") from error
