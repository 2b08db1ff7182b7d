"""What a run of base_train reads before it begins: its tokenizer, and the weights of --init-from."""

from pathlib import Path

from nanochat import metrics
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.errors import InputError
from nanochat.naming import shell_command
from nanochat.plan import starting_point
from nanochat.processes import print0
from nanochat.tokenizer import Tokenizer, load_tokenizer, tokenizer_path


def vocabulary(args) -> tuple[Tokenizer | None, int]:
    """The tokenizer and its size. --dry-run and --plan need no tokenizer where --vocab-size is given."""
    only_counts = args.dry_run or args.plan
    file = tokenizer_file(args)
    if only_counts and not file.exists() and args.vocab_size < 1:
        args.vocab_size = 32768
        print0("no tokenizer yet: counting with --vocab-size 32768")
    if only_counts and args.vocab_size > 0:
        return None, args.vocab_size
    tokenizer = load_tokenizer(file)
    if args.vocab_size > 0 and args.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"--vocab-size {args.vocab_size}: {file} has {tokenizer.vocab_size}; "
            f"train another with: python -m scripts.tok_train --vocab-size {args.vocab_size} "
            "--tokenizer-tag NAME, and give its --tokenizer-tag"
        )
    return tokenizer, tokenizer.vocab_size


def tokenizer_file(args) -> Path:
    """Where this run's tokenizer is. A resumed run has its own copy: the other may have been replaced."""
    copy = metrics.runs_dir() / args.model_tag / "tokenizer.json"
    resumes = args.model_tag and args.resume != "-1"
    return copy if resumes and copy.is_file() else tokenizer_path(args.tokenizer_tag)


def first_weights(args, tokenizer: Tokenizer | None) -> tuple[dict | None, dict]:
    """(weights, {"source": which checkpoint they are}) of --init-from; (None, {}) without it."""
    if args.init_from is None:
        return None, {}
    folder, step = starting_point(args.init_from)
    state, meta = load_checkpoint(folder, step)
    if "adapter" in meta:
        raise InputError(
            f"--init-from {args.init_from}: is an adapter; make a plain model of it with "
            f"scripts.materialize {shell_command('--model-tag', folder.name)} --out-tag NEW, "
            "and begin with that"
        )
    if tokenizer and tokenizer.hash != meta.get("tokenizer_hash"):
        raise InputError(
            f"--init-from {args.init_from}: learned with tokenizer "
            f"{meta.get('tokenizer_hash')}, {tokenizer_file(args)} is {tokenizer.hash}; "
            f"put {folder / 'tokenizer.json'} in its place"
        )
    if "subspace" in meta:
        raise InputError(
            f"--init-from {args.init_from}: trained with --subspace, its matrices are made from a seed and "
            "not stored; take a run without it"
        )
    return {"model": state["model"]}, {"source": {"tag": folder.name, "step": step, "sha256": meta["sha256"]}}
