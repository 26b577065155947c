"""Ctrl-C while a program is loaded: the imports take a moment, in which nobody catches KeyboardInterrupt."""

import signal

PROGRAMS = ("gdd_dist", "sharding")


def started(arguments: list[str], original: list[str]) -> bool:
    """Whether Python is just loading one of our programs (``python -m``), and not somebody's program that imports us.

    ``arguments``: sys.argv, which is "-m" until the module is found; ``original``: sys.orig_argv.
    """
    if arguments[:1] != ["-m"] or "-m" not in original[:-1]:
        return False
    return original[original.index("-m") + 1].partition(".")[0] in PROGRAMS


def end_silently() -> None:
    """From now on, Ctrl-C ends this process at once, without a traceback; where it is ignored (nohup), it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, which the caller catches."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
