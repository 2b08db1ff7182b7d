"""What a flag of the training scripts is, and how the values of flags are read.

This loads no torch, so that a report and --help start at once.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from nanochat.arguments import (
    LARGEST_INTEGER,
    ArgumentParser,
    as_whole_number,
    quoted,
    real_number,
    whole_number,
)
from nanochat.config import MATRICES
from nanochat.errors import shortened
from nanochat.rank import matrix_ranks_text

# Larger than any model. Beyond these limits even counting takes minutes, and sizes overflow.
DEEPEST = 4096  # layers
WIDEST = 2**20  # width of a model or of an attention head
LONGEST = 2**31 - 1  # tokens of a context or of a vocabulary, rows of a batch

SCHEDULES = ("constant", "linear", "step", "exponential", "quadratic")  # of ranks over the layers


class Role(Enum):
    """What a flag decides. A report compares two runs accordingly."""

    NAME = "the name of the run's folder"
    PLACE = "where the text or the tokenizer is; runs are compared by their content"
    NEUTRAL = "neither the model nor its training nor their cost"
    REQUEST = "a wish, such as a budget; the run records what it led to, and that is compared"
    CONTEXT = "data, order, steps: the same in two runs of which only the rank differs"
    SHAPE = "the shape of the full-rank model"
    FAMILY = "the shape too, and the same where low rank pays for more layers or a larger width"
    GROUP_RANK = "the rank of attention, MLP or head"
    RANK = "the ranks otherwise"
    RATE = "a learning rate, or another number of the optimizer"
    COST = "time and memory, not what is learned"
    OTHER = "none of these: neither tuned nor compared"
    METHOD = "the method of training and its settings, which may be tuned"


NO_OLD_DEFAULT = object()  # no run was ever recorded without the flag


@dataclass(frozen=True)
class Flag:
    """One flag. A default of False makes it a switch."""

    option: str  # "--model-dim"
    help: str
    role: Role = field(kw_only=True)
    default: object = ""
    type: Callable | None = None  # as in argparse, like choices, metavar and required
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    required: bool = False
    alias: str = ""  # another name on the command line
    free: bool = False  # a run may be resumed with another value
    old_default: object = NO_OLD_DEFAULT  # what runs did that are older than the flag
    short: str | None = None  # in the names that a sweep makes: "lr" of "lr0.02"; None: the whole name

    @property
    def name(self) -> str:
        """Its name in the parsed flags and in config.json: 'model_dim'."""
        return self.option[2:].replace("-", "_")

    def add_to(self, add: Callable):
        """add: add_argument of a parser, or of a group."""
        names = [self.option, self.alias] if self.alias else [self.option]
        if self.default is False:
            add(*names, action="store_true", help=self.help)
        else:
            add(
                *names,
                type=self.type,
                default=self.default,
                choices=self.choices,
                metavar=self.metavar,
                required=self.required,
                help=self.help,
            )


@dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together in --help."""

    title: str
    description: str
    flags: tuple[Flag, ...]

    def add_to(self, parser: ArgumentParser):
        group = parser.add_argument_group(self.title, self.description)
        for flag in self.flags:
            flag.add_to(group.add_argument)

    def defaults(self) -> dict:
        """{name: default}"""
        return {flag.name: flag.default for flag in self.flags}


# ---- values ----------------------------------------------------------------------------------------------
# Each function is an argparse type.


def rank_flag(text: str) -> float:
    """'0' (full rank), a whole number, or a fraction between 0 and 1."""
    value: float | None = as_whole_number(text)
    if value is None:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not 0 < value < 1:
            value = -1
    if not 0 <= value <= LARGEST_INTEGER:
        raise ArgumentTypeError(
            f"{quoted(text)}: give 0 (full rank), a whole number, or a fraction between 0 and 1"
        )
    return value


def matrix_ranks(text: str) -> dict[str, tuple[float, ...]]:
    """'v=128,down=0.5/0' -> {'v': (128,), 'down': (0.5, 0)}: one rank for all layers, or one a layer."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    names = [name.strip() for name, _, _ in parts]
    if unknown := sorted(set(names) - set(MATRICES)):
        raise ArgumentTypeError(
            f"{quoted(text)}: no matrix is called {shortened(', '.join(unknown))}; "
            f"write e.g. v=128,down=0.5, of {', '.join(MATRICES)}; "
            "one rank a layer as v=64/64/128"
        )
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ArgumentTypeError(
            f"{quoted(text)}: gives {repeated[0]} more than once; "
            f"one rank a layer is written {repeated[0]}=64/64/128"
        )
    return {name: tuple(map(rank_flag, ranks.split("/"))) for name, (_, _, ranks) in zip(names, parts)}


def matrix_ranks_flag(text: str) -> str:
    """The same as a text in its usual form, which config.json stores."""
    return matrix_ranks_text(matrix_ranks(text))


def rank_multiple_flag(text: str) -> int:
    value = whole_number(-1)(text)
    if value == 0:
        raise ArgumentTypeError(
            f"{text!r}: give -1 (automatic), 1 (fractions as given), "
            "or what their ranks are to be multiples of, such as 64"
        )
    return value


def layer_map_flag(text: str) -> str:
    if not text:
        return text
    from nanochat.layer_maps import MAP_FORMAT, well_formed

    if text.count(",") >= DEEPEST:
        raise ArgumentTypeError(f"{quoted(text)}: more than {DEEPEST:,} positions")
    if not well_formed(text):
        raise ArgumentTypeError(f"{quoted(text)}: {MAP_FORMAT}")
    return text


def positive_floats(text: str) -> list[float]:
    try:
        return [real_number(above=0)(part) for part in text.split(",") if part.strip()]
    except ArgumentTypeError:
        raise ArgumentTypeError(
            f"{quoted(text)} is not a list of positive numbers such as 100,50,30"
        ) from None


def comma_separated(parse: Callable):
    """argparse type: values for `parse` with commas between them. Returns them ascending, each once."""

    def parse_all(text: str) -> list:
        return sorted({parse(part.strip()) for part in text.split(",") if part.strip()}) or parse("")

    return parse_all
