"""What ends a command early: a mistake that its user can mend, or Ctrl-C."""


class UserError(Exception):
    """A mistake in what the user gave, told in one line and without a traceback.

    Args:
        cause: what is wrong, with the value that was met
        remedy: what to do about it
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class Interrupted(Exception):
    """Ctrl-C, once everything worth keeping is kept. Its text says where the run stopped and how to go on."""
