"""The one exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong; what to do.

    Programs print it as ``error: <message>`` on stderr and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
