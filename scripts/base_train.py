r"""Pretrain a GPT, full rank or low rank.

    python -m scripts.base_train --depth 4 --model-dim 256 --head-dim 64 --data stdlib
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- \
        --depth 20 --attn-rank 0.25 --mlp-rank 0.25

One run is one folder, $NANOCHAT_BASE_DIR/runs/<model-tag>: config.json, metrics.jsonl, summary.json, tokenizer.json and
checkpoints/. Bad flags are reported in one line (exit 2) before any work.
"""

from dataclasses import asdict

import torch

from nanochat import common, metrics, recompute
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import InputError, print0
from nanochat.continuation import inherit, read_record, tag_by_default
from nanochat.gpt import GPT
from nanochat.naming import check_tag, default_tag, shell_command
from nanochat.plan import (
    check_memory,
    parse_flags,
    print_frontier,
    print_plan,
    solve_budget,
    starting_point,
    take_device_batch,
    training_plan,
)
from nanochat.rank import account, predict_peak
from nanochat.subspace import model as subspace
from nanochat.tokenizer import load_tokenizer, tokenizer_path
from nanochat.training import START, Learner, check_resume, run


def tokenizer_file(args):
    """Where this run's tokenizer is. A run that goes on has its own copy: the other may be replaced."""
    copy = metrics.runs_dir() / args.model_tag / "tokenizer.json"
    resumes = args.model_tag and args.resume != "-1"
    return copy if resumes and copy.is_file() else tokenizer_path(args.tokenizer_tag)


def first_weights(args, tokenizer) -> tuple[dict | None, dict]:
    """What a new run begins with, in the form of a checkpoint, (state, meta): with --init-from that one's weights at step 0, else no state."""
    meta = dict(START)
    if args.init_from is None:
        return None, meta
    folder, step = starting_point(args.init_from)
    state, theirs = load_checkpoint(folder, step)
    if "adapter" in theirs:
        raise InputError(
            f"--init-from {args.init_from}: is an adapter; make a plain model of it with "
            f"scripts.materialize {shell_command('--model-tag', folder.name)} --out-tag NEW, "
            "and begin with that"
        )
    if tokenizer and tokenizer.hash != theirs.get("tokenizer_hash"):
        raise InputError(
            f"--init-from {args.init_from}: learned with tokenizer "
            f"{theirs.get('tokenizer_hash')}, {tokenizer_file(args)} is {tokenizer.hash}; "
            f"put {folder / 'tokenizer.json'} in its place"
        )
    if "subspace" in theirs:
        raise InputError(
            f"--init-from {args.init_from}: trained with --subspace, its matrices are made from a seed and not stored; take a run without it"
        )
    return {"model": state["model"]}, meta | {
        "source": {"tag": folder.name, "step": step, "sha256": theirs["sha256"]}
    }


class SubspaceLearner(Learner):
    """The numbers that the matrices are made of, embeddings and head: all the parameters that a model in a subspace has."""

    def meta(self) -> dict:
        return super().meta() | {"subspace": asdict(self.model.subspace.config)}


def main(argv=None):
    args = parse_flags(argv)
    check_resume(args.resume)

    # the vocabulary, the shape, the horizon: all that can be wrong is wrong before anything is touched
    world_size = common.process_layout()[2]
    counting = args.dry_run or args.plan
    file = tokenizer_file(args)
    if counting and not file.exists() and args.vocab_size < 1:
        args.vocab_size = 32768
        print0("no tokenizer yet: counting with --vocab-size 32768")
    tokenizer = None if counting and args.vocab_size > 0 else load_tokenizer(file)
    if tokenizer and args.vocab_size > 0 and args.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"--vocab-size {args.vocab_size}: {file} has {tokenizer.vocab_size}; "
            f"train another with: python -m scripts.tok_train --vocab-size {args.vocab_size} "
            "--tokenizer-tag NAME, and give its --tokenizer-tag"
        )
    vocab_size = tokenizer.vocab_size if tokenizer else args.vocab_size
    device_type = common.pick_device_type(args.device_type)
    dtype = common.compute_dtype(args.dtype, device_type, training=True)
    if args.plan:
        return print_frontier(args, vocab_size, world_size, dtype.itemsize)
    tag = args.model_tag
    if not tag:
        tag = tag_by_default(args, lambda flags: default_tag(flags, solve_budget(flags, vocab_size)))
    inherit(args, read_record(metrics.runs_dir() / tag), tag)
    config = solve_budget(args, vocab_size)
    within = subspace.from_flags(args, config)
    start = first_weights(args, tokenizer)
    plan = training_plan(args, config, world_size)
    take_device_batch(args, plan, world_size)
    accounting = account(config) | predict_peak(
        config, args.device_batch_size, dtype.itemsize, plan["grad_accum_steps"] > 1
    )
    derived = ({"source": start[1]["source"]} if args.init_from else {}) | (
        {"subspace": asdict(within)} if within else {}
    )
    if within:
        accounting = subspace.costs(within, config, accounting)
        subspace.check_memory(within, config, dtype.itemsize, device_type)
    if args.dry_run:
        return print_plan(config, plan | derived, accounting, args)
    if not args.model_tag:
        check_tag("--model-tag is missing, and", tag)
    check_memory(args, accounting, device_type)

    def build(device) -> Learner:
        torch.manual_seed(args.seed)
        with torch.device(device):
            model = GPT(config)
            model.init_weights()
        recompute.apply(model)
        rates = dict(
            embedding_lr=args.embedding_lr,
            unembedding_lr=args.unembedding_lr,
            matrix_lr=plan["matrix_lr"],
            scalar_lr=args.scalar_lr,
            weight_decay=args.weight_decay,
        )
        if not within:
            return Learner(model, rates)
        subspace.attach(model, within)
        return SubspaceLearner(
            model, rates | {"extra": subspace.adamw_settings(within, args.subspace_lr, args.scalar_lr)}
        )

    run(args, tag, config, plan, accounting, tokenizer, start, build, **derived)


if __name__ == "__main__":
    common.run_script(main)
