"""Standard output and error of a script: whatever happens to them, the work goes on.

A stream may be closed, a pipe without a reader, a file on a full disk, a terminal that is gone, or one that
lacks a character. What can be printed is printed; the rest is lost. Printed text holds no commands to the
terminal, because it may come from a name, a file or a model.
"""

import contextlib
import errno
import io
import os
import re
import select
import sys

READER_GONE = 141  # exit code of a tool that a broken pipe ends, as shells have it
STALL_SECONDS = 5  # how long to wait for a slow reader of a non-blocking stream
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all control characters but tab, \n and \r
CURSOR_UP = re.compile(r"\n*(\x1b\[A)*")  # what a progress bar writes between its lines


class PlainText(io.TextIOWrapper):
    """Text without commands to a terminal: colours are left out, control characters are spelt out."""

    def write(self, text: str) -> int:
        if COMMANDS.search(text) and not CURSOR_UP.fullmatch(text):
            text = COMMANDS.sub(lambda match: f"\\x{ord(match[0]):02x}", COLOURS.sub("", text))
        return super().write(text)

    def command(self, text: str):
        """Write a command of our own to the terminal."""
        super().write(text)


class LossyFile(io.FileIO):
    """A file descriptor that drops what cannot be written.

    result: what is printed is the result of the script. Then a reader that is gone ends the script, and any
    other fault is an error.
    """

    def __init__(self, descriptor: int, result: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.result = result
        self.failed = False

    def write(self, data) -> int:
        try:
            written = super().write(data)
            if written is None:  # the stream does not block, and its reader is slow
                select.select([], [self], [], STALL_SECONDS)
                written = super().write(data)
            return len(data) if written is None else written
        except OSError as e:
            first = not self.failed
            self.failed = True
            if first and self.result:
                if e.errno == errno.EPIPE:
                    raise SystemExit(READER_GONE) from None
                raise
            if first and self.fileno() == 1 and e.errno not in (errno.EPIPE, errno.EIO):
                with contextlib.suppress(OSError):
                    line = f"standard output: {e.strerror}; the work goes on, what it prints is lost\n"
                    os.write(2, line.encode())
            return len(data)


def fill_closed_streams():
    """Put /dev/null where a standard stream was closed.

    Otherwise the next file that is opened gets its number, and with it what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def lossy(stream, result: bool = False):
    """The stream as one that never raises. A stream that is no file, such as a notebook's, stays as it is."""
    if stream is None:  # it was closed when Python started
        devnull = LossyFile(os.open(os.devnull, os.O_WRONLY), result)
        return PlainText(io.BufferedWriter(devnull), "utf-8", "backslashreplace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = LossyFile(stream.fileno(), result)
    except (OSError, ValueError):
        return stream
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    return PlainText(
        buffer,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def protect(result: bool = False):
    """Make this process's standard output and error lossy. result: see `LossyFile`."""
    fill_closed_streams()
    sys.stdout = lossy(sys.stdout, result)
    sys.stderr = lossy(sys.stderr)
