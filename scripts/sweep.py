"""Run an experiment file: every point is a run of scripts.base_train, or of scripts.adapter_train on such a run, and one report over all
of them comes out.

    python -m scripts.sweep dev/experiments/low_rank_substitution.toml --preset small --plan     what it is and what it costs
    python -m scripts.sweep dev/experiments/low_rank_substitution.toml --preset small            run it, here
    python -m scripts.sweep dev/experiments/low_rank_substitution.toml --preset full --launcher slurm --sbatch="--gpus-per-node=8"

The same command again, after whatever ended it: finished runs are skipped, interrupted ones go on, failed ones are tried again.
The format of the file is in nanochat/sweep/experiment.py; logs and report are in $NANOCHAT_BASE_DIR/sweeps/<name>, the runs where all runs are.
"""

import contextlib
import importlib
import os
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from nanochat import common, metrics, wandb_log
from nanochat.common import ArgumentParser, InputError, whole_number
from nanochat.continuation import differences, flags_given, flags_text, inheritance, read_record
from nanochat.dataset import open_corpus
from nanochat.environment import leave_process_group
from nanochat.files import check_out, write_atomic
from nanochat.naming import LONGEST_RUN_NAME, is_tag, lock_path, option, part_of_tag, path_word, run_name
from nanochat.rank import account, predict_peak
from nanochat.sweep.experiment import NAMED_TEXT, Point, Sweep, read_experiment
from nanochat.sweep.local import claim_path, finished_rate, last_lines, log_of, places, run_all
from nanochat.sweep.trial import to_argv
from nanochat.token_cache import cached_tokens
from nanochat.tokenizer import load_tokenizer, other_text, tokenizer_path
from nanochat.units import BYTES, COUNT, FLOP, TIME, human
from nanochat.workers import run_workers


def build_parser():
    parser = ArgumentParser("Run all points of an experiment file, and report on them.")
    add = parser.add_argument
    add("experiment", type=Path, help="the file: see dev/experiments/")
    add("--preset", default="", help="which of the file's presets; needed where it has some")
    add(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]TEXT",
        help="the text, in place of the file's: stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder; with NAME= in place of the text that points call so",
    )
    add(
        "-j",
        type=whole_number(1),
        default=None,
        metavar="N",
        help="runs at once (default: one on a CPU, with all cores; as many as fit on the GPUs)",
    )
    add(
        "--run",
        type=run_name,
        default="dummy",
        help="wandb: each run is named NAME-<what varies>; 'dummy' turns wandb off",
    )
    add("--out", default="", help="folder of the report ('' = report/ in the sweep's folder)")
    add("--launcher", choices=["local", "slurm", "wandb"], default="local", help="where the runs run")
    add(
        "--sbatch",
        default="",
        help='with --launcher slurm: further options of sbatch, as in --sbatch="--partition=gpu --time=4:00:00"',
    )
    add("--plan", action="store_true", help="print all points and what they cost, and exit")
    add(
        "--report",
        action="store_true",
        help="only make the report, over what is finished; exit code 1: some runs are not",
    )
    add(
        "--task",
        default="",
        metavar="TAG",
        help="run this one point in the foreground; exit code 75: stopped by a signal, state saved",
    )
    add(
        "--launched",
        type=whole_number(1),
        default=None,
        metavar="PID",
        help="with --task, from the local launcher: it holds the run's lock, and once this process is gone the run saves and stops",
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    leave_process_group()
    sweep = load(args)
    if args.plan:
        return print_plan(sweep, args)
    if args.report:
        return conclude(
            sweep,
            args,
            unfinished(sweep),
            "did not finish; the same command without --report tries them again",
        )
    if args.task:
        return run_task(sweep, sweep.point(args.task), args)

    if args.out:
        check_out("--out", Path(args.out))
    if args.launcher == "local":
        places(sweep, args.j)  # that there are any is known before anything is tokenised
    if args.launcher == "slurm":
        from nanochat.sweep import slurm

        slurm.check(args.sbatch)
    if args.launcher == "wandb":
        from nanochat.sweep import wandb_agent

        wandb_agent.check(sweep, args.run)
    prepare(sweep)
    if args.launcher == "slurm":
        return slurm.submit(sweep, args)
    if args.launcher == "wandb":
        return wandb_agent.register(sweep, args)
    failed, stopped = run_all(sweep, args, task_command)
    if stopped:
        print(f"{sweep.name}: stopped; the same command goes on")
        sys.exit(130 if stopped == "SIGINT" else common.REQUEUE)
    conclude(sweep, args, failed, "failed; the same command tries them again")


def load(args) -> Sweep:
    named = [NAMED_TEXT.fullmatch(word) for word in args.data]
    main = [word for word, match in zip(args.data, named) if not match]
    if len(main) > 1:
        raise InputError(
            f"--data {main[0]} and {main[1]}: give the text once; --data NAME=TEXT says where another text of the file is"
        )
    texts = dict(match.groups() for match in named if match)
    sweep = read_experiment(args.experiment, args.preset, *(main or [""]), texts=texts)
    values = sweep_inheritance(sweep)
    if not values:
        return sweep
    print(f"{sweep.name}: as it began, with {flags_text(values)}")
    defaults = {name.replace("_", "-"): value for name, value in values.items()}
    sweep = read_experiment(args.experiment, args.preset, *(main or [""]), texts=texts, defaults=defaults)
    return replace(sweep, points=tuple(without_inheritance(point, values) for point in sweep.points))


def sweep_inheritance(sweep: Sweep) -> dict:
    """{flag: value} that runs of this sweep inherit: its other runs get them too, to be comparable."""
    runs = [inheritance(point.args, read_record(point.folder)) for point in sweep.points if not point.base]
    values = {}
    for run in runs:
        values |= {name: value for name, value in run.items() if isinstance(value, (int, float, str))}
    return {
        name: value for name, value in values.items() if all(run.get(name) in (None, value) for run in runs)
    }


def without_inheritance(point: Point, values: dict) -> Point:
    """The point without the flags that its run inherits: on the command line they would count as given."""
    record = read_record(point.folder)
    if not record:
        return point
    argv = list(point.argv)
    for name in values.keys() - flags_given(record):
        words = to_argv({name.replace("_", "-"): values[name]})
        if words and words[0] in argv and getattr(point.args, name) == values[name]:
            start = argv.index(words[0])
            del argv[start : start + len(words)]
    return replace(point, argv=tuple(argv))


# ---- what all runs share --------------------------------------------------------------------------------------------


def prepare(sweep: Sweep):
    """Tokenizer and token cache, once, before the runs that need them. InputError if a run of this name is another run."""
    for name, text in sweep.texts:
        if os.path.isabs(text) and not os.path.exists(text):
            raise InputError(
                f"{sweep.file}: there is no {text}; say where the text {name} is: --data {name}=FOLDER"
            )
    tokenizer = prepare_tokenizer(sweep)
    corpora = {data: open_corpus(data) for data in dict.fromkeys(p.args.data for p in sweep.points)}
    if line := other_text(tokenizer, corpora[sweep.data]):
        print(line)
    check_existing(sweep, tokenizer, corpora)
    for corpus in corpora.values():
        for shard in (*corpus.train, *corpus.val):
            cached_tokens(shard, tokenizer)


def prepare_tokenizer(sweep: Sweep):
    tag = sweep.points[0].args.tokenizer_tag  # that of [flags], which all share
    path = tokenizer_path(tag)
    with common.locked(lock_path("tokenizer", "all")):  # two tasks of a cluster may come here at once
        if not path.exists():
            from scripts import tok_train

            vocab_size = str(sweep.vocab_size)
            flags = ["--data", sweep.data, "--vocab-size", vocab_size, "--tokenizer-tag", tag]
            tok_train.train(tok_train.parse(flags))
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != sweep.vocab_size:
        raise InputError(
            f"{path}: has {tokenizer.vocab_size} tokens, {sweep.file} asks for vocab-size "
            f"{sweep.vocab_size}; give this experiment a tokenizer of its own, "
            'tokenizer-tag = "NAME" in [flags], or a base directory: NANOCHAT_BASE_DIR=…'
        )
    return tokenizer


def check_existing(sweep: Sweep, tokenizer, corpora: dict):
    """Refuse to count another run as one of this sweep: of an earlier file, or of other text."""
    wrong = {}
    for point in (p for p in sweep.points if p.status() != "new"):
        corpus = corpora[point.args.data]
        record = metrics.load_run(point.folder).config
        text = {f"{split}_fingerprint": corpus.fingerprint(split) for split in ("train", "val")}
        derived = {"tokenizer_hash": tokenizer.hash, "corpus": text}
        flags = vars(point.args) | inheritance(point.args, record)
        if point.base:  # it took the shape and the number of the checkpoint from its base when it ran
            flags = record.get("flags", {}) | flags | {"step": record.get("flags", {}).get("step")}
        differing = [
            key.removeprefix("flags.").removeprefix("derived.") for key in differences(record, flags, derived)
        ]
        if differing:
            wrong[point.tag] = differing
    if wrong:
        tag, differing = next(iter(wrong.items()))
        raise InputError(
            f"{tag}: {metrics.runs_dir() / tag} is another run: {'; '.join(differing)}"
            + (f" (and {len(wrong) - 1} more such runs)" if len(wrong) > 1 else "")
            + "; rename the experiment file, or move these runs away"
        )


# ---- one run --------------------------------------------------------------------------------------------------------


def task_command(sweep: Sweep, point: Point, args) -> list[str]:
    """A command that runs this point in the foreground."""
    preset = ["--preset", sweep.preset] if sweep.preset else []
    return [
        sys.executable,
        "-m",
        "scripts.sweep",
        path_word(sweep.file),
        *preset,
        *sweep.data_flags(),
        *option("--run", args.run),
        "--task",
        point.tag,
    ]


def run_task(sweep: Sweep, point: Point, args):
    """Run one point here, to its end or until it is told to stop; exits with its script's code."""
    if point.base and (status := sweep.point(point.base).status()) != "finished":
        raise InputError(
            f"--task {point.tag}: starts from {point.base}, which is not finished ({status}); run --task {point.base} first"
        )
    cache = str(common.get_base_dir().absolute() / "inductor_cache")
    if re.fullmatch(r"[\w./+@-]+", cache, re.ASCII):  # torch's compiler puts its path into commands as it is
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)  # compiled once for all runs of a shape
    argv = [*point.argv]
    if args.run != "dummy":
        argv += option("--run", f"{args.run}-{point.tag.removeprefix(sweep.name + '_')}"[:LONGEST_RUN_NAME])
        name_for_wandb(sweep, point)
    with contextlib.ExitStack() as held:
        if args.launched:
            common.stop_without(args.launched)
        else:
            held.enter_context(common.claimed(claim_path(point.tag), f"--task {point.tag}: this run"))
        prepare_tokenizer(sweep)
        if point.processes > 1:
            command = [sys.executable, "-m", f"scripts.{point.script}", *argv]
            with common.stop_signals() as stop:
                code = run_workers(command, point.processes, stop)
            sys.exit(code)
        importlib.import_module(f"scripts.{point.script}").main(argv)


def name_for_wandb(sweep: Sweep, point: Point):
    """Set the run's group and tags on W&B, beside what the user has set; W&B refuses an empty variable."""
    os.environ["WANDB_RUN_GROUP"] = os.environ.get("WANDB_RUN_GROUP") or sweep.name
    words = [word.replace(",", "-") for word in point.varying]
    if any(other.pair == point.tag for other in sweep.points):
        words.append("baseline")
    text = wandb_log.tags(",".join([os.environ.get("WANDB_TAGS", ""), *words]))
    if text:
        os.environ["WANDB_TAGS"] = text
    else:
        os.environ.pop("WANDB_TAGS", None)


# ---- the plan -------------------------------------------------------------------------------------------------------


def print_plan(sweep: Sweep, args):
    """A line a run, and what all of them cost together."""
    device_type = common.pick_device_type(sweep.points[0].args.device_type)
    rate, source = finished_rate(sweep)
    if not rate:
        rate, source = measured_rate(sweep.points[0], device_type)
    if device_type == "cuda":
        rate *= sweep.processes
    itemsize = common.compute_dtype(sweep.points[0].args.dtype, device_type, training=True).itemsize
    rows = []
    total = 0
    left = 0
    for p in sweep.points:
        cost = account(p.config)
        status = p.status()
        peak = predicted_peak(p, itemsize)
        flops = p.plan["tokens"] * cost["flops/per_token"]
        total = total + flops
        left = left + flops * (status != "finished")
        rows.append(
            [
                p.tag,
                status,
                human(cost["params/total"], COUNT),
                human(cost["flops/per_token"], FLOP),
                human(p.plan["tokens"], COUNT),
                human(flops, FLOP),
                human(peak, BYTES) if peak else "–",
                human(flops / rate, TIME),
            ]
        )
    header = ["run", "status", "parameters", "FLOPs/token", "tokens", "FLOPs", "peak memory", "time"]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(
        *filter(None, [sweep.question, sweep.cost and f"cost, as the file has it: {sweep.cost}", ""]),
        sep="\n",
    )
    for row in [header, *rows]:
        print(
            row[0].ljust(widths[0]),
            row[1].ljust(widths[1]),
            *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:])),
            sep="  ",
        )
    at_once = min(places_here(sweep, args.j), len(sweep.points)) if device_type == "cuda" else 1
    print(
        f"\n{len(sweep.points)} runs, {human(total, FLOP)}; left to do: {human(left, FLOP)}, an estimated {human(left / rate / at_once, TIME)} of training "
        f"on this machine, {at_once} at a time; starts, evaluations and checkpoints come on top"
    )
    print(
        f"rate: {human(rate, FLOP)}/s a run, {source}; memory: the tensors of one process of a run, {itemsize * 8}-bit"
    )
    if any(p.base for p in sweep.points):
        print(
            "note: of a run that starts from another, parameters and FLOPs are those of its base with every weight trained: an upper bound"
        )
    for label, kept in sweep.same:
        print(f"note: {label} is the same run as {kept}: it runs once")
    if len({p.plan["tokens"] for p in sweep.points}) > 1:
        print(
            "note: not all runs see the same number of tokens; fix it with num-iterations and total-batch-size if it is not what varies"
        )


def predicted_peak(point: Point, itemsize: int) -> int | None:
    """Bytes; None of a run that starts from another, whose frozen weights have neither gradients nor optimizer state."""
    if point.base:
        return None
    plan = point.plan
    memory = predict_peak(point.config, plan["device_batch_size"], itemsize, plan["grad_accum_steps"] > 1)
    return memory["mem/predicted_peak_bytes"]


def places_here(sweep: Sweep, j) -> int:
    try:
        return len(places(sweep, j))
    except InputError:  # too few GPUs here: the plan is for another machine
        return 1


def measured_rate(point: Point, device_type: str) -> tuple[float, str]:
    """(FLOP/s, how it was found): forward and backward through two layers of this model, for a second or two."""
    import torch

    from nanochat.gpt import GPT

    layers = min(2, point.config.n_layer)
    config = replace(
        point.config,
        n_layer=layers,
        layer_map=(),
        attn_ranks=point.config.attn_ranks[:layers],
        mlp_ranks=point.config.mlp_ranks[:layers],
        matrix_ranks={name: ranks[:layers] for name, ranks in point.config.matrix_ranks.items()},
    )
    per_token = account(config)["flops/per_token"]
    T = config.sequence_len
    rows = point.plan["device_batch_size"]
    if device_type == "cpu":  # a part of a batch: a pass of half a second on an ordinary core
        tokens = max(128, int(3e10 / per_token))
        rows = max(1, min(rows, tokens // T))
        T = min(T, tokens)
    dtype = common.compute_dtype(point.args.dtype, device_type, training=True)
    with torch.device(device_type):
        model = GPT(config)
        model.init_weights()
        x = torch.randint(config.vocab_size, (rows, T))
    times = []
    while len(times) < 2 or sum(times) < 1.5:
        started = time.perf_counter()
        loss = model(x, x, dtype)
        loss.backward()
        loss.item()  # a GPU is done only now
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    threads = f", {torch.get_num_threads()} thread(s)" if device_type == "cpu" else ""
    return (
        x.numel() * per_token / seconds,
        f"measured on {layers} layers of width {config.n_embd}, forward and backward of {x.numel():,} tokens, without the optimizer{threads}: an estimate",
    )


# ---- the report -----------------------------------------------------------------------------------------------------


def conclude(sweep: Sweep, args, missing: dict, what: str):
    """The report, then the runs that are not in it, on the terminal and beside the report, with exit code 1.

    missing: {tag: (what became of it, log file, its last lines)}; what: what became of all of them.
    """
    lines = [f"{sweep.name}: {len(missing)} of {len(sweep.points)} runs {what}"]
    for tag, (why, log, last) in missing.items():
        lines += [f"  {tag}: {why}, {log}", *(f"    {line}" for line in last)]
    try:
        make_report(sweep, args)
    except (InputError, OSError) as e:  # for one, that no run is finished
        if not missing:
            raise
        lines.append(f"no report: {e}")
    finally:
        if missing:
            print(*lines, sep="\n", flush=True)
    beside = report_folder(sweep, args) / "unfinished.txt"
    if missing:
        write_atomic(beside, "\n".join(lines) + "\n")
        sys.exit(1)
    beside.unlink(missing_ok=True)


def unfinished(sweep: Sweep) -> dict:
    """{tag: (what became of it, log file, its last lines)} of unfinished runs; {} where no run has begun."""
    words = {
        "new": "has not begun",
        "running": "began, and has not ended",
        "stopped": "was stopped, its state is saved",
    }
    missing = {}
    for point in sweep.points:
        status = point.status()
        if status != "finished":
            waits = point.base and sweep.point(point.base).status() != "finished"
            why = f"cannot start: {point.base} is not finished" if waits else words.get(status, status)
            missing[point.tag] = (why, log_of(sweep, point), last_lines(log_of(sweep, point)))
    begun = any(point.status() != "new" or log_of(sweep, point).exists() for point in sweep.points)
    return missing if begun else {}


def report_folder(sweep: Sweep, args) -> Path:
    return Path(args.out or sweep.folder / "report")


def make_report(sweep: Sweep, args):
    """scripts.report over the finished runs, a full-rank one first; of several texts, which do not compare, each by itself. Then the evals."""
    from scripts import report

    out = report_folder(sweep, args)
    finished = [p for p in sweep.points if p.status() == "finished"]
    if not finished:
        raise InputError(f"{sweep.name}: no run is finished, so there is nothing to report on")
    texts = text_folders(sweep)
    for text, name in texts.items():
        tags = [
            p.tag for p in sorted(finished, key=lambda p: (bool(p.base), bool(p.pair))) if p.args.data == text
        ]
        if tags:
            report.main([*tags, *option("--out", str(out / name if len(texts) > 1 else out))])
    for measured in sweep.evals:
        point = sweep.point(measured.base)
        if not (out / measured.name).exists() and point.status() == "finished":
            moved = read_record(point.folder).get("flags", {}).get("data", point.args.data) != point.args.data
            where = ["--data", point.args.data] if moved and "--data" not in measured.argv else []
            script = importlib.import_module(f"scripts.{measured.script}")
            script.main([*measured.argv, *where, *option("--out", str(out / measured.name))])


def text_folders(sweep: Sweep) -> dict[str, str]:
    """{text: name of the folder of its report}, of all texts of a sweep: one part of a path, one for each."""
    names = {sweep.data: Path(sweep.data).name}
    for name, text in sweep.texts:
        names.setdefault(text, name)
    folders = {}
    for text, name in names.items():
        name = name if is_tag(name) else part_of_tag(Path(text).name).strip("-.") or "text"
        number = 2
        unique = name
        while unique in folders.values():
            unique = f"{name}-{number}"
            number += 1
        folders[text] = unique
    return folders


if __name__ == "__main__":
    common.run_script(main)
