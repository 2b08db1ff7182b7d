"""Evaluate a trained model: loss, perplexity and bits per byte on training and validation text, samples, and the CORE metric.

    python -m scripts.base_eval --model-tag d4
    python -m scripts.base_eval --model-tag d4 --eval core --max-per-task 200
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag d20 --eval core,bpb,sample
Writes runs/<model-tag>/eval_<step>.json (bpb, sample) and core_<step>.json (core), and prints them. The same evaluation again: only printed.
"""

import json
from argparse import ArgumentTypeError
from dataclasses import replace
from functools import partial

import torch.distributed as dist

from nanochat import common, metrics
from nanochat.agreement import confirm, from_first, load_same
from nanochat.checkpoint_manager import load_model, step_or_newest
from nanochat.common import InputError, print0, quoted, whole_number
from nanochat.core_bundle import Unavailable, open_bundle
from nanochat.core_eval import evaluate_core, questions, with_intervals
from nanochat.dataloader import Rows
from nanochat.dataset import Corpus
from nanochat.eval_results import earlier_results, read_core, read_eval, under
from nanochat.files import write_atomic
from nanochat.loss_eval import evaluate, sample_texts
from nanochat.naming import run_folder, tag
from nanochat.run_files import step_folder
from nanochat.run_text import fingerprints, note_on_text, open_run_text, recorded_text
from nanochat.shared_text import confirm_caches

PARTS = {
    "core": "core_metric",
    "bpb": "val/bpb",
    "sample": "sample",
}  # what --eval may ask for: the key by which its result is known


def parts(text: str) -> list[str]:
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked or set(asked) - set(PARTS):
        raise ArgumentTypeError(f"{quoted(text)}: give one or more of {','.join(PARTS)}")
    return asked


def store(path, results: dict) -> list[str]:
    """Write them; where that fails, what to say of it once they are shown."""
    try:
        write_atomic(path, json.dumps(results, indent=2) + "\n")
        return []
    except OSError as e:
        return [f"{path}: cannot be written ({e.strerror}); the results are shown above and kept nowhere"]


def main(argv=None):
    parser = common.ArgumentParser("Evaluate a trained model.")
    parser.add_argument("--model-tag", type=tag, required=True, help="the run")
    parser.add_argument(
        "--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest"
    )
    parser.add_argument("--eval", type=parts, default="bpb,sample", help="one or more of core,bpb,sample")
    parser.add_argument(
        "--data",
        default="",
        help="text to evaluate on, or where that of the run is now; '' = that of the run",
    )
    parser.add_argument("--eval-tokens", type=whole_number(1), default=2**19, help="tokens of each split")
    parser.add_argument(
        "--core-dir", default="", help="folder of the evaluation bundle of CORE; '' = downloaded once"
    )
    parser.add_argument(
        "--max-per-task",
        type=whole_number(1, off=-1),
        default=-1,
        help="examples asked in each task of CORE; -1 = all",
    )
    parser.add_argument("--device-batch-size", type=whole_number(1), default=32)
    common.device_flags(parser.add_argument, "of the computation; weights are float32")
    args = parser.parse_args(argv)

    # what is asked for, and what of it an earlier evaluation left: process 0 looks, and all go by that
    place = device, rank, world_size = common.init_process(args.device_type)
    confirm(place, {name: value for name, value in vars(args).items() if name not in ("data", "core_dir")})
    folder = metrics.runs_dir() / args.model_tag
    run, step = from_first(place, open_run, args)
    of_model = {"model_tag": args.model_tag, "step": step}
    out, core_out = (folder / f"{name}_{step:06d}.json" for name in ("eval", "core"))
    results, corpus = from_first(place, results_so_far, args, run, of_model, out)
    if corpus and rank > 0:
        corpus = corpus.announced()
    core_results = None
    no_bundle = None
    if "core" in args.eval:
        try:
            bundle = open_bundle(args.core_dir)
            confirm(place, {"CORE bundle": bundle.fingerprint}, "give all processes the same --core-dir")
            settings = {"bundle": bundle.fingerprint, "max_per_task": args.max_per_task, "dtype": args.dtype}
            earlier = from_first(place, earlier_results, core_out, read_core)
            core_results = under(of_model | settings, earlier)
        except Unavailable as e:  # the rest is evaluated all the same
            no_bundle = e
    missing = parts_missing(args, results)
    core_missing = core_results is not None and PARTS["core"] not in core_results

    if missing or core_missing:
        dtype = from_first(place, dtype_of, args, folder, device.type)
        load = partial(load_model, folder, step, device)
        model, tokenizer, _ = load_same(place, load, step_folder(folder, step))
        T = model.config.sequence_len
    if core_missing:  # what does not fit is said before anything is computed
        asked = questions(bundle, tokenizer, T, args.max_per_task, rank, world_size)
    unwritten = []
    if missing:
        results |= on_text(missing, model, tokenizer, corpus, args, place, dtype)
        unwritten += store(out, results) if rank == 0 else []
    if core_missing:
        core_results |= {
            "bundle_sha256": bundle.sha256,
            **with_intervals(evaluate_core(model, bundle, asked, dtype, args.device_batch_size * T)),
        }
        unwritten += store(core_out, core_results) if rank == 0 else []

    if world_size > 1:
        dist.barrier()  # a process that leaves with an error takes rank 0 along, which may still be writing
    show(results, args.eval)
    if core_results:
        show_core(core_results)
    if unwritten:
        raise InputError("; ".join([*unwritten, str(no_bundle)] if no_bundle else unwritten))
    if no_bundle:
        raise no_bundle


def open_run(args) -> tuple[metrics.Run, int]:
    """(the run, without its history, and the step that is evaluated)"""
    folder = run_folder("--model-tag", args.model_tag)
    return replace(metrics.load_run(folder), history=[]), step_or_newest(folder, args.step)


def dtype_of(args, folder, device_type: str):
    return common.compute_dtype(args.dtype, device_type, before=metrics.dtype_so_far(folder, device_type))


def parts_missing(args, results: dict) -> list[str]:
    return [part for part in ("bpb", "sample") if part in args.eval and PARTS[part] not in results]


def results_so_far(args, run: metrics.Run, of_model: dict, out) -> tuple[dict, Corpus | None]:
    """(results of an earlier evaluation on this text, the text or None if no part of it is missing)."""
    settings = {**of_model, "text": recorded_text(run), "eval_tokens": args.eval_tokens, "dtype": args.dtype}
    earlier = earlier_results(out, read_eval)
    results = under(settings, earlier)
    if not parts_missing(args, {} if args.data else results):
        return results, None
    corpus = open_run_text(run, args.data)
    if other := note_on_text(run, corpus):
        print0(f"{other}: its perplexity does not compare with the run's own")
        results = under({**settings, "text": fingerprints(corpus)}, earlier)
    return results | {"data": corpus.place, "text_of_the_run": not other}, corpus


def on_text(missing: list[str], model, tokenizer, corpus, args, place, dtype) -> dict:
    """Losses on training and validation text ("bpb"), and on rank 0 texts of the model's own ("sample")."""
    results = {}
    T = model.config.sequence_len
    for split in ("train", "val") if "bpb" in missing else ("val",):
        rows = Rows(corpus.split(split), tokenizer, T)
        confirm_caches(place, tokenizer, corpus.split(split))
        count = min(rows.count, args.eval_tokens // T)
        if not count:
            raise InputError(f"--data or --eval-tokens: less than one row of {T} {split} tokens")
        if "bpb" in missing:
            values = evaluate(
                model,
                rows,
                count,
                tokenizer.token_bytes(),
                args.device_batch_size,
                place[0],
                dtype,
                *place[1:],
            )
            results |= {f"{split}/{key.split('/')[1]}": value for key, value in values.items()} | {
                f"{split}/tokens": count * T
            }
    if "sample" in missing and place[1] == 0:
        results["sample"] = sample_texts(model, tokenizer, rows, dtype)
    return results


def show(results: dict, asked: list[str]):
    print0(f"{results['settings']['model_tag']}, step {results['settings']['step']}")
    if "bpb" in asked:
        for split in ("train", "val"):
            print0(
                f"{split:5} | {results[f'{split}/tokens']:,} tokens | loss {results[f'{split}/loss']:.4f} | "
                f"ppl {results[f'{split}/ppl']:.3f} | bpb {results[f'{split}/bpb']:.4f}"
            )
    if "sample" in asked:
        print0("\n".join(f"sample: {text!r}" for text in results.get("sample", ())))


def show_core(results: dict):
    print0(f"{'CORE task':36}{'examples':>9}{'accuracy':>10}{'centered':>10}   95% interval")
    for label, task in results["tasks"].items():
        low, high = task["centered_interval"]
        print0(
            f"{label:36}{task['examples']:9,}{task['accuracy']:10.4f}{task['centered']:10.4f}   {low:.4f} to {high:.4f}"
        )
    low, high = results["core_metric_interval"]
    print0(
        f"{'CORE':36}{sum(t['examples'] for t in results['tasks'].values()):9,}{'':10}{results['core_metric']:10.4f}   {low:.4f} to {high:.4f}"
    )


if __name__ == "__main__":
    common.run_script(main)
