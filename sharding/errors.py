"""The one exception that stands for a fault the user can mend."""


class UserError(Exception):
    """A fault the user can mend. The message is one line: what is wrong; what to do.

    Programs print it as ``error: <message>`` on stderr and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
