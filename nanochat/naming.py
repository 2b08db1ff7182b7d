"""Names that a user gives to runs: what can be one, and what is said of one that is not there.

Runs, tokenizers, sweeps, their presets, points and evaluations have names of one kind, the tag, also where a
file of another run names them. A tag becomes the name of a folder, of locks and other files, a part of a W&B
name, a word of TAG[:STEP], and a word of batch scripts.
"""

import difflib
import re
import shlex
import unicodedata
from argparse import ArgumentTypeError
from pathlib import Path

from nanochat.common import InputError, get_base_dir, quoted
from nanochat.metrics import runs_dir

MARKS = " ._-+=,@()"  # what a tag may hold besides letters and digits of any script
LONGEST_TAG = 150  # bytes: file systems take 255, and names of locks are longer than the tag
LONGEST_RUN_NAME = 128  # characters that W&B takes
RULE = (
    f"use letters, digits, spaces and {' '.join(MARKS.strip())}, not beginning with . or -, "
    f"at most {LONGEST_TAG} bytes"
)


# ---- what can be a name ------------------------------------------------------------------------------------


def is_tag(text) -> bool:
    """Whether a value is a text that can name a run: one part of a path, which no command takes for a flag."""
    if not isinstance(text, str) or not text or text[0] in ".-" or text != text.strip():
        return False
    if len(text.encode("utf-8", "replace")) > LONGEST_TAG:
        return False
    return all(c in MARKS or unicodedata.category(c)[0] in "LMN" for c in text)


def check_tag(flag: str, text) -> str:
    """The tag itself. InputError, beginning with the flag or the file and key, if it cannot be one."""
    if not is_tag(text):
        raise InputError(f"{flag} {quoted(str(text))}: becomes the name of a folder; {RULE}")
    return text


def tag(text: str) -> str:
    """argparse type: a tag."""
    if not is_tag(text):
        raise ArgumentTypeError(f"{quoted(text)} becomes the name of a folder; {RULE}")
    return text


def optional_tag(text: str) -> str:
    """argparse type: a tag, or ''."""
    return tag(text) if text else ""


def run_name(text: str) -> str:
    """argparse type: a name on W&B's dashboard."""
    if not text.strip() or not text.isprintable() or len(text) > LONGEST_RUN_NAME:
        raise ArgumentTypeError(
            f"{quoted(text)}: give W&B a name of 1 to {LONGEST_RUN_NAME} printable "
            "characters, or 'dummy' to turn it off"
        )
    return text


def part_of_tag(text: str) -> str:
    """What a tag can hold of any text, such as the name of a file or a value."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def lock_path(name: str, kind: str = "") -> Path:
    """The lock of a run, or of a thing of another kind: it begins with a dot, as no tag does."""
    name = name if is_tag(name) else part_of_tag(name)
    return get_base_dir() / "locks" / (f".{kind}.{name}.lock" if kind else f"{name}.lock")


# ---- words of commands -------------------------------------------------------------------------------------


def option(flag: str, value: str) -> tuple[str, ...]:
    """A flag and its value as words of a command. A word that begins with - and is no number would be a flag."""
    apart = not value.startswith("-") or re.fullmatch(r"-\d+|-\d*\.\d+", value)
    return (flag, value) if apart else (f"{flag}={value}",)


def path_word(path: Path) -> str:
    """A path as a word of a command, which does not take it for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def shell_command(*words) -> str:
    """A command for the user to copy."""
    return shlex.join(map(str, words))


# ---- runs by their names -----------------------------------------------------------------------------------


def run_folder(flag: str, text: str) -> Path:
    """The folder of the run that a flag names. InputError, beginning with the flag, if there is none."""
    folder = runs_dir() / check_tag(flag, text)
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {text}: {no_such_run(text)}")
    return folder


def no_such_run(text: str) -> str:
    """That there is none of this name, where it was looked for, and which names come near."""
    tags = sorted(path.parent.name for path in runs_dir().glob("*/config.json"))
    near = difflib.get_close_matches(text, tags, 3)
    if near:
        return f"no such run in {runs_dir()}; did you mean {' or '.join(near)}?"
    shown = ", ".join(tags[:20]) + (f" and {len(tags) - 20} more" if len(tags) > 20 else "")
    return f"no such run in {runs_dir()}; " + (f"there are: {shown}" if tags else "it holds no runs")
