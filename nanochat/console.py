"""Standard output and error of a script: what happens to them never ends the work.

They may be closed, a pipe that nobody reads any more, a file on a full disk, a terminal that is gone, or one
that lacks a character. What can be printed is printed; the rest is lost. What is printed holds no commands to
the terminal: a name, a file or a model may have made it.
"""

import contextlib
import errno
import io
import os
import re
import select
import sys

READER_GONE = 141  # exit code of a tool that a broken pipe ends, as shells have it
STALLED = 5  # seconds that a stream without blocking is waited for
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all control characters but tab, \n and \r
CURSOR_UP = re.compile(r"\n*(\x1b\[A)*")  # what a progress bar writes between its lines, by itself


class Plain(io.TextIOWrapper):
    """Text of which a terminal takes nothing for a command: colours go, control characters are spelt out."""

    def write(self, text: str) -> int:
        if COMMANDS.search(text) and not CURSOR_UP.fullmatch(text):
            text = COMMANDS.sub(lambda match: f"\\x{ord(match[0]):02x}", COLOURS.sub("", text))
        return super().write(text)

    def command(self, text: str):
        """Write our own commands to the terminal."""
        super().write(text)


class Lossy(io.FileIO):
    """A file descriptor to write to that drops what it cannot write.

    result: the script is there for what it prints. So a reader that is gone ends it, and what else goes wrong
    is an error.
    """

    def __init__(self, descriptor: int, result: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.result = result
        self.failed = False

    def write(self, data) -> int:
        try:
            written = super().write(data)
            if written is None:  # somebody has set it to not block, and its reader is slow
                select.select([], [self], [], STALLED)
                written = super().write(data)
            return len(data) if written is None else written
        except OSError as e:
            first = not self.failed
            self.failed = True
            if first and self.result:
                raise SystemExit(READER_GONE) if e.errno == errno.EPIPE else e
            if first and self.fileno() == 1 and e.errno not in (errno.EPIPE, errno.EIO):
                with contextlib.suppress(OSError):
                    line = f"standard output: {e.strerror}; the work goes on, what it prints is lost\n"
                    os.write(2, line.encode())
            return len(data)


def occupy():
    """Put /dev/null where a standard stream was closed. A file opened later would get its number, and with it
    what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def lossy(stream, result: bool = False):
    """The same stream as one that never raises. Streams that are no files, such as a notebook's, stay as they
    are.
    """
    if stream is None:  # it was closed when Python started
        nothing = Lossy(os.open(os.devnull, os.O_WRONLY), result)
        return Plain(io.BufferedWriter(nothing), "utf-8", "backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = Lossy(stream.fileno(), result)
    except (OSError, ValueError):
        return stream
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    return Plain(
        buffer,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def protect(result: bool = False):
    """Make this process's standard output and error such streams. result: see `Lossy`."""
    occupy()
    sys.stdout = lossy(sys.stdout, result)
    sys.stderr = lossy(sys.stderr)
