"""Command-line flags: a parser whose errors are one line, types of values, flags of several scripts."""

import argparse
import math
import sys

from nanochat.errors import InputError, shortened


class Flags(argparse.Namespace):
    """A script's flags: vars() holds their values, `given` the names of those that the command line gave."""

    __slots__ = ("given", "actions")  # actions: how argparse reads each of them, by name

    def take(self, values: dict, where):
        """Set flags as the file `where` has them. InputError of a value that a flag cannot have."""
        for name, value in values.items():
            if not is_possible(self.actions[name], value):
                raise InputError(
                    f"{where}: flags.{name} is {quoted(str(value))}, which no run writes; restore it"
                )
        vars(self).update(values)


def is_possible(action: argparse.Action, value) -> bool:
    """Whether a flag could have this value if the command line gave it, or has it by default."""
    if type(value) is type(action.default) and value == action.default:
        return True  # also where it stands for "not given"
    if value is None or isinstance(value, bool) or action.nargs == 0:
        return type(value) is type(action.default)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        parsed = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with whole flag names, defaults shown in --help, one-line errors, and Flags as the result."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse_args(self, args=None) -> Flags:  # type: ignore[override]  # no namespace of the caller's
        # argparse fills in a default only where there is no value yet, so None stays where no flag was given
        unset = argparse.Namespace(**{action.dest: None for action in self._actions})
        values = vars(super().parse_args(args, unset))
        flags = super().parse_args(args, Flags())
        flags.actions = {action.dest: action for action in self._actions}
        flags.given = {name for name, value in values.items() if value is not None}
        return flags

    def parse_known_args(self, args=None, namespace=None):
        """`torchrun … -m MODULE -- FLAGS` keeps our flags from torchrun, which may hand the -- on."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(words[1:] if words[:1] == ["--"] else words, namespace)

    def error(self, message):
        raise InputError(message)


# ---- numbers -----------------------------------------------------------------------------------------------

LARGEST_INTEGER = 2**63 - 1  # of torch and numpy
LARGEST_FLOAT = 1e30  # of other numbers: float32 reaches to 3e38
SMALLEST_FLOAT = 1e-30  # above 0, likewise


def as_whole_number(text: str) -> int | None:
    """The whole number that a text is; None if it is none."""
    try:
        return int(text)
    except ValueError:  # so does Python call more than 4300 digits
        return None


def whole_number(minimum: int, maximum: int = LARGEST_INTEGER, off: int | None = None):
    """argparse type: an integer from minimum to maximum; or `off`, which switches off what the flag sets."""

    def parse(text):
        value = as_whole_number(text)
        if value is None or not (minimum <= value <= maximum or value == off):
            limit = f"<= {maximum}" if value is not None and value > maximum else f">= {minimum}"
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number {limit}{or_off(off)}")
        return value

    return parse


def real_number(
    low: float = 0, high: float = LARGEST_FLOAT, *, above: float | None = None, off: float | None = None
):
    """argparse type: a number from `low`, or above `above`, to `high`; or `off`, which switches off what the
    flag sets.

    It is finite, and either 0 or no nearer to 0 than float32 can tell: torch refuses other numbers, or takes
    them for 0.
    """

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value == off:
            return value
        inside = low <= value <= high if above is None else above < value <= high
        if not inside or 0 < abs(value) < SMALLEST_FLOAT:
            smallest = f"from {low:g}" if above is None else f"above {above:g} and up"
            limits = f"{smallest} to {high:g}{or_off(off)}"
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number {limits}")
        return value

    return parse


def or_off(off: float | None) -> str:
    return "" if off is None else f", nor {off:g}"


def quoted(text: str) -> str:
    """What the user gave, on one line."""
    return repr(shortened(text))


# ---- flags that several scripts have -----------------------------------------------------------------------


def device_flags(add, dtype: str):
    """--device-type and --dtype, for pick_device_type and compute_dtype. dtype: what has it, for --help."""
    add("--device-type", choices=["", "cuda", "cpu"], default="", help="'' = cuda where there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=dtype)
