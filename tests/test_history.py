"""metrics.jsonl: which lines are rows, what is said of the others, and how much memory many of them take."""

import json
import math
import tracemalloc

import pytest

from nanochat import history
from nanochat.history import History, read_history, series, thin_history
from nanochat.metrics import load_run


def row(step, **more):
    return {
        "step": step,
        "total_tokens": 10 * step,
        "total_training_time": 0.5 * step,
        "train/loss": 1 / step,
        **more,
    }


def test_rows_keep_their_values_and_types_whatever_the_columns_hold():
    rows = [
        row(1, **{"train/mfu": None, "val/loss": math.inf}),
        row(2),
        row(3, **{"train/mfu": 0.25}),
        row(4, note=2**70),
        row(5, note=1.5),
        row(6, note=3),
        {"step": 7, "sample": ["a", "b"], "done": True},
    ]
    read = History(rows)
    assert read == rows and rows == read and read[-1] == rows[-1] and read[1:3] == rows[1:3]
    types = [type(value) for r in rows for value in r.values()]
    assert [type(value) for r in read for value in r.values()] == types
    for history_of_rows in (read, rows):
        assert list(series(history_of_rows, "note", "step")) == [(2**70, 4), (1.5, 5), (3, 6)]
    assert read != rows[:-1] and not History([]) and len(read) == 7


def test_a_repeated_step_is_one_row_in_its_place():
    repeated = [row(1), row(2, a=1), row(3, **{"val/loss": 1.0}), row(2, a=2), row(3, b=1), row(4)]
    assert History(repeated) == [row(1), row(2, a=2), row(3, b=1, **{"val/loss": 1.0}), row(4)]


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "null",
        "7",
        '"step"',
        "{",
        '{"step"',
        "[" * 10_000,
        '{"a": ' * 10_000,
        "{}",
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1.0}',
        '{"step": -1}',
        '{"step": null}',
        '{"step": [1]}',
        '{"step": NaN}',
        '{"step": 1e3}',
        f'{{"step": {2**63}}}',
        f'{{"step": 1{"0" * 5000}}}',
        '{"step": 1, "total_tokens": "9"}',
        '{"step": 1, "total_training_time": null}',
        '{"step": 1, "total_training_flops": false}',
        '{"step": 1, "val/ppl": "20"}',
        '{"step": 1, "train/dt": [1]}',
        '{"step": 1, "mem/peak_bytes": {}}',
        f'{{"step": 1, "total_tokens": 1{"0" * 400}}}',
        f'{{"step": 1, "new": -1{"0" * 400}}}',
        '{"step": 1, "sample": "text"}',
        '{"step": 1, "sample": [1]}',
        '{"step": 1, "adalora/ranks": {"q": "1"}}',
    ],
)
def test_lines_that_are_no_rows_are_left_out_with_one_note(tmp_path, capsys, line):
    good = [row(1), {"step": 2, "train/loss": math.nan, "val/ppl": math.inf, "new key": {"a": [1]}}]
    torn = '{"step": 3, "to'  # by a kill
    lines = [json.dumps(good[0]), line, json.dumps(good[1]), line, "", torn]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.json").write_text('{"flags": {}}')
    run = load_run(tmp_path)
    assert capsys.readouterr().err == ""  # it is read only when it is used
    assert [entry["step"] for entry in run.history] == [1, 2] and run.history[0] == good[0]
    assert list(run.history)[1].keys() == good[1].keys()
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and len(note) < 300 + len(str(tmp_path))
    assert note.startswith(f"note: {tmp_path}/metrics.jsonl: 2 lines left out")
    assert "the first is line 2 (" in note


def test_a_line_without_end_takes_no_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(history, "MAX_LINE", 1000)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n' + '{"step": 2, "x": "' + "y" * 5000 + '"}\n{"step": 3}\n'
    )
    assert read_history(tmp_path) == [{"step": 1}, {"step": 3}]
    assert "1 line left out" in capsys.readouterr().err


def test_many_rows_take_a_tenth_of_what_dicts_take(tmp_path):
    keys = [f"train/{name}" for name in ("loss", "dt", "lrm", "epoch", "tok_per_sec", "grad_norm")]
    with open(tmp_path / "metrics.jsonl", "w") as f:
        for step in range(1, 3001):
            f.write(json.dumps(row(step, **dict.fromkeys(keys, 1 / step))) + "\n")
    tracemalloc.start()
    rows = read_history(tmp_path)
    assert len(rows) == 3000 and rows[-1]["train/dt"] == 1 / 3000
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 3000 * 200  # bytes; a dict of these values takes more than 700


def test_a_figure_of_many_rows_keeps_their_ends_and_extremes(monkeypatch):
    rows = [row(step) for step in range(1, 2001)]
    rows[700] |= {"train/loss": 99.0}
    rows[701] |= {"train/loss": -5.0, "val/loss": 4.0}
    rows[900] |= {"train/loss": math.nan}
    assert thin_history(rows, ["train/loss"]) is rows
    monkeypatch.setattr(history, "DRAWN_ROWS", 100)
    few = thin_history(History(rows), ["val/loss", "train/loss"])
    kept = [rows[0], rows[700], rows[701], rows[-1]]
    assert len(few) < 150 and [r for r in few if r in kept] == kept
    assert [r["step"] for r in few] == sorted({r["step"] for r in few})
