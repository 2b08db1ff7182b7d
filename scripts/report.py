"""Compare finished or running runs, from their folders alone: report.md, report.html, report.csv and the figures.

    python -m scripts.report full lowrank --out report/
"""
import csv
import dataclasses
import io
import os
import re
import sys
from pathlib import Path

from nanochat.common import ArgumentParser, InputError, run_script, write_atomic
from nanochat.figures import BYTES, COUNT, FLOP, TIME, draw_all, human, is_finite, three_digits
from nanochat.metrics import Run, load_run, runs_dir
from nanochat.page import align_ratios, encode, in_markdown, to_markdown, to_page

WIDE = 4  # up to so many runs stand side by side as columns; more become rows

# What has to be the same in two runs before a quantity of one may be divided by the other's. See check_comparable.
TEXT, TOKENIZER, MACHINE, END = "text", "tokenizer", "machine", "end"

# (section, [(key in summary.json, label, unit ladder or number of decimals, what its ratio needs; None: no ratio shown)])
SECTIONS = [
    ("Outcome", [
        ("val/ppl", "validation perplexity", 2, (TEXT, TOKENIZER, END)),
        ("val/bpb", "validation bits per byte", 4, (TEXT, END)),
        ("val/loss", "validation loss, nats/token", 4, None)]),
    ("Parameters", [
        ("params/total", "total", COUNT, ()),
        ("params/attention", "attention", COUNT, ()),
        ("params/mlp", "MLP", COUNT, ()),
        ("params/embedding", "embedding", COUNT, ()),
        ("params/lm_head", "lm_head", COUNT, ()),
        ("params/other", "other", COUNT, None)]),
    ("Memory of a process", [
        ("mem/peak_bytes", "peak", BYTES, (MACHINE,)),
        ("mem/weights_bytes", "weights", BYTES, (MACHINE,)),
        ("mem/grads_bytes", "gradients", BYTES, (MACHINE,)),
        ("mem/optimizer_bytes", "optimizer state", BYTES, (MACHINE,)),
        ("mem/rest_bytes", "activations and other", BYTES, (MACHINE,))]),
    ("Training", [
        ("total_training_time", "time", TIME, (MACHINE, END)),
        ("mean_tok_per_sec", "tokens/s", 0, (MACHINE,)),
        ("total_tokens", "tokens", COUNT, (END,)),
        ("flops/per_token", "FLOPs per token", FLOP, ()),
        ("total_training_flops", "FLOPs", FLOP, (END,))]),
]
THRESHOLD_ROWS = [("seconds", "time", TIME, (TEXT, TOKENIZER, MACHINE)),
                  ("seconds_interpolated", "time, interpolated", TIME, (TEXT, TOKENIZER, MACHINE)),
                  ("tokens", "tokens", COUNT, (TEXT, TOKENIZER)),
                  ("tokens_interpolated", "tokens, interpolated", COUNT, (TEXT, TOKENIZER)),
                  ("flops", "FLOPs", FLOP, (TEXT, TOKENIZER)),
                  ("flops_interpolated", "FLOPs, interpolated", FLOP, (TEXT, TOKENIZER))]

FIGURES = [
    ("loss.png", "Loss against tokens, training time and compute. The first fifth of each run, where loss falls from "
                 "ln(vocabulary), may leave the frame at the top."),
    ("parameters.png", "Parameters by group."),
    ("memory.png", "Memory by part. The diamond is the measured peak: on CUDA what torch allocated; on CPU the whole "
                   "process, Python and libraries included."),
    ("perplexity.png", "Final quality against model size: down and to the left is better."),
]

DEFINITIONS = [
    ("×0.53", "the value divided by the first run's. Shown only where the two may be divided."),
    ("validation loss", "mean negative log likelihood in nats per token on fixed validation rows. Lower is better."),
    ("perplexity (ppl)", "exp(validation loss). It depends on the tokenizer: comparable only under the same one."),
    ("bits per byte (bpb)", "the same loss in bits, per byte of the text instead of per token: comparable across "
                            "tokenizers on the same validation text."),
    ("parameters", "scalars of the model, embeddings included. A matrix of rank r counts its two factors, r × (in + out)."),
    ("FLOPs", "counted from what is executed: 6 FLOPs per matrix parameter and token executed, factors included, "
              "plus attention."),
    ("time", "training steps only: the clock excludes evaluation, checkpointing and compilation."),
    ("tokens/s", "training tokens per second of that clock, over the whole run and all processes."),
    ("time, tokens, FLOPs to perplexity P", "at the first evaluation at or below P. Interpolated: an estimate between "
     "the two evaluations around P, linear in log perplexity, which depends less on how often the run was evaluated."),
    ("peak memory", "of one process. CUDA: the most bytes torch had allocated; what weights, gradients and optimizer "
                    "state leave of it is “activations and other”. CPU: the peak resident set of the whole process."),
]


def main(argv=None):
    parser = ArgumentParser("Compare runs: tables, figures and one self-contained page, from the run folders alone.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run tag, or path to a run folder; ratios are to the first")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the report (created if needed)")
    args = parser.parse_args(argv)

    existing = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--out {args.out}: {existing} is a file; give a folder")
    runs = load_runs(args.runs)
    broken, warnings, notes = check_comparable(runs)
    measure = "bpb" if broken[TEXT] or broken[TOKENIZER] else "loss"
    figures = draw_all(runs, measure)
    tables = result_tables(runs, broken)
    blocks = [
        ("heading", "Results"), *(("warning", w) for w in warnings), *glance(runs, broken), *tables,
        *([("list", notes)] if notes else []),
        ("heading", "Figures"), *(("figure", name, caption) for name, caption in FIGURES),
        ("heading", "What was compared"), *what_was_compared(runs),
        *samples(runs),
        ("heading", "How to read this"), ("list", [f"**{term}**: {meaning}" for term, meaning in DEFINITIONS]),
    ]
    title = "Training report: " + (names([run.name for run in runs]) if len(runs) <= WIDE else f"{len(runs)} runs")
    for name, data in figures.items():
        write_atomic(args.out / name, data)
    write_atomic(args.out / "report.csv", encode(to_csv(runs)))
    write_atomic(args.out / "report.md", encode(f"# {in_markdown(title)}\n\n" + to_markdown(blocks)))
    write_atomic(args.out / "report.html", encode(to_page(title, blocks, figures)))
    sys.stdout.reconfigure(errors="replace")  # a terminal without "×" must not cost the user the table
    print(to_markdown([*(("warning", w) for w in warnings), *tables]))
    print(f"report: {args.out / 'report.html'}")


# ---- reading --------------------------------------------------------------------------------------------------------

def load_runs(given: list[str]) -> list[Run]:
    """The runs in the order given, with names that tell them apart."""
    folders = [find_run(text) for text in given]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"{given[i]}: this run is given twice")
    runs = [load_run(folder) for folder in folders]
    tags = [run.name for run in runs]
    for i, (run, folder) in enumerate(zip(runs, folders)):
        name = run.name if tags.count(run.name) == 1 else str(folder)
        summary = run.summary
        if summary.get("status") != "finished":  # the summary dates from the last checkpoint; the history knows more
            for entry in run.history:
                summary = {**summary, **{k: v for k, v in entry.items() if isinstance(v, (int, float))}}
        run = dataclasses.replace(run, name=name, summary=summary)
        runs[i] = dataclasses.replace(run, summary={**summary, **derived(run)})
    return runs


def find_run(text: str) -> Path:
    """The folder of a tag under runs/, or else of a path."""
    folder = runs_dir() / text
    if folder.is_dir() and os.sep not in text:
        return folder
    if Path(text).is_dir():
        return Path(text)
    tags = sorted(path.parent.name for path in runs_dir().glob("*/config.json"))
    shown = ", ".join(tags[:20]) + (f" and {len(tags) - 20} more" if len(tags) > 20 else "")
    there = f"tags: {shown}" if tags else "it holds no runs"
    raise InputError(f"no run {text!r}: not a folder, nor a tag in {runs_dir()}; {there}")


def look(run: Run, path: str):
    """A value of config.json by its dotted path; None where any part of it is missing."""
    value = run.config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def number(run: Run, key: str):
    """A number of summary.json (it may be NaN), or None."""
    value = run.summary.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def derived(run: Run) -> dict:
    """What follows from the summary: tokens/s over the whole run, and what the known parts leave of a CUDA peak (bytes)."""
    values = {}
    tokens, seconds = number(run, "total_tokens"), number(run, "total_training_time")
    if tokens and seconds:
        values["mean_tok_per_sec"] = tokens / seconds  # train/tok_per_sec is the last step's alone: too noisy to compare
    peak, *parts = (number(run, f"mem/{part}_bytes") for part in ("peak", "weights", "grads", "optimizer"))
    if look(run, "device.type") == "cuda" and None not in (peak, *parts) and sum(parts) <= peak:
        values["mem/rest_bytes"] = peak - sum(parts)
    return values


def finished(run: Run) -> bool:
    return run.summary.get("status") == "finished"


# ---- like for like --------------------------------------------------------------------------------------------------

def check_comparable(runs: list[Run]) -> tuple[dict, list[str], list[str]]:
    """({condition: names of the runs that differ from the first in it}, warnings, notes)."""
    first = runs[0]

    def differing(*paths):
        """Names of the runs that differ from the first in any of the paths, or where the first path is not recorded."""
        ours = [look(first, p) for p in paths]
        return [run.name for run in runs[1:] if ours[0] is None or [look(run, p) for p in paths] != ours]

    broken = {
        TOKENIZER: differing("derived.tokenizer_hash"),
        TEXT: differing("derived.corpus.val_fingerprint"),
        MACHINE: differing("device.type", "device.name", "device.dtype", "device.processes", "device.threads"),
        END: [run.name for run in runs if not (finished(run) and finished(first))],
    }
    # Under one tokenizer, another number of validation tokens is another text. (Two tokenizers always count differently.)
    broken[TEXT] += [name for name in differing("derived.val_tokens") if name not in broken[TEXT] + broken[TOKENIZER]]
    warnings, notes = [], []

    if broken[TOKENIZER]:
        warnings.append(f"{names(broken[TOKENIZER])} did not, on record, use the tokenizer of {first.name}, so perplexity is "
                        "not comparable and no ratio of it is shown; bits per byte is comparable across tokenizers only on the "
                        "same validation text.")
    if broken[TEXT]:
        warnings.append(f"{names(broken[TEXT])} did not, on record, use the validation text of {first.name} (another "
                        "corpus, or another part of it), so neither perplexity nor bits per byte is comparable and no ratio of "
                        "them is shown; bits per byte is comparable across tokenizers only on the same validation text.")
    if broken[MACHINE]:
        warnings.append(f"{names(broken[MACHINE])} did not, on record, run on the device of {first.name}, with its dtype, "
                        "processes and threads, so times and memory are not comparable and no ratio of them is shown.")
    for run in runs:
        if not finished(run):
            notes.append(f"{run.name} is unfinished: its values are those at {progress(run)}, and no ratio of final values "
                         "is shown.")
    for what, path in (("training text", "derived.corpus.train_fingerprint"), ("number of training tokens", "derived.tokens"),
                       ("total batch size", "derived.total_batch_size"), ("sequence length", "derived.model.sequence_len"),
                       ("per-device batch size (it moves memory and tokens/s)", "flags.device_batch_size"),
                       ("seed", "seed"), ("code (git commit)", "git.commit")):
        if look(first, path) is not None and (others := differing(path)):
            notes.append(f"Different {what} from {first.name}: {names(others)}.")
    dirty = [run.name for run in runs if look(run, "git.dirty")]
    if dirty:
        notes.append(f"Ran from a source tree with uncommitted changes: {names(dirty)}.")
    settings = [sorted((k, str(v)) for k, v in flags(run).items() if k != "seed") for run in runs]
    if len(runs) > 1 and all(settings.count(s) == 1 for s in settings):
        notes.append("One seed a configuration: without repeated seeds a difference between runs has no error bar.")
    return broken, warnings, notes


def names(some: list[str]) -> str:
    return ", ".join(some) if len(some) <= 6 else ", ".join(some[:5]) + f" and {len(some) - 5} more"


def progress(run: Run) -> str:
    total = look(run, "derived.num_iterations")
    return f"step {run.summary.get('step', 0)}" + (f" of {total}" if total else "")


def flags(run: Run) -> dict:
    """The flags that shape a run; its names on disk and on wandb, and whether it was resumed, do not."""
    return {k: v for k, v in (look(run, "flags") or {}).items() if k not in ("model_tag", "run", "resume")}


# ---- tables ---------------------------------------------------------------------------------------------------------

def shown(value, form) -> str:
    """A number as text: `form` is a unit ladder or a number of decimals."""
    if value is None:
        return "–"
    if not is_finite(value):
        return f"{value:g}"  # nan or inf: a run that diverged says so
    return f"{value:,.{form}f}" if isinstance(form, int) else human(value, form)


def ratio(runs: list[Run], run: Run, key: str, needs, broken: dict) -> str:
    """" ×0.53" against the first run, or nothing where the two may not be divided."""
    value, base = number(run, key), number(runs[0], key)
    if run is runs[0] or needs is None or any(run.name in broken[need] for need in needs):
        return ""
    if not (is_finite(value) and is_finite(base) and base > 0):
        return ""
    share = value / base
    return " ×" + (f"{share:.3f}" if 0.1 <= share < 10 else three_digits(share))  # mostly one width: columns line up


def threshold_cell(runs: list[Run], run: Run, threshold: float, name: str, ladder, needs, broken: dict) -> str:
    key = f"time_to_ppl/{threshold:g}/{name}"
    if number(run, key) is not None:
        return shown(number(run, key), ladder) + ratio(runs, run, key, needs, broken)
    evaluated = [h["val/ppl"] for h in run.history if is_finite(h.get("val/ppl"))]
    # otherwise it was reached, but the run was not asked to note when; or no estimate is possible
    return "not reached" if evaluated and min(evaluated) > threshold else "–"


def thresholds(runs: list[Run]) -> list[float]:
    """Every perplexity that any run was asked for or reached, easiest first."""
    found = {key.split("/")[1] for run in runs for key in run.summary if key.startswith("time_to_ppl/")}
    for run in runs:
        found |= set(re.findall(r"[\d.]+", str(look(run, "flags.ppl_thresholds") or "")))
    return sorted({float(p) for p in found if re.fullmatch(r"\d+(\.\d+)?", p)}, reverse=True)


def result_tables(runs: list[Run], broken: dict) -> list[tuple]:
    sections = []
    status = ("status", ["finished" if finished(run) else f"unfinished ({progress(run)})" for run in runs])
    for section, metrics in SECTIONS:
        rows = [] if sections else [status]
        for key, label, form, needs in metrics:
            cells = [shown(number(run, key), form) + ratio(runs, run, key, needs, broken) for run in runs]
            if key == "mem/peak_bytes" and all(look(run, "device.type") == "cpu" for run in runs):
                label = "peak (whole process)"
            if key != "mem/rest_bytes" or any(c != "–" for c in cells):  # no such row on CPU
                rows.append((label, cells))
        sections.append((section, rows))
    for p in thresholds(runs):
        sections.append((f"To reach perplexity {p:g}",
                         [(label, [threshold_cell(runs, run, p, name, ladder, needs, broken) for run in runs])
                          for name, label, ladder, needs in THRESHOLD_ROWS
                          if "interpolated" not in name or any(f"time_to_ppl/{p:g}/{name}" in run.summary for run in runs)]))
    return grid(runs, sections, "numbers")


def grid(runs: list[Run], sections: list, kind: str) -> list[tuple]:
    """Few runs: one table with a column a run. Many: one table a section, with a row a run."""
    if len(runs) <= WIDE:
        rows = [row for section, lines in sections for row in ([section], *([label, *cells] for label, cells in lines))]
        return [("table", ["", *(run.name for run in runs)], align_ratios(rows), kind)]
    blocks = []
    for section, lines in sections:
        rows = [[run.name, *(cells[i] for _, cells in lines)] for i, run in enumerate(runs)]
        blocks += [("subheading", section), ("table", ["", *(label for label, _ in lines)], align_ratios(rows), kind)]
    return blocks


def glance(runs: list[Run], broken: dict) -> list[tuple]:
    """One line a run, for a few: what it costs and buys against the first."""
    lines = []
    perplexity = ("val/ppl", "validation perplexity", (TEXT, TOKENIZER, END))
    bpb = ("val/bpb", "validation bits per byte", (TEXT, END))
    for run in runs[1:]:
        wanted = [("params/total", "parameters", ()), bpb if run.name in broken[TOKENIZER] else perplexity,
                  ("total_training_time", "training time", (MACHINE, END)), ("mem/peak_bytes", "peak memory", (MACHINE,))]
        parts = [f"{r.strip()} {what}" for key, what, needs in wanted if (r := ratio(runs, run, key, needs, broken))]
        if parts:
            lines.append(f"**{run.name}** against {runs[0].name}: " + ", ".join(parts) + ".")
    return [("list", lines)] if lines and len(runs) <= WIDE else []


def set_up(run: Run) -> dict[str, str]:
    """What a run was, in words, from its config.json."""
    def get(path):
        return text(look(run, path))
    def model(key):
        return get(f"derived.model.{key}")
    return {
        "model": f"{model('n_layer')} layers × {model('n_embd')} wide, {model('n_head')} heads, "
                 f"vocabulary {model('vocab_size')}",
        "attention rank": describe_ranks(look(run, "derived.model.attn_ranks")),
        "MLP rank": describe_ranks(look(run, "derived.model.mlp_ranks")),
        "lm_head rank": describe_ranks([look(run, "derived.model.lm_head_rank")]),
        "corpus": get("derived.corpus.name"),
        "tokens": shown(look(run, "derived.tokens"), COUNT),
        "batch": f"{get('derived.total_batch_size')} tokens × {get('derived.num_iterations')} steps",
        "schedule": f"warmup {get('flags.warmup_steps')} steps, warmdown over the last {get('flags.warmdown_ratio')} of the run "
                    f"to {get('flags.final_lr_frac')} of the peak",
        "device": f"{get('device.name')}, processes: {get('device.processes')}, threads: {get('device.threads')}",
        "dtype": get("device.dtype"),
        "seed": get("seed"),
        "commit": get("git.commit")[:10] + (" (dirty)" if look(run, "git.dirty") else ""),
        "python, torch": f"{get('versions.python')}, {get('versions.torch')}",
    }


def what_was_compared(runs: list[Run]) -> list[tuple]:
    set_ups = [set_up(run) for run in runs]
    rows = [(label, [each[label] for each in set_ups]) for label in set_ups[0]]
    keys = list(dict.fromkeys(key for run in runs for key in flags(run)))
    given = [("--" + key.replace("_", "-"), [text(flags(run).get(key)) for run in runs]) for key in keys]
    differing = [(flag, values) for flag, values in given if len(set(values)) > 1]
    shared = [f"{flag} {values[0]}" for flag, values in given if len(set(values)) == 1]
    blocks = []
    if len(runs) > WIDE:  # what all share would be a column of repetitions
        blocks = [("list", [f"**{label}** of all runs: {cells[0]}" for label, cells in rows if len(set(cells)) == 1])]
        rows = [(label, cells) for label, cells in rows if len(set(cells)) > 1]
    blocks += grid(runs, [section for section in (("Set-up", rows), ("Flags that differ", differing)) if section[1]], "text")
    return blocks + ([("details", f"Flags all runs share ({len(shared)})", "\n".join(shared))] if shared else [])


def text(value) -> str:
    return "–" if value is None else str(value)


def describe_ranks(ranks) -> str:
    """One rank if all layers share it; 0 is full rank."""
    if not isinstance(ranks, list) or None in ranks:
        return "–"
    words = ["full" if r == 0 else str(r) for r in ranks]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


def samples(runs: list[Run]) -> list[tuple]:
    """The last texts each run wrote, side by side."""
    last = [next((h for h in reversed(run.history) if isinstance(h.get("sample"), list)), {}) for run in runs]
    rows = max(len(h.get("sample", ())) for h in last)
    if not rows:
        return []
    lines = [(f"sample {i + 1}", [clean(h["sample"][i]) if i < len(h.get("sample", ())) else "–" for h in last])
             for i in range(rows)]
    steps = names([f"{run.name} at step {h.get('step')}" for run, h in zip(runs, last) if h])
    return [("heading", "Samples"), ("paragraph", f"Written by {steps}."), *grid(runs, [("Continuations", lines)], "samples")]


def clean(sample) -> str:
    """A sample as a document can hold it: control characters visible, of bounded length."""
    sample = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(sample).strip())
    return sample if len(sample) <= 600 else sample[:600] + " …"


# ---- writing --------------------------------------------------------------------------------------------------------

def to_csv(runs: list[Run]) -> str:
    """One row a run, numbers as recorded: what the tables show, every other summary value, the set-up, all flags."""
    paths = ("device.type", "device.name", "device.processes", "device.dtype", "seed", "git.commit", "git.dirty",
             "derived.corpus.name", "derived.corpus.val_fingerprint", "derived.tokenizer_hash", "derived.num_iterations",
             "derived.total_batch_size", "derived.model.n_layer", "derived.model.n_embd", "derived.model.attn_ranks",
             "derived.model.mlp_ranks", "derived.model.lm_head_rank")
    listed = ["status", "step"] + [key for _, metrics in SECTIONS for key, *_ in metrics]
    others = sorted({k for run in runs for k, v in run.summary.items() if isinstance(v, (int, float, str))} - set(listed))
    rows = [{"run": run.name, **{key: run.summary.get(key) for key in listed + others},
             **{path: look(run, path) for path in paths},
             **{f"flags.{k}": v for k, v in (look(run, "flags") or {}).items()}} for run in runs]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


if __name__ == "__main__":
    run_script(main)
