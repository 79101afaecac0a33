"""The error that a call must raise, to be compared with another."""

import pytest


def error_of(call, *args, **kwargs) -> tuple[type, str]:
    """Class and message of the error that the call must raise."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 the caller compares both
        call(*args, **kwargs)
    return raised.type, str(raised.value)
