"""Errors of the user's input, in one line that is safe to print to a terminal."""

import contextlib
from pathlib import Path


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one line: the flag or file, what is wrong, what would be right. It may quote names, files
    and messages of other programs, whose line breaks and control characters are replaced.
    """

    def __init__(self, message=""):
        super().__init__(printable(str(message)))


class ProcessLost(InputError):
    """Another process of the run has failed. It may be about to say why, in a better line than this one."""


def printable(text: str) -> str:
    r"""The text on one line. Control characters such as "\x1b" are spelt out: a terminal might obey them."""
    text = " ".join(text.splitlines())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """The text, cut to at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(e: BaseException) -> str:
    """What an error of another library says, short enough for ours."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


@contextlib.contextmanager
def path_in_errors(path: Path):
    """Put the path into any OSError raised inside: a failed read of an open file does not name the file."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise
