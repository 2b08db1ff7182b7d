"""Reading metrics.jsonl: one checked row a step, however long the run was.

A million rows as dicts take more than two gigabytes. Here rows with the same keys share a table that has an
array for each key, which takes a tenth of that. A file is read when its first row is asked for.
"""

import itertools
import math
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path

from nanochat.errors import shortened
from nanochat.files import is_kind, open_file, parse_json, path_in_errors

# x-axes: (key in the history, the same quantity's name in time_to_ppl/P/<name>)
CLOCKS = (
    ("total_training_time", "seconds"),
    ("step", "step"),
    ("total_tokens", "tokens"),
    ("total_training_flops", "flops"),
)

CLOCK_KEYS = [key for key, _ in CLOCKS]

MAX_LINE = 2**24  # bytes; a longer line is no row
MAX_STEP = 2**63 - 1
MAX_INTEGER = 10**300  # so that it can become a float
DRAWN_ROWS = 20_000  # a figure draws all rows up to these: more than it has dots from left to right
CHUNK = 512  # rows that are appended to the columns together
# keys, and beginnings of keys, whose value is a number; null where it is not known
NUMBERS = ("train/", "val/", "mem/", "params/", "flops/", "core_metric", "centered_results/")


# ---- one row -----------------------------------------------------------------------------------------------


def row_fault(row) -> str:
    """Why this is no row of metrics; '' if it is one. NaN and infinities are numbers: a run may diverge."""
    if not isinstance(row, dict):
        return "no JSON object"
    if type(row.get("step")) is not int or not 0 <= row["step"] <= MAX_STEP:
        return f"step: {shortened(repr(row.get('step')))}"
    for key, value in row.items():
        kind = type(value)
        if kind is float or (kind is int and -MAX_INTEGER < value < MAX_INTEGER):
            continue
        if not is_expected(key, value):
            return f"{shortened(key)}: {shortened(repr(value))}"
    return ""


def is_expected(key: str, value) -> bool:
    """Whether a value that is no number may have this key. Keys of newer versions may have any."""
    if key == "sample":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if key == "adalora/ranks":
        return isinstance(value, dict) and all(is_kind(rank, int) for rank in value.values())
    if key.startswith(NUMBERS):
        return value is None
    return type(value) is not int and key not in CLOCK_KEYS


def parsed(line: bytes) -> tuple[dict, str]:
    """(the row, ""), or ({}, why the line is no row)."""
    row = parse_json(line.decode("utf-8", "replace"))
    fault = row_fault(row)
    return ({}, fault) if fault else (row, "")


# ---- many rows ---------------------------------------------------------------------------------------------


class Table:
    """Rows with the same keys, column by column."""

    def __init__(self, keys: tuple[str, ...]):
        self.keys = keys
        self.columns = [array("d") for _ in keys]  # an array of floats or of integers, else a list
        self.pending = []  # values of the newest rows
        self.size = 0

    def append(self, row: dict):
        self.pending.append(tuple(row.values()))
        self.size += 1
        if len(self.pending) == CHUNK:
            self.flush()

    def flush(self):
        for i, values in enumerate(zip(*self.pending)):
            self.columns[i] = extend_column(self.columns[i], values)
        self.pending = []

    def row(self, place: int) -> dict:
        return {key: column[place] for key, column in zip(self.keys, self.columns)}


def extend_column(column: array | list, values: tuple) -> array | list:
    """The column with these values at its end. Each keeps its type: an array becomes a list if it must."""
    new = compact(values)
    if not column:
        return new
    same_type = getattr(column, "typecode", None) == getattr(new, "typecode", None)  # lists have no typecode
    if not same_type:
        return [*column, *new]
    column.extend(new)
    return column


def compact(values: tuple) -> array | list:
    """An array if all values are floats, or all are integers of 64 bits."""
    types = set(map(type, values))
    if types == {float}:
        return array("d", values)
    if types == {int} and min(values) >= -(2**63) and max(values) < 2**63:
        return array("q", values)
    return list(values)


class HistoryRows:
    """Rows in the order of their steps.

    A resumed run repeats the steps after its checkpoint: the last values count.
    """

    def __init__(self, rows: Iterable[dict]):
        self.tables = {}  # {keys: (Table, its number)}
        self.table_list = []  # the same tables, by their numbers
        self.table_numbers = array("L")  # the table of each row, in the order of reading
        self.places = array("Q")  # of each row within its table
        steps = array("q")
        for row in rows:
            steps.append(row["step"])
            self.add(row)
        self.flush()
        self.order: range | array = range(len(steps))
        if any(a >= b for a, b in itertools.pairwise(steps)):
            self.order = self.merge_steps(steps)
            self.flush()

    def add(self, row: dict):
        keys = tuple(row)
        if keys not in self.tables:
            self.tables[keys] = Table(keys), len(self.table_list)
            self.table_list.append(self.tables[keys][0])
        table, number = self.tables[keys]
        self.table_numbers.append(number)
        self.places.append(table.size)
        table.append(row)

    def flush(self):
        for table in self.table_list:
            table.flush()

    def merge_steps(self, steps: array) -> array:
        """The order of rows by step. Several rows of one step become one new row."""
        order = array("Q")
        ordered = sorted(range(len(steps)), key=steps.__getitem__)  # keeps the order of rows of one step
        for _, indices in itertools.groupby(ordered, key=steps.__getitem__):
            first, *repeats = indices
            if repeats:
                row = self.row(first)
                for number in repeats:
                    row.update(self.row(number))
                first = len(self.table_numbers)
                self.add(row)
            order.append(first)
        return order

    def __iter__(self) -> Iterator[dict]:
        return map(self.row, self.order)

    def row(self, number: int) -> dict:
        return self.table_list[self.table_numbers[number]].row(self.places[number])

    def series(self, keys: tuple[str, ...]) -> Iterator[tuple]:
        """The values of these keys in each row that has them all, in order."""
        columns_by_table = [columns_with(table, keys) for table in self.table_list]
        table_numbers = self.table_numbers
        places = self.places
        for number in self.order:
            columns = columns_by_table[table_numbers[number]]
            if columns:
                place = places[number]
                yield tuple([column[place] for column in columns])


def columns_with(table: Table, keys: tuple[str, ...]) -> list:
    """The table's columns of these keys; none if one is missing."""
    if not set(keys) <= set(table.keys):
        return []
    return [table.columns[table.keys.index(key)] for key in keys]


class History(Sequence):
    """The rows of a run, as a list of dicts that is read from its file when it is first used."""

    def __init__(self, rows: Iterable[dict]):
        """rows: checked; in any order, perhaps several of one step. They are read when they are needed."""
        self.source = rows

    @cached_property
    def rows(self) -> HistoryRows:
        rows = HistoryRows(self.source)
        self.source = ()
        return rows

    def __len__(self):
        return len(self.rows.order)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, i):
        numbers = self.rows.order[i]
        return [self.rows.row(n) for n in numbers] if isinstance(i, slice) else self.rows.row(numbers)

    def __eq__(self, other):
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as the language asks of what compares but may change

    def __repr__(self):
        return f"History({list(self)!r})"


def series(history: Sequence[dict], *keys: str) -> Iterator[tuple]:
    """The values of these keys in each row that has them all, in order."""
    if isinstance(history, History):
        yield from history.rows.series(keys)
        return
    for row in history:
        if set(keys) <= row.keys():
            yield tuple([row[key] for key in keys])


def thin_history(history: Sequence[dict], keys: list[str]) -> Sequence[dict]:
    """The rows that a figure of these keys needs: all, or fewer where it could not show so many.

    Then it gets, of each stretch of rows with a key, the first, the last, the lowest and the highest.
    """
    if len(history) <= DRAWN_ROWS:
        return history
    steps = set()
    for key in keys:
        points = [(step, y) for step, y in series(history, "step", key) if y is not None and math.isfinite(y)]
        length = max(1, 4 * len(points) // DRAWN_ROWS)
        for start in range(0, len(points), length):
            stretch = points[start : start + length]
            extremes = min(stretch, key=itemgetter(1)), max(stretch, key=itemgetter(1))
            steps |= {step for step, _ in (stretch[0], stretch[-1], *extremes)}
    all_steps = array("q", (step for (step,) in series(history, "step")))
    return [history[bisect_left(all_steps, step)] for step in sorted(steps)]


# ---- the file ----------------------------------------------------------------------------------------------


def read_history(folder: Path) -> History:
    """metrics.jsonl of a run folder, merged by step; no rows where there is no such file."""
    return History(read_rows(folder / "metrics.jsonl"))


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a file. Lines that are no rows are left out, with one note for all of them.

    Half a last line, which a killed process leaves, gets no note.
    """
    damaged = []  # (number of the line, why)
    if not path.exists():
        return
    with path_in_errors(path), open_file(path) as f:
        for number, line in enumerate(bounded_lines(f), 1):
            row, fault = parsed(line)
            if row:
                yield row
            elif line.strip() and line.endswith(b"\n"):
                damaged.append((number, fault))
    if damaged:
        number, fault = damaged[0]
        lines = "1 line" if len(damaged) == 1 else f"{len(damaged):,} lines"
        print(
            f"note: {path}: {lines} left out, no rows of metrics; the first is line {number:,} ({fault})",
            file=sys.stderr,
            flush=True,
        )


def bounded_lines(f) -> Iterator[bytes]:
    """The lines of a binary file. One longer than MAX_LINE becomes a short one that is no row either."""
    while line := f.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while len(line) == MAX_LINE and not line.endswith(b"\n"):
                line = f.readline(MAX_LINE)
            line = b"{\n"
        yield line
