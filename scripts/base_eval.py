"""Evaluate a trained model: loss, perplexity and bits per byte on training and validation text, and samples.

    python -m scripts.base_eval --model-tag d4
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval --model-tag d20
Writes runs/<model-tag>/eval_<step>.json and prints it. The same evaluation again: only printed.
"""
import json

import torch

from nanochat import common, metrics
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.common import InputError, print0, whole_number, write_atomic
from nanochat.dataloader import Rows
from nanochat.dataset import open_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate, sample_texts
from nanochat.tokenizer import load_tokenizer


def load_model(folder, step: int, device):
    """(model, meta) of a run's checkpoint."""
    state, meta = load_checkpoint(folder, step, device)
    with torch.device(device):
        model = GPT(GPTConfig(**meta["model"]))
    model.load_state_dict(state["model"])
    return model, meta


def main(argv=None):
    parser = common.ArgumentParser("Evaluate a trained model.")
    parser.add_argument("--model-tag", required=True, help="the run")
    parser.add_argument("--step", type=whole_number(-1), default=-1, help="checkpoint; -1 = the newest")
    parser.add_argument("--data", default="", help="text to evaluate on; '' = what the run was trained on")
    parser.add_argument("--eval-tokens", type=whole_number(1), default=2**19, help="tokens of each split")
    parser.add_argument("--device-batch-size", type=whole_number(1), default=32)
    parser.add_argument("--device-type", choices=["", "cuda", "cpu"], default="")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = parser.parse_args(argv)

    folder = metrics.runs_dir() / args.model_tag
    run = metrics.load_run(folder)
    if not saved_steps(folder):
        raise InputError(f"--model-tag {args.model_tag}: no checkpoint in {folder}")
    settings = {"model_tag": args.model_tag, "step": args.step if args.step >= 0 else saved_steps(folder)[-1],
                "data": args.data or run.config["flags"]["data"], "eval_tokens": args.eval_tokens, "dtype": args.dtype}
    out = folder / f"eval_{settings['step']:06d}.json"
    if out.exists() and (done := metrics.read_json(out)).get("settings") == settings:
        return show(done)
    corpus = open_corpus(args.data or run.config["flags"]["data"])
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    device, rank, world_size = common.init_process(args.device_type)
    dtype = common.compute_dtype(args.dtype, device.type)
    model, meta = load_model(folder, settings["step"], device)
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise InputError(f"{folder}: the checkpoint was trained with tokenizer {meta['tokenizer_hash']}, tokenizer.json is {tokenizer.hash}")

    T = model.config.sequence_len
    results = {"settings": settings}
    for split in ("train", "val"):
        rows = Rows(corpus.split(split), tokenizer, T)
        count = min(rows.count, args.eval_tokens // T)
        if not count:
            raise InputError(f"--data or --eval-tokens: less than one row of {T} {split} tokens")
        values = evaluate(model, rows, count, tokenizer.token_bytes(), args.device_batch_size, device, dtype, rank, world_size)
        results |= {f"{split}/{key.split('/')[1]}": value for key, value in values.items()} | {f"{split}/tokens": count * T}
    if rank == 0:
        results["sample"] = sample_texts(model, tokenizer, rows, dtype)
        write_atomic(out, json.dumps(results, indent=2) + "\n")
    show(results)


def show(results: dict):
    print0(f"{results['settings']['model_tag']}, step {results['settings']['step']}")
    for split in ("train", "val"):
        print0(f"{split:5} | {results[f'{split}/tokens']:,} tokens | loss {results[f'{split}/loss']:.4f} | "
               f"ppl {results[f'{split}/ppl']:.3f} | bpb {results[f'{split}/bpb']:.4f}")
    print0("\n".join(f"sample: {text!r}" for text in results.get("sample", ())))


if __name__ == "__main__":
    common.run_script(main)
