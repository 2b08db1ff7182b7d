"""The report: its numbers against hand-computed ones, when it refuses a ratio, and what its page may hold."""

import copy
import csv
import json
import math
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from nanochat import metrics
from nanochat.errors import InputError
from nanochat.report import comparable, run_tables
from nanochat.report.configurations import configurations
from nanochat.report.page import CSS
from nanochat.report.run_figures import draw_run_figures, labels_in_words, loss_limits
from nanochat.units import BYTES, COUNT, FLOP, TIME, choose_unit, human, three_digits
from scripts import report

FIGURES = ("loss.png", "parameters.png", "memory.png", "perplexity.png")

CONFIG = {
    "flags": {
        "depth": 4,
        "attn_rank": 0,
        "data": "tinystories",
        "seed": 42,
        "ppl_thresholds": "100,50",
        "model_tag": "x",
        "warmup_steps": 0,
        "warmdown_ratio": 0.5,
        "final_lr_frac": 0.0,
        "device_batch_size": 16,
    },
    "derived": {
        "model": {
            "n_layer": 4,
            "n_embd": 256,
            "n_head": 4,
            "n_kv_head": 4,
            "vocab_size": 4096,
            "sequence_len": 256,
            "attn_ranks": [0, 0, 0, 0],
            "mlp_ranks": [0, 0, 0, 0],
            "lm_head_rank": 0,
        },
        "num_iterations": 200,
        "total_batch_size": 4096,
        "tokens": 819200,
        "tokenizer_hash": "cc33",
        "val_tokens": 100000,
        "corpus": {"name": "tinystories", "train_fingerprint": "aa11", "val_fingerprint": "bb22"},
    },
    "git": {"commit": "996c90b1234567890", "dirty": False},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "device": {"type": "cpu", "name": "EPYC", "processes": 1, "threads": 2, "dtype": "float32"},
    "seed": 42,
}
SUMMARY = {
    "status": "finished",
    "step": 200,
    "val/loss": 3.0,
    "val/ppl": 20.0,
    "val/bpb": 1.1,
    "params/total": 5_242_880,
    "params/embedding": 1_048_576,
    "params/lm_head": 1_048_576,
    "params/attention": 1_048_576,
    "params/mlp": 2_097_152,
    "params/other": 0,
    "flops/per_token": 26_000_000,
    "mem/peak_bytes": 600 * 2**20,
    "mem/weights_bytes": 20 * 2**20,
    "mem/grads_bytes": 20 * 2**20,
    "mem/optimizer_bytes": 40 * 2**20,
    "total_tokens": 819_200,
    "total_training_flops": 21_299_200_000_000,
    "total_training_time": 160.0,
    "train/tok_per_sec": 5120.0,
    "time_to_ppl/100/seconds": 40.0,
    "time_to_ppl/100/step": 50,
    "time_to_ppl/100/tokens": 204_800,
    "time_to_ppl/100/flops": 5.3e12,
    "time_to_ppl/100/seconds_interpolated": 36.0,
}


def write_run(base, name, config=(), summary=(), history=None):
    """A run folder; `config` and `summary` are {dotted path or key: new value, None to remove}."""
    folder = base / "runs" / name
    folder.mkdir(parents=True)
    full_config = copy.deepcopy(CONFIG)
    for path, value in dict(config).items():
        *parents, last = path.split(".")
        part = full_config
        for parent in parents:
            part = part[parent]
        part[last] = value
    full_summary = {k: v for k, v in {**SUMMARY, **dict(summary)}.items() if v is not None}
    if history is None:
        history = [
            {
                "step": s,
                "total_tokens": 4096 * s,
                "total_training_flops": 1e11 * s,
                "total_training_time": 0.8 * s,
                "train/loss": 3 + 5 * math.exp(-s / 30),
                "train/mfu": None,
                **(
                    {
                        "val/loss": 3 + 5 * math.exp(-s / 30),
                        "val/ppl": math.exp(3 + 5 * math.exp(-s / 30)),
                        "val/bpb": 1.1,
                    }
                    if s % 50 == 0
                    else {}
                ),
            }
            for s in range(0, 201, 10)
        ]
    (folder / "config.json").write_text(json.dumps(full_config))
    (folder / "summary.json").write_text(json.dumps(full_summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    return folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


LOWRANK = {
    "val/ppl": 22.0,
    "val/loss": 3.09,
    "val/bpb": 1.155,
    "params/total": 3_670_016,
    "mem/peak_bytes": 540 * 2**20,
    "total_training_time": 128.0,
    "time_to_ppl/100/seconds": 20.0,
    "time_to_ppl/100/seconds_interpolated": 18.0,
}


def lowrank(base, config=(), summary=(), **kwargs):
    return write_run(
        base,
        "lowrank",
        {"flags.attn_rank": 85, "derived.model.attn_ranks": [85] * 4, **dict(config)},
        {**LOWRANK, **dict(summary)},
        **kwargs,
    )


def rows_of(*given):
    """(rows of the result table by "section: label", cells stripped; warnings; notes)."""
    runs = report.load_runs(list(given))
    broken, warnings, notes = comparable.check_comparable(runs)
    [(_, _, rows, _)] = run_tables.result_tables(runs, broken)
    by_label = {}
    section = ""
    for row in rows:
        if len(row) == 1:
            section = row[0]
        else:
            by_label[f"{section}: {row[0]}"] = [cell.strip() for cell in row[1:]]
    return by_label, warnings, notes


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, ladder, text",
    [
        (5_242_880, COUNT, "5.24 M"),
        (999_600, COUNT, "1.00 M"),
        (512, COUNT, "512"),
        (0, COUNT, "0"),
        (561e6, COUNT, "561 M"),
        (2**30, BYTES, "1.00 GiB"),
        (1023 * 2**20, BYTES, "1023 MiB"),
        (0.5, TIME, "0.500 s"),
        (90, TIME, "1.50 min"),
        (8000, TIME, "2.22 h"),
        (1.53e15, FLOP, "1.53 PFLOP"),
    ],
)
def test_units_for_people(value, ladder, text):
    assert human(value, ladder) == text


def test_three_digits_never_uses_an_exponent():
    texts = [three_digits(x) for x in (0.05321, 0.9996, 1, 99.96, 1013.2, 0)]
    assert texts == ["0.0532", "1.00", "1.00", "100", "1013", "0"]


def test_values_and_ratios_are_the_hand_computed_ones(base):
    write_run(base, "full")
    lowrank(base)
    rows, warnings, notes = rows_of("full", "lowrank")
    assert rows["Outcome: validation perplexity"] == ["20.00", "22.00 ×1.100"]
    assert rows["Outcome: validation bits per byte"] == ["1.1000", "1.1550 ×1.050"]
    # a ratio of logarithms says nothing
    assert rows["Outcome: validation loss, nats/token"] == ["3.0000", "3.0900"]
    assert rows["Parameters: total"] == ["5.24 M", "3.67 M ×0.700"]
    assert rows["Memory of a process: peak (whole process)"] == ["600 MiB", "540 MiB ×0.900"]
    assert rows["Training: time"] == ["2.67 min", "2.13 min ×0.800"]
    assert rows["Training: tokens/s"] == ["5,120", "6,400 ×1.250"]  # 819,200 tokens in 160 and in 128 s
    assert rows["To reach perplexity 100: time"] == ["40.0 s", "20.0 s ×0.500"]
    assert rows["To reach perplexity 100: time, interpolated"] == ["36.0 s", "18.0 s ×0.500"]
    assert "Memory of a process: activations and other" not in rows  # a CPU's peak is the whole process
    assert warnings == [] and len(notes) == 1 and "no error bar" in notes[0]


def test_threshold_that_was_asked_for_and_not_reached(base):
    write_run(base, "full", history=[{"step": 50, "val/ppl": 62.0}])
    not_asked = {"flags.ppl_thresholds": "100"}
    write_run(base, "lucky", not_asked, history=[{"step": 50, "val/ppl": 42.0}])
    rows, _, _ = rows_of("full", "lucky")
    assert rows["To reach perplexity 50: time"] == ["not reached", "–"]


def test_rest_of_a_cuda_peak_is_activations_and_other(base):
    write_run(base, "full", {"device.type": "cuda"})
    rows, _, _ = rows_of("full")
    assert rows["Memory of a process: activations and other"] == ["520 MiB"]  # 600 - 20 - 20 - 40
    assert rows["Memory of a process: peak"] == ["600 MiB"]


def test_repeated_seeds_are_not_called_single(base):
    write_run(base, "one")
    write_run(base, "two", {"seed": 43, "flags.seed": 43})
    _, _, notes = rows_of("one", "two")
    assert notes == ["Different seed from one: two."]


# ---- unlike runs -------------------------------------------------------------------------------------------


def has_ratio(rows, label):
    return "×" in rows[label][1]


def test_another_tokenizer_refuses_perplexity_but_not_bits_per_byte(base):
    write_run(base, "full")
    lowrank(base, {"derived.tokenizer_hash": "dd44", "derived.val_tokens": 90000})
    rows, warnings, _ = rows_of("full", "lowrank")
    for label in ("Outcome: validation perplexity", "To reach perplexity 100: tokens"):
        assert not has_ratio(rows, label)
    assert has_ratio(rows, "Outcome: validation bits per byte") and has_ratio(rows, "Training: time")
    assert len(warnings) == 1
    assert "comparable across tokenizers only on the same validation text" in warnings[0]


@pytest.mark.parametrize(
    "path, value",
    [
        ("derived.corpus.val_fingerprint", "ee55"),
        ("derived.corpus.val_fingerprint", None),
        ("derived.val_tokens", 5000),
    ],
)
def test_another_or_unknown_validation_text_refuses_both(base, path, value):
    write_run(base, "full")
    lowrank(base, {path: value})
    rows, warnings, _ = rows_of("full", "lowrank")
    for label in ("Outcome: validation perplexity", "Outcome: validation bits per byte"):
        assert not has_ratio(rows, label)
    assert has_ratio(rows, "Parameters: total") and len(warnings) == 1


@pytest.mark.parametrize(
    "path, value", [("device.name", "Xeon"), ("device.dtype", "bfloat16"), ("device.processes", 2)]
)
def test_another_machine_refuses_times_and_memory(base, path, value):
    write_run(base, "full")
    lowrank(base, {path: value})
    rows, warnings, _ = rows_of("full", "lowrank")
    for label in (
        "Training: time",
        "Training: tokens/s",
        "Memory of a process: weights",
        "To reach perplexity 100: time",
    ):
        assert not has_ratio(rows, label)
    for label in ("Outcome: validation perplexity", "To reach perplexity 100: tokens"):
        assert has_ratio(rows, label)
    assert len(warnings) == 1 and "memory" in warnings[0]


def test_only_the_odd_run_loses_its_ratios(base):
    write_run(base, "full")
    lowrank(base)
    write_run(base, "foreign", {"derived.tokenizer_hash": "dd44"})
    rows, warnings, _ = rows_of("full", "lowrank", "foreign")
    assert ["×" in cell for cell in rows["Outcome: validation perplexity"]] == [False, True, False]
    assert warnings[0].startswith("foreign did not")


def test_other_differences_are_noted(base):
    write_run(base, "full")
    git = {"git.commit": "abc", "git.dirty": True}
    lowrank(base, {"derived.tokens": 1, "derived.total_batch_size": 2, "seed": 3, **git})
    _, warnings, notes = rows_of("full", "lowrank")
    text = "\n".join(notes)
    assert warnings == []
    for what in ("number of training tokens", "total batch size", "seed", "code (git commit)"):
        assert f"Different {what} from full: lowrank." in text
    assert "uncommitted changes: lowrank" in text


def test_unfinished_run_shows_its_newest_values_without_final_ratios(base):
    write_run(base, "full")
    newest = {
        "step": 120,
        "total_tokens": 491_520,
        "total_training_time": 80.0,
        "total_training_flops": 1e12,
        "val/ppl": 31.5,
    }
    lowrank(base, summary={"status": "running", "step": 100}, history=[newest])
    rows, _, notes = rows_of("full", "lowrank")
    assert rows["Outcome: status"] == ["finished", "unfinished (step 120 of 200)"]
    assert rows["Outcome: validation perplexity"] == ["20.00", "31.50"]
    assert rows["Training: time"] == ["2.67 min", "1.33 min"]
    assert has_ratio(rows, "Parameters: total") and has_ratio(rows, "To reach perplexity 100: time")
    assert any("lowrank is unfinished" in note for note in notes)


# ---- the files ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags, what the page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.tags = []
        self.links = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def png_size(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 5000
    return struct.unpack(">II", data[16:24])


def test_everything_is_written_and_the_page_needs_nothing_else(base, capsys):
    name = "low<script>alert(1)<_script>|$x_{"
    sample = "Once | upon <script>a</script>\nhalf a character \ud83d ![x](http://x/y.png)"
    write_run(base, "full", history=[{"step": 200, "sample": ["The cat"]}])
    lowrank(base, history=[{"step": 200, "total_tokens": 5, "sample": [sample, "second"]}])
    (base / "runs" / "lowrank").rename(base / "runs" / name)
    report.main(["full", name, "--out", str(base / "out" / "deep")])
    out = base / "out" / "deep"
    files = [*FIGURES, "report.md", "report.csv", "report.html"]
    assert sorted(p.name for p in out.iterdir()) == sorted(files)
    for figure in FIGURES:
        png_size((out / figure).read_bytes())

    page = Page()
    page.feed((out / "report.html").read_text("utf-8"))
    assert page.open == [] and "script" not in page.tags and page.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in CSS and "@import" not in CSS
    assert name in page.words and "Once | upon <script>" in page.words and "--attn-rank" in page.words
    assert "One seed a configuration" in page.words

    markdown = (out / "report.md").read_text("utf-8")
    assert "<script>" not in markdown and "![x](" not in markdown
    assert all(f"]({figure})" in markdown for figure in FIGURES)
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert any("22.00 ×1.100" in line for line in table)
    printed = capsys.readouterr().out
    assert "22.00 ×1.100" in printed
    assert len({len(line) for line in printed.splitlines() if line.startswith("|")}) == 1

    with open(out / "report.csv", newline="") as f:
        full, low = csv.DictReader(f)
    assert low["run"] == name and float(low["val/ppl"]) == 22.0 and int(full["params/total"]) == 5_242_880
    assert float(low["time_to_ppl/100/seconds_interpolated"]) == 18.0 and low["flags.attn_rank"] == "85"
    assert low["derived.tokenizer_hash"] == "cc33" and low["git.dirty"] == "False"


def test_warning_stands_at_the_top_of_the_page(base, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_run_figures", lambda runs, measure: dict.fromkeys(FIGURES, bytes(24)))
    write_run(base, "full")
    lowrank(base, {"derived.tokenizer_hash": "dd44"})
    report.main(["full", "lowrank", "--out", str(base / "out")])
    for text in ((base / "out" / "report.md").read_text("utf-8"), capsys.readouterr().out):
        assert text.index("Warning:") < text.index("validation perplexity")


@pytest.mark.parametrize("count", [1, 2, 12])
def test_figures_for_one_two_and_many_runs(base, count):
    for i in range(count):
        write_run(base, f"run_{i}", summary={"params/total": 5e6 + 2e5 * i, "val/ppl": 20.0 - 0.1 * i})
    runs = report.load_runs([f"run_{i}" for i in range(count)])
    assert all(png_size(data)[0] > 1000 for data in draw_run_figures(runs, "loss").values())


def test_labels_of_the_figures_are_words_where_they_tell_the_runs_apart(base):
    write_run(base, "full")
    lowrank(base)
    write_run(base, "quarter", LOW_64)
    write_run(base, "same", {"flags.new_flag": "x" * 40})
    runs = report.load_runs(["full", "lowrank", "quarter"])
    words = {"full": "full rank", "lowrank": "low rank, attn 85", "quarter": "low rank, r = d/4"}
    assert labels_in_words(configurations(runs)) == words
    runs = report.load_runs(["full", "same"])
    assert labels_in_words(configurations(runs))["same"] == "same"  # its words would be too long
    report.main(["full", "quarter", "--out", str(base / "out")])
    markdown = (base / "out/report.md").read_text("utf-8")
    assert "- **low rank, r = d/4** is the run quarter" in markdown


def test_broken_and_empty_runs_still_give_a_report(base, capsys):
    write_run(base, "_empty$", summary=dict.fromkeys(SUMMARY), history=[])
    (base / "runs" / "_empty$" / "config.json").write_text('{"flags": {}}')
    (base / "runs" / "_empty$" / "summary.json").unlink()
    nan = [{"step": s, "total_tokens": s, "train/loss": float("nan"), "val/loss": math.inf} for s in (0, 1)]
    write_run(base, "diverged", summary={"val/ppl": math.inf, "val/loss": math.nan}, history=nan)
    report.main(["_empty$", "diverged", "--out", str(base / "out")])
    printed = capsys.readouterr().out
    assert "inf" in printed and "nan" in printed and "unfinished (step 0)" in printed
    report.main(["_empty$", "--out", str(base / "out")])


def test_many_runs_become_rows(base):
    for i in range(6):
        write_run(base, f"r{i}")
    tags = [f"r{i}" for i in range(6)]
    runs = report.load_runs(tags)
    blocks = run_tables.result_tables(runs, comparable.check_comparable(runs)[0])
    row_lists = [block[2] for block in blocks if block[0] == "table"]
    assert [block[1] for block in blocks if block[0] == "subheading"][:2] == ["Outcome", "Parameters"]
    for rows in row_lists:
        assert [row[0] for row in rows] == tags
    assert row_lists[1][1][1] == "5.24 M ×1.000"


def test_loss_axis_is_not_stretched_by_the_start_or_by_a_diverged_run(base):
    write_run(base, "full")
    rising = [{"total_tokens": 1000 * s, "step": s, "val/loss": 9.0 + 100 * s} for s in range(5)]
    write_run(base, "diverged", history=rising)
    full, diverged = report.load_runs(["full", "diverged"])
    low, high = loss_limits([full], ["val/loss"])
    assert 2.5 < low < 3.01 and 3.9 < high < 4.2  # from the second evaluation, 3.94, on; it started at 8
    assert loss_limits([full, diverged], ["val/loss"])[1] < 10
    assert choose_unit(0, TIME) == (1, "s")


# ---- a sweep -----------------------------------------------------------------------------------------------


LOW_64 = {
    "flags.attn_rank": 64,
    "flags.mlp_rank": 64,
    "derived.model.attn_ranks": [64] * 4,
    "derived.model.mlp_ranks": [64] * 4,
}


def write_sweep(base, seeds=(1, 2, 3), **low_config):
    """Full rank and rank 64, some seeds of each. Returns the tags.

    The low-rank runs have 2% more perplexity and take 3/4 of the time.
    """
    tags = []
    for i, seed in enumerate(seeds):
        ppl = (20 + 0.3 * i) * (1 + 0.001 * (i % 2))
        step_times = [0.8 + 0.001 * i * step for step in range(1, 41)]
        seeded = {"seed": seed, "flags.seed": seed}
        full = {"params/total": 5e6, "mem/peak_bytes": 600 * 2**20, "total_training_time": 160}
        write_sweep_run(base, f"full_{seed}", seeded, full, ppl, step_times)
        low = {"params/total": 3e6, "mem/peak_bytes": 550 * 2**20, "total_training_time": 120}
        step_times = [0.75 * seconds for seconds in step_times]
        write_sweep_run(base, f"low_{seed}", seeded | LOW_64 | low_config, low, 1.02 * ppl, step_times)
        tags += [f"full_{seed}", f"low_{seed}"]
    return tags


def write_sweep_run(base, tag, config, summary, ppl, step_times):
    """A run that is evaluated every ten steps and ends at a perplexity."""
    history = []
    for step, seconds in enumerate(step_times, 1):
        row = {"step": step, "total_tokens": 4096 * step, "total_training_time": step_times[0] * step}
        row["train/dt"] = seconds
        if step % 10 == 0:
            row |= {"val/loss": math.log(ppl) * (1 + 20 / step), "val/bpb": 1.1 + 1 / step}
        history.append(row)
    quality = {"val/ppl": ppl, "val/loss": math.log(ppl), "val/bpb": math.log2(ppl) / 4}
    write_run(base, tag, config, summary | quality, history)


def line_of(markdown, begin, after=""):
    """The first line that begins so, in the part of a report that begins with `after`."""
    lines = markdown[markdown.index(after) :].splitlines()
    return next(line for line in lines if line.startswith(begin))


def test_a_sweep_gets_verdict_figures_table_and_flags(base, capsys):
    tags = write_sweep(base)
    report.main([*tags, "--out", str(base / "out"), "--margin-ppl", "0.03"])
    out = base / "out"
    markdown, html = ((out / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    assert markdown.startswith("# Training report: 2 configurations, 6 runs")
    headings = ["## The verdict", "## Figures", "### Configurations", "### Runs", "### On a frontier"]
    places = [markdown.index(heading) for heading in [*headings, "## What was compared"]]
    assert places == sorted(places)
    assert "### H2: supported" in markdown and "### H1: supported" in markdown
    assert "n = 3 seeds" in markdown
    row = line_of(markdown, "| attn 64, mlp 64", after="### Configurations")
    low = [1.02 * ppl for ppl in (20, 20.3 * 1.001, 20.6)]
    mean = sum(low) / 3
    sd = math.sqrt(sum((p - mean) ** 2 for p in low) / 2)
    assert f"{mean:.2f} ± {sd:.2f} ×1.020" in row and "×0.600" in row and "×0.750" in row
    flags = line_of(markdown, "| attn 64, mlp 64", after="### On a frontier")
    assert "--attn-rank 64" in flags and "--mlp-rank 64" in flags
    assert "--seed" not in flags and "--model-tag" not in flags
    assert "full_1" in html and "attn 64, mlp 64" in html and html.count("<select") >= 2 and "<circle" in html

    with open(out / "report.csv", newline="") as f:
        rows = {row["run"]: row for row in csv.DictReader(f)}
    pairs = [(rows[f"low_{s}"], rows[f"full_{s}"]) for s in (1, 2, 3)]
    assert {low["configuration"] for low, _ in pairs} == {"attn 64, mlp 64"}
    assert all(low["pair"] == full["pair"] for low, full in pairs)
    assert len({row["pair"] for row in rows.values()}) == 3
    # H2 by hand from the CSV: the mean of the pairs' log ratios
    logs = [math.log(float(low["val/ppl"]) / float(full["val/ppl"])) for low, full in pairs]
    assert f"{math.exp(sum(logs) / 3):.4f}" in markdown.split("### H2")[1].split("### H3")[0]
    assert float(rows["low_1"]["step_time"]) == pytest.approx(0.6)
    printed = capsys.readouterr().out
    assert "supported" in printed and "attn 64, mlp 64" in printed and "report.html" in printed


def no_figures(monkeypatch):
    def figures(configs, measure):
        return {"frontier.png": (bytes(24), [])} if measure == "loss" else {}

    monkeypatch.setattr(report, "draw_sweep_figures", figures)


def test_a_sweep_leaves_out_and_lists_what_is_unfinished(base, monkeypatch):
    no_figures(monkeypatch)
    tags = write_sweep(base)
    write_run(
        base,
        "going",
        {"flags.attn_rank": 64, "seed": 9, "flags.seed": 9},
        {"status": "running", "step": 40, "val/ppl": 1.5},
        history=[],
    )
    report.main([*tags, "going", "--out", str(base / "out")])
    markdown = (base / "out" / "report.md").read_text("utf-8")
    assert "left out of the verdict, the means and the figures: going." in markdown
    row = line_of(markdown, "| going")
    assert "unfinished (step 40 of 200)" in row and "1.50" not in row
    assert not [line for line in markdown.split("### Runs")[0].splitlines() if "1.50 " in line]


def test_a_sweep_names_what_diverged_on_every_seed(base):
    nothing = {"val/ppl": math.nan, "val/loss": math.nan, "val/bpb": math.nan}
    for seed in (1, 2):
        write_run(base, f"wild_{seed}", {"seed": seed, "flags.seed": seed}, nothing)
    report.main(["wild_1", "wild_2", "--out", str(base / "out")])
    markdown = (base / "out" / "report.md").read_text("utf-8")
    assert "Diverged on every seed, so without a mean: full rank." in markdown
    assert "| nan" in markdown.replace("  ", "")


def test_a_sweep_of_two_tokenizers_compares_bits_per_byte_and_gives_no_verdict(base, monkeypatch):
    no_figures(monkeypatch)
    tags = write_sweep(base, **{"derived.tokenizer_hash": "dd44", "derived.val_tokens": 90000})
    report.main([*tags, "--out", str(base / "out")])
    markdown = (base / "out" / "report.md").read_text("utf-8")
    assert "No verdict:" in markdown and "frontier.png" not in markdown and "## The verdict" not in markdown
    header = line_of(markdown, "| run", after="### Runs")
    assert "bits per byte" in header and "perplexity" not in header


def test_few_runs_of_both_kinds_get_the_verdict_below_their_table(base, monkeypatch):
    monkeypatch.setattr(report, "draw_run_figures", lambda runs, measure: dict.fromkeys(FIGURES, bytes(24)))
    write_run(base, "full")
    lowrank(base)
    report.main(["full", "lowrank", "--out", str(base / "out")])
    markdown = (base / "out" / "report.md").read_text("utf-8")
    assert markdown.index("22.00 ×1.100") < markdown.index("## The verdict") < markdown.index("## Figures")
    assert "### H1: undecided" in markdown  # one pair has no interval
    report.main(["full", "--out", str(base / "out")])
    assert "verdict" not in (base / "out" / "report.md").read_text("utf-8")


def test_runs_of_wandb_join_those_of_folders(base, monkeypatch):
    no_figures(monkeypatch)
    from nanochat.report import wandb_import

    tags = write_sweep(base)
    asked = []
    fetched = [metrics.load_run(base / "runs" / tag) for tag in tags if tag.startswith("low")]
    monkeypatch.setattr(wandb_import, "runs_from_wandb", lambda spec: asked.append(spec) or fetched)
    full = [tag for tag in tags if tag.startswith("full")]
    report.main([*full, "--from-wandb", "me/low-rank/group", "--out", str(base / "both")])
    report.main(["--from-wandb", "me/low-rank", "--out", str(base / "alone")])
    assert asked == ["me/low-rank/group", "me/low-rank"]
    assert "2 configurations, 6 runs" in (base / "both" / "report.md").read_text("utf-8")
    assert "1 configurations" not in (base / "alone" / "report.md").read_text("utf-8")
    with pytest.raises(InputError, match="low_1 is given as a folder too"):
        report.main(["low_1", "--from-wandb", "me/low-rank", "--out", str(base / "again")])


def test_a_sweep_that_cannot_be_made_is_one_line_and_writes_nothing(base):
    tags = write_sweep(base, seeds=(1, 2))
    for i in range(2):
        write_run(base, f"other_{i}", {"derived.corpus.val_fingerprint": "ee55", "seed": i, "flags.seed": i})
        write_run(base, f"going_{i}", {"seed": i, "flags.seed": i}, {"status": "running"}, history=[])
    out = ["--out", str(base / "out")]
    other_text = "other_0, other_1: not evaluated, on record, on the validation text of full_1"
    for argv, words in (
        ([*tags, "other_0", "other_1", *out], other_text),
        (["going_0", "going_1", *out], "none of the 2 runs is finished"),
        ([*tags, "--margin-time", "1.5", *out], "--margin-time 1.5"),
        ([*tags, "--confidence", "95", *out], "--confidence 95"),
        ([*tags, "--margin-ppl", "little", *out], "--margin-ppl"),
    ):
        with pytest.raises(InputError, match=words) as error:
            report.main(argv)
        assert "\n" not in str(error.value)
    assert not (base / "out").exists()


# ---- bad input ---------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_writes_nothing(base, monkeypatch):
    write_run(base, "full")
    write_run(base, "lowrank")
    (base / "plain").mkdir()
    (base / "file").write_text("x")
    out = base / "out"
    for argv, words in (
        (["nope", "--out", str(out)], "there are: full, lowrank"),
        ([str(base / "plain"), "--out", str(out)], "not a run folder"),
        (["full", str(base / "runs" / "full"), "--out", str(out)], "given twice"),
        (["full", "--out", str(base / "file")], "is a file"),
        (["full", "--out", str(base / "file" / "below")], "is a file"),
        (["full"], "--out"),
        (["--out", str(out)], "RUN"),
    ):
        with pytest.raises(InputError, match=words) as error:
            report.main(argv)
        assert "\n" not in str(error.value)
    assert not out.exists() and (base / "file").read_text() == "x"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "elsewhere"))
    with pytest.raises(InputError, match="it holds no runs"):
        report.main(["full", "--out", str(out)])


def test_runs_of_one_name_from_two_places_are_told_apart(base):
    write_run(base, "full")
    other = write_run(base / "elsewhere", "full")
    names = [run.name for run in report.load_runs(["full", str(other)])]
    assert names == [str(base / "runs" / "full"), str(other)]


def test_command_line_exits_with_2_and_needs_no_torch(base):
    code = (
        "import sys; from nanochat.common import run_script; from scripts import report\n"
        "assert 'torch' not in sys.modules; run_script(report.main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "nope", "--out", str(base / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no run 'nope'")


def test_no_text_of_a_run_is_a_formula_in_the_csv(base):
    write_run(
        base,
        "full",
        {"flags.data": "=cmd|' /C calc'!A0", "flags.=x": "+1+1", "flags.lr": "-0.5"},
        {"note": " @SUM(A1)", "low": -1.5},
    )
    report.main(["full", "--out", str(base / "out")])
    with open(base / "out/report.csv", newline="") as f:
        [row] = csv.DictReader(f)
    assert row["flags.data"] == "'=cmd|' /C calc'!A0"
    assert row["flags.=x"] == "'+1+1" and row["note"] == "' @SUM(A1)"
    assert row["low"] == "-1.5" and row["flags.lr"] == "'-0.5"


def test_runs_with_steps_that_were_not_applied_are_named_in_notes_table_and_verdict(
    base, monkeypatch, capsys
):
    no_figures(monkeypatch)
    tags = write_sweep(base)
    low = {"flags.attn_rank": 64}
    write_run(base, "half", {**low, "seed": 8, "flags.seed": 8}, {"step": 30, "train/bad_steps": 15})
    summary = {"status": "diverged", "step": 40, "train/bad_steps": 11}
    write_run(base, "wild", {**low, "seed": 9, "flags.seed": 9}, summary, history=[])
    report.main([*tags, "half", "wild", "--out", str(base / "out")])
    half = "half: 15 of 30 steps not applied: loss or gradient not finite."
    wild = (
        "wild: 11 of 40 steps not applied: loss or gradient not finite; it ended by --max-bad-steps, "
        "before its last step."
    )
    markdown = (base / "out/report.md").read_text("utf-8")
    for note in (half, wild):
        assert f"> **Warning:** {note}" in markdown.split("### H1")[0] and f"- {note}" in markdown
        assert f"> **Warning:** {note}" in capsys.readouterr().out or note == wild
    assert "finished, 15 steps not applied" in line_of(markdown, "| half", after="### Runs")
    row = line_of(markdown, "| wild", after="### Runs")
    assert "diverged (step 40 of 200), 11 steps not applied" in row
    assert "left out of the verdict, the means and the figures: wild." in markdown
    assert comparable.divergence_notes(report.load_runs(tags)) == []

    report.main(["half", "wild", "--out", str(base / "few")])
    table = (base / "few/report.md").read_text("utf-8")
    assert "finished, 15 steps not applied" in table and f"- {half}" in table and f"- {wild}" in table
