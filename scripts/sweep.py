"""Run all points of an experiment file, then report on them.

A point is a run of scripts.base_train, or of scripts.adapter_train on such a run.

    python -m scripts.sweep FILE --preset small --plan     # its runs and their costs
    python -m scripts.sweep FILE --preset small            # run it here
    python -m scripts.sweep FILE --preset full --launcher slurm --sbatch="--gpus-per-node=8"

FILE is for example dev/experiments/low_rank_substitution.toml; nanochat/sweep/experiment.py describes its
format. The same command continues a sweep that ended early: it skips finished runs, resumes interrupted ones
and tries failed ones again.

Logs and the report are in $NANOCHAT_BASE_DIR/sweeps/<name>, the runs in the folder of all runs.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from nanochat import common, processes, signals
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.continuation import flags_text, read_record
from nanochat.dataset import open_corpus
from nanochat.environment import leave_process_group
from nanochat.errors import InputError
from nanochat.files import check_out, write_atomic
from nanochat.naming import LONGEST_RUN_NAME, is_tag, lock_path, option, part_of_tag, path_word, run_name
from nanochat.sweep import slurm, wandb_agent
from nanochat.sweep.costs import print_costs
from nanochat.sweep.display import last_lines, log_path
from nanochat.sweep.existing import check_existing, inherited_flags, without_inherited
from nanochat.sweep.experiment import NAMED_TEXT, Point, Sweep, read_experiment
from nanochat.sweep.local import claim_path, places, run_all
from nanochat.sweep.workers import run_workers
from nanochat.token_cache import cached_tokens
from nanochat.token_workers import build_caches
from nanochat.tokenizer import load_tokenizer, note_on_tokenizer, tokenizer_path


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
        help="the text, in place of the file's: stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder; "
        "with NAME= in place of the text that points call NAME",
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
        help="wandb: the name of each run is NAME-<its point>; 'dummy' turns wandb off",
    )
    add("--out", default="", help="folder of the report ('' = report/ in the sweep's folder)")
    add("--launcher", choices=["local", "slurm", "wandb"], default="local", help="where the runs run")
    add(
        "--sbatch",
        default="",
        help="with --launcher slurm: further options of sbatch, "
        'as in --sbatch="--partition=gpu --time=4:00:00"',
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
    # the local launcher gives its process id with --task: it holds the run's lock. If that process ends, the
    # run saves and stops
    add("--launched", type=whole_number(1), default=None, metavar="PID", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    leave_process_group()
    sweep = load(args)
    if args.plan:
        print_costs(sweep, args.j)
    elif args.report:
        retry = "did not finish; the same command without --report tries them again"
        conclude(sweep, args, unfinished(sweep), retry)
    elif args.task:
        run_task(sweep, sweep.point(args.task), args)
    else:
        check_launcher(sweep, args)
        prepare(sweep)
        launch(sweep, args)


def launch(sweep: Sweep, args):
    """Hand the runs to Slurm or W&B, or run them here and report on them."""
    if args.launcher == "slurm":
        slurm.submit(sweep, args)
    elif args.launcher == "wandb":
        wandb_agent.register(sweep, args)
    else:
        failed, stopped = run_all(sweep, args, task_command)
        if stopped:
            print(f"{sweep.name}: stopped; the same command goes on")
            sys.exit(130 if stopped == "SIGINT" else signals.REQUEUE)
        conclude(sweep, args, failed, "failed; the same command tries them again")


# ---- the experiment file -----------------------------------------------------------------------------------


def load(args) -> Sweep:
    """The experiment file with these flags. A sweep that began with other defaults keeps them."""
    matches = [NAMED_TEXT.fullmatch(word) for word in args.data]
    main = [word for word, match in zip(args.data, matches) if not match]
    if len(main) > 1:
        raise InputError(
            f"--data {main[0]} and {main[1]}: give the text once; "
            "--data NAME=TEXT says where another text of the file is"
        )
    data = main[0] if main else ""
    texts = dict(match.groups() for match in matches if match)
    sweep = read_experiment(args.experiment, args.preset, data, texts)
    values = inherited_flags(sweep)
    if not values:
        return sweep
    print(f"{sweep.name}: as it began, with {flags_text(values)}")
    defaults = {name.replace("_", "-"): value for name, value in values.items()}
    sweep = read_experiment(args.experiment, args.preset, data, texts, defaults)
    return replace(sweep, points=tuple(without_inherited(point, values) for point in sweep.points))


# ---- what all runs share -----------------------------------------------------------------------------------


def check_launcher(sweep: Sweep, args):
    """InputError, before any work, if runs cannot be launched or the report cannot be written."""
    if args.out:
        check_out("--out", Path(args.out))
    if args.launcher == "local":
        places(sweep, args.j)
    elif args.launcher == "slurm":
        slurm.check_cluster(args.sbatch)
    else:
        wandb_agent.check_for_agents(sweep, args.run)


def prepare(sweep: Sweep):
    """Make the tokenizer and the token caches once, before the runs that need them.

    InputError if a text is missing, or if a run with a name of this sweep is another run.
    """
    for name, text in sweep.texts:
        if os.path.isabs(text) and not os.path.exists(text):
            raise InputError(
                f"{sweep.file}: there is no {text}; say where the text {name} is: --data {name}=FOLDER"
            )
    tokenizer = prepare_tokenizer(sweep)
    texts = dict.fromkeys(point.args.data for point in sweep.points)
    corpora = {text: open_corpus(text) for text in texts}
    note = note_on_tokenizer(tokenizer, corpora[sweep.data])
    if note:
        print(note)
    check_existing(sweep, tokenizer, corpora)
    for corpus in corpora.values():
        shards = (*corpus.train, *corpus.val)
        build_caches(shards, tokenizer)
        for shard in shards:
            cached_tokens(shard, tokenizer)


def prepare_tokenizer(sweep: Sweep):
    """The tokenizer of the sweep, trained if there is none."""
    tag = sweep.points[0].args.tokenizer_tag  # all points have that of [flags]
    path = tokenizer_path(tag)
    with common.locked(lock_path("tokenizer", "all")):  # two tasks of a cluster may come here at once
        if not path.exists():
            from scripts import tok_train

            flags = ["--data", sweep.data, "--vocab-size", str(sweep.vocab_size), "--tokenizer-tag", tag]
            tok_train.train(tok_train.parse(flags))
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != sweep.vocab_size:
        raise InputError(
            f"{path}: has {tokenizer.vocab_size} tokens, {sweep.file} asks for vocab-size "
            f"{sweep.vocab_size}; give this experiment a tokenizer of its own, "
            'tokenizer-tag = "NAME" in [flags], or a base directory: NANOCHAT_BASE_DIR=…'
        )
    return tokenizer


# ---- one run -----------------------------------------------------------------------------------------------


def task_command(sweep: Sweep, point: Point, args) -> list[str]:
    """The command that runs this point in the foreground."""
    return [
        sys.executable,
        "-m",
        "scripts.sweep",
        path_word(sweep.file),
        *(["--preset", sweep.preset] if sweep.preset else []),
        *sweep.data_flags(),
        *option("--run", args.run),
        "--task",
        point.tag,
    ]


def run_task(sweep: Sweep, point: Point, args):
    """Run one point here, until it ends or a signal stops it. Exits with the code of its script."""
    if point.base:
        status = sweep.point(point.base).status()
        if status != "finished":
            raise InputError(
                f"--task {point.tag}: starts from {point.base}, which is not finished ({status}); "
                f"run --task {point.base} first"
            )
    share_compiled_code()
    argv = list(point.argv)
    if args.run != "dummy":
        name = f"{args.run}-{point.tag.removeprefix(sweep.name + '_')}"
        argv += option("--run", name[:LONGEST_RUN_NAME])
        wandb_agent.set_group_and_tags(sweep, point)
    with contextlib.ExitStack() as stack:
        if args.launched:
            processes.stop_without(args.launched)
        else:
            stack.enter_context(common.claimed(claim_path(point.tag), f"--task {point.tag}: this run"))
        prepare_tokenizer(sweep)
        if point.processes > 1:
            command = [sys.executable, "-m", f"scripts.{point.script}", *argv]
            with signals.stop_signals() as stop:
                code = run_workers(command, point.processes, stop)
            sys.exit(code)
        importlib.import_module(f"scripts.{point.script}").main(argv)


def share_compiled_code():
    """Let torch store compiled code in the base directory: runs of one shape then compile once."""
    cache = str(common.get_base_dir().absolute() / "inductor_cache")
    if re.fullmatch(r"[\w./+@-]+", cache, re.ASCII):  # the compiler does not quote the path in its commands
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)


# ---- the report --------------------------------------------------------------------------------------------


def conclude(sweep: Sweep, args, missing: dict, fate: str):
    """Make the report. Then name the runs that are not in it, on the terminal and beside the report.

    missing: {tag: (what happened, log file, its last lines)}; fate: what happened to all of these, in words.
    If runs are missing, the exit code is 1.
    """
    lines = [f"{sweep.name}: {len(missing)} of {len(sweep.points)} runs {fate}"]
    for tag, (why, log, log_end) in missing.items():
        lines += [f"  {tag}: {why}, {log}", *(f"    {line}" for line in log_end)]
    try:
        make_report(sweep, args)
    except (InputError, OSError) as e:  # for example: no run is finished
        if not missing:
            raise
        lines.append(f"no report: {e}")
    finally:
        if missing:
            print(*lines, sep="\n", flush=True)
    path = report_folder(sweep, args) / "unfinished.txt"
    if missing:
        write_atomic(path, "\n".join(lines) + "\n")
        sys.exit(1)
    path.unlink(missing_ok=True)


def unfinished(sweep: Sweep) -> dict:
    """{tag: (its state, log file, last lines of it)} of the unfinished runs; {} where no run has begun."""
    states = {
        "new": "has not begun",
        "running": "began, and has not ended",
        "stopped": "was stopped, its state is saved",
    }
    statuses = {point.tag: point.status() for point in sweep.points}
    missing = {}
    for point in sweep.points:
        status = statuses[point.tag]
        if status == "finished":
            continue
        log = log_path(sweep, point)
        why = states.get(status, status)
        if point.base and statuses[point.base] != "finished":
            why = f"cannot start: {point.base} is not finished"
        missing[point.tag] = (why, log, last_lines(log))
    begun = any(statuses[point.tag] != "new" or log_path(sweep, point).exists() for point in sweep.points)
    return missing if begun else {}


def report_folder(sweep: Sweep, args) -> Path:
    return Path(args.out or sweep.folder / "report")


def make_report(sweep: Sweep, args):
    """scripts.report over the finished runs, those without a partner first; then the evals.

    Runs on different texts cannot be compared: each text has a report of its own.
    """
    from scripts import report

    out = report_folder(sweep, args)
    finished = [point for point in sweep.points if point.status() == "finished"]
    if not finished:
        raise InputError(f"{sweep.name}: no run is finished, so there is nothing to report on")
    finished.sort(key=lambda point: (bool(point.base), bool(point.pair)))
    folders = text_folders(sweep)
    for text, name in folders.items():
        tags = [point.tag for point in finished if point.args.data == text]
        folder = out / name if len(folders) > 1 else out
        if tags:
            report.main([*tags, *option("--out", str(folder))])
    for measurement in sweep.evals:
        folder = out / measurement.name
        point = sweep.point(measurement.base)
        if folder.exists() or point.status() != "finished":
            continue
        argv = list(measurement.argv)
        recorded_text = read_record(point.folder).get("flags", {}).get("data", point.args.data)
        if recorded_text != point.args.data and "--data" not in argv:  # the text has moved since
            argv += ["--data", point.args.data]
        script = importlib.import_module(f"scripts.{measurement.script}")
        script.main([*argv, *option("--out", str(folder))])


def text_folders(sweep: Sweep) -> dict[str, str]:
    """{text: name of the folder of its report}. The names differ, and each is one part of a path."""
    names = {sweep.data: Path(sweep.data).name}
    for name, text in sweep.texts:
        names.setdefault(text, name)
    folders = {}
    for text, name in names.items():
        if not is_tag(name):
            name = part_of_tag(Path(text).name).strip("-.") or "text"
        unique = name
        suffix = 2
        while unique in folders.values():
            unique = f"{name}-{suffix}"
            suffix += 1
        folders[text] = unique
    return folders


if __name__ == "__main__":
    common.run_script(main)
