"""What is wrong with what the user gave, in one line that a terminal can show."""

import contextlib
from pathlib import Path


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: the flag or file, what is wrong, what
    would be right.

    It may quote names, files and what other programs said. Their line breaks and control characters are not
    kept.
    """

    def __init__(self, message=""):
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    r"""The text on one line, as no terminal takes it for a command: "\x1b" and its like are spelt out."""
    text = " ".join(text.splitlines())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """Short enough for a line."""
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def named(path: Path):
    """An OSError in here names the file: of an open file that cannot be read, the system does not."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise
