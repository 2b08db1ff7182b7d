"""Evaluate a trained model: loss, perplexity and bits per byte on its text, samples, and the CORE metric.

    python -m scripts.base_eval --model-tag d4
    python -m scripts.base_eval --model-tag d4 --eval core --max-per-task 200
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag d20 --eval core,bpb,sample

Writes runs/<model-tag>/eval_<step>.json (bpb, sample) and core_<step>.json (core), and prints them. The same
command again computes nothing: it prints the stored results.
"""

import json
from argparse import ArgumentTypeError
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from nanochat import arguments, common, devices, metrics, processes
from nanochat.adapters.loading import load_model
from nanochat.agreement import confirm, from_first, load_same
from nanochat.arguments import quoted, whole_number
from nanochat.checkpoint_manager import step_or_newest
from nanochat.core_bundle import Bundle, Unavailable, open_bundle
from nanochat.core_eval import evaluate_core, questions, with_intervals
from nanochat.dataloader import Rows
from nanochat.dataset import Corpus
from nanochat.errors import InputError
from nanochat.eval_results import earlier_results, matching_results, read_core, read_eval
from nanochat.files import write_atomic
from nanochat.loss_eval import EvalSet, evaluate, sample_texts
from nanochat.naming import run_folder, tag
from nanochat.processes import print0
from nanochat.run_files import step_folder
from nanochat.run_text import fingerprints, note_on_text, open_run_text, recorded_text
from nanochat.shared_text import confirm_caches

RESULT_KEYS = {"core": "core_metric", "bpb": "val/bpb", "sample": "sample"}  # by the part of --eval


def eval_parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or set(parts) - set(RESULT_KEYS):
        raise ArgumentTypeError(f"{quoted(text)}: give one or more of {','.join(RESULT_KEYS)}")
    return parts


def parse(argv=None):
    parser = arguments.ArgumentParser("Evaluate a trained model.")
    add = parser.add_argument
    add("--model-tag", type=tag, required=True, help="the run")
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    add("--eval", type=eval_parts, default="bpb,sample", help="one or more of core,bpb,sample")
    add("--data", default="", help="text to evaluate on, or the new place of the run's text; '' = the run's")
    add("--eval-tokens", type=whole_number(1), default=2**19, help="number of tokens of each split")
    add("--core-dir", default="", help="folder of CORE's evaluation bundle; '' = downloaded once")
    add(
        "--max-per-task",
        type=whole_number(1, off=-1),
        default=-1,
        help="number of questions of each task of CORE; -1 = all",
    )
    add("--device-batch-size", type=whole_number(1), default=32, help="sequences that are computed together")
    arguments.device_flags(add, "of the computation; weights are float32")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    world = processes.init_process(args.device_type)
    confirm(world, {name: value for name, value in vars(args).items() if name not in ("data", "core_dir")})

    # process 0 looks for the results of an earlier evaluation, and all processes follow it
    folder = metrics.runs_dir() / args.model_tag
    run, step = from_first(world, open_run, args)
    identity = {"model_tag": args.model_tag, "step": step}
    out = folder / f"eval_{step:06d}.json"
    core_out = folder / f"core_{step:06d}.json"
    results, corpus = from_first(world, earlier_on_text, args, run, identity, out)
    if corpus and world.rank > 0:
        corpus = corpus.announced()
    bundle, core_results, no_bundle = earlier_core(args, world, identity, core_out)

    missing = missing_parts(args, results)
    core_missing = bundle is not None and RESULT_KEYS["core"] not in core_results
    unwritten = []
    if missing or core_missing:
        dtype = from_first(world, pick_dtype, args, folder, world.device.type)
        load = partial(load_model, folder, step, world.device)
        model, tokenizer, _ = load_same(world, load, step_folder(folder, step))
        context = model.config.sequence_len
        if core_missing:  # before the long part: a question may not fit into the model's context
            shares = questions(bundle, tokenizer, context, args.max_per_task, world.rank, world.size)
        if missing:
            results |= evaluate_on_text(missing, model, tokenizer, corpus, args, world, dtype)
            unwritten += store(out, results, world.rank)
        if core_missing:
            measured = evaluate_core(model, bundle, shares, dtype, args.device_batch_size * context)
            core_results |= {"bundle_sha256": bundle.sha256, **with_intervals(measured)}
            unwritten += store(core_out, core_results, world.rank)

    if world.size > 1:
        dist.barrier()  # a process that fails below would end process 0, which may still be writing
    show(results, args.eval)
    if core_results:
        show_core(core_results)
    if no_bundle:
        unwritten.append(str(no_bundle))
        if len(unwritten) == 1:
            raise no_bundle
    if unwritten:
        raise InputError("; ".join(unwritten))


# ---- earlier results ---------------------------------------------------------------------------------------


def open_run(args) -> tuple[metrics.Run, int]:
    """(the run, without its history, and the step to evaluate)"""
    folder = run_folder("--model-tag", args.model_tag)
    return replace(metrics.load_run(folder), history=[]), step_or_newest(folder, args.step)


def pick_dtype(args, folder: Path, device_type: str):
    return devices.compute_dtype(args.dtype, device_type, run_dtype=metrics.dtype_so_far(folder, device_type))


def missing_parts(args, results: dict) -> list[str]:
    return [part for part in ("bpb", "sample") if part in args.eval and RESULT_KEYS[part] not in results]


def earlier_on_text(args, run: metrics.Run, identity: dict, out: Path) -> tuple[dict, Corpus | None]:
    """(results of an earlier evaluation on this text, the text, or None if no part of them is missing)"""
    settings = {**identity, "text": recorded_text(run), "eval_tokens": args.eval_tokens, "dtype": args.dtype}
    earlier = earlier_results(out, read_eval)
    results = matching_results(settings, earlier)
    if not args.data and not missing_parts(args, results):
        return results, None
    corpus = open_run_text(run, args.data)
    note = note_on_text(run, corpus)
    if note:
        print0(f"{note}: its perplexity does not compare with the run's own")
        results = matching_results({**settings, "text": fingerprints(corpus)}, earlier)
    return results | {"data": corpus.place, "text_of_the_run": not note}, corpus


def earlier_core(args, world, identity: dict, out: Path) -> tuple[Bundle | None, dict, Unavailable | None]:
    """(CORE's bundle, results of an earlier evaluation on it, None); without a bundle (None, {}, why)."""
    if "core" not in args.eval:
        return None, {}, None
    try:
        bundle = open_bundle(args.core_dir)
    except Unavailable as e:  # raised at the end: the other parts are evaluated first
        return None, {}, e
    confirm(world, {"CORE bundle": bundle.fingerprint}, "give all processes the same --core-dir")
    settings = {"bundle": bundle.fingerprint, "max_per_task": args.max_per_task, "dtype": args.dtype}
    earlier = from_first(world, earlier_results, out, read_core)
    return bundle, matching_results(identity | settings, earlier), None


# ---- evaluation --------------------------------------------------------------------------------------------


def evaluate_on_text(missing: list[str], model, tokenizer, corpus, args, world, dtype) -> dict:
    """Losses on training and validation text ("bpb"), and samples of the model on process 0 ("sample")."""
    results = {}
    T = model.config.sequence_len
    for split in ("train", "val") if "bpb" in missing else ("val",):
        rows = Rows(corpus.split(split), tokenizer, T)
        confirm_caches(world, tokenizer, corpus.split(split))
        eval_set = EvalSet(rows, args.eval_tokens // T, tokenizer)
        if not eval_set.count:
            raise InputError(f"--data or --eval-tokens: less than one row of {T} {split} tokens")
        if "bpb" in missing:
            values = evaluate(model, eval_set, args.device_batch_size, world, dtype)
            for key, value in values.items():
                results[f"{split}/{key.split('/')[1]}"] = value
            results[f"{split}/tokens"] = eval_set.tokens
    if "sample" in missing and world.rank == 0:
        results["sample"] = sample_texts(model, tokenizer, rows, dtype)
    return results


def store(path: Path, results: dict, rank: int) -> list[str]:
    """Write the results, on process 0. An error is returned, so that the results are shown before it."""
    if rank > 0:
        return []
    try:
        write_atomic(path, json.dumps(results, indent=2) + "\n")
    except OSError as e:
        return [f"{path}: cannot be written ({e.strerror}); the results are shown above and stored nowhere"]
    return []


# ---- printing ----------------------------------------------------------------------------------------------


def show(results: dict, parts: list[str]):
    print0(f"{results['settings']['model_tag']}, step {results['settings']['step']}")
    if "bpb" in parts:
        for split in ("train", "val"):
            print0(
                f"{split:5} | {results[f'{split}/tokens']:,} tokens | loss {results[f'{split}/loss']:.4f} | "
                f"ppl {results[f'{split}/ppl']:.3f} | bpb {results[f'{split}/bpb']:.4f}"
            )
    if "sample" in parts:
        print0("\n".join(f"sample: {text!r}" for text in results.get("sample", ())))


def show_core(results: dict):
    print0(f"{'CORE task':36}{'examples':>9}{'accuracy':>10}{'centered':>10}   95% interval")
    for label, task in results["tasks"].items():
        low, high = task["centered_interval"]
        values = f"{task['examples']:9,}{task['accuracy']:10.4f}{task['centered']:10.4f}"
        print0(f"{label:36}{values}   {low:.4f} to {high:.4f}")
    examples = sum(task["examples"] for task in results["tasks"].values())
    low, high = results["core_metric_interval"]
    print0(f"{'CORE':36}{examples:9,}{'':10}{results['core_metric']:10.4f}   {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    common.run_script(main)
