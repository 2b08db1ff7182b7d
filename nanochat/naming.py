"""Names that a user gives to runs: what can be one, and what is said of one that is not there.

A tag becomes the name of a folder, of locks and other files, a part of a W&B name, and a word of TAG[:STEP].
"""
import difflib
import unicodedata
from argparse import ArgumentTypeError
from pathlib import Path

from nanochat.common import InputError, quoted
from nanochat.metrics import runs_dir

MARKS = " ._-+=,@()"   # what a tag may hold besides letters and digits of any script
LONGEST_TAG = 150      # bytes: file systems take 255, and names of locks are longer than the tag
LONGEST_RUN_NAME = 128  # characters that W&B takes
RULE = (f"use letters, digits, spaces and {' '.join(MARKS.strip())}, not beginning with . or -, "
        f"at most {LONGEST_TAG} bytes")


# ---- what can be a name ------------------------------------------------------------------------------------

def is_tag(text: str) -> bool:
    """Whether a text can name a run: one part of a path, which no command takes for an option."""
    if not text or text[0] in ".-" or text != text.strip():
        return False
    if len(text.encode("utf-8", "replace")) > LONGEST_TAG:
        return False
    return all(c in MARKS or unicodedata.category(c)[0] in "LMN" for c in text)


def check_tag(flag: str, text: str) -> str:
    """The tag itself. InputError, beginning with the flag, if it cannot be one."""
    if not is_tag(text):
        raise InputError(f"{flag} {quoted(text)}: becomes the name of a folder; {RULE}")
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
        raise ArgumentTypeError(f"{quoted(text)}: give W&B a name of 1 to {LONGEST_RUN_NAME} printable "
                                "characters, or 'dummy' to turn it off")
    return text


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
