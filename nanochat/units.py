"""Numbers with their units, as console lines, tables and figures show them."""

import math

# ladders of units: (size of the unit, its name), ascending
COUNT = [(1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")]
FLOP = [(1000.0**i, f"{p}FLOP") for i, p in enumerate(("", "k", "M", "G", "T", "P", "E", "Z"))]
BYTES = [(1024.0**i, u) for i, u in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))]
TIME = [(1, "s"), (60, "min"), (3600, "h")]


def choose_unit(value: float, ladder: list) -> tuple[float, str]:
    """The largest unit of the ladder that `value`, rounded to three digits, fills at least once."""
    return next((step for step in reversed(ladder) if float(f"{abs(value) / step[0]:.3g}") >= 1), ladder[0])


def three_digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.0532, 5.24, 561, 1013."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def human(value: float, ladder: list) -> str:
    """A number with its unit: 5.24 M, 612 MiB, 12.3 min, 1.53 PFLOP."""
    size, unit = choose_unit(value, ladder)
    is_count = size == 1 and unit in ("", "B")  # there is no half token and no half byte
    digits = f"{value:.0f}" if is_count else three_digits(value / size)
    return f"{digits} {unit}".rstrip()


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
