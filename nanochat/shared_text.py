"""The text of a run of several processes: process 0 lists it, and all have the same tokens of it."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat import agreement
from nanochat.common import get_base_dir
from nanochat.dataloader import Rows
from nanochat.dataset import Corpus
from nanochat.errors import InputError
from nanochat.files import read_json
from nanochat.loss_eval import EvalSet
from nanochat.processes import World, print0
from nanochat.token_cache import META, verify_caches
from nanochat.token_workers import build_caches
from nanochat.tokenizer import Tokenizer, note_on_tokenizer


@dataclass
class TrainingText:
    """What a run reads: tokenised once, then memory-mapped."""

    corpus: Corpus
    train_rows: Rows
    validation: EvalSet


def open_rows(args, open_text: Callable, tokenizer: Tokenizer, world: World) -> TrainingText:
    """The text that process 0 lists, as rows of tokens that are the same in all processes.

    open_text: () -> Corpus. InputError: too little text, or files or a token cache that differ from those of
    process 0.
    """
    corpus = shared_text(world, open_text)
    args.data = args.data or corpus.place
    print0(corpus.line())
    if line := note_on_tokenizer(tokenizer, corpus):
        print0(line)
    if args.verify:
        shards = [*corpus.train, *corpus.val]
        verify_caches(shards, tokenizer)
        agreement.meet(world)  # nobody maps a cache that another process is building again
        print0(f"token caches: {len(shards):,} read whole and compared with their checksums")
    build_caches(corpus.train + corpus.val, tokenizer)
    train_rows = Rows(corpus.train, tokenizer, args.max_seq_len, args.seed)
    val_rows = Rows(corpus.val, tokenizer, args.max_seq_len)
    for split, rows in (("training", train_rows), ("validation", val_rows)):
        if not rows.count:
            raise InputError(
                f"--data {args.data}: too little {split} text for one row of {args.max_seq_len} tokens; "
                "add text or lower --max-seq-len"
            )
    validation = EvalSet(val_rows, args.eval_tokens // args.max_seq_len, tokenizer)
    if not validation.count:
        raise InputError(
            f"--eval-tokens {args.eval_tokens}: less than one row of --max-seq-len {args.max_seq_len}"
        )
    confirm_caches(world, tokenizer, corpus.train + corpus.val)
    return TrainingText(corpus, train_rows, validation)


def shared_text(world: World, open_text: Callable) -> Corpus:
    """The Corpus that open_text() opens in process 0, in all processes. Only that one hashes its files."""
    corpus = agreement.from_first(world, open_and_hash, open_text)
    return corpus if world.rank == 0 else corpus.announced()


def open_and_hash(open_text: Callable) -> Corpus:
    corpus = open_text()
    for split in ("train", "val"):
        corpus.fingerprint(split)  # each shard keeps its contents
    return corpus


def confirm_caches(world: World, tokenizer: Tokenizer, shards):
    """InputError on a process whose token caches, which are there by now, are not those of process 0."""
    if world.size == 1:
        return
    root = get_base_dir() / "token_cache" / tokenizer.hash
    contents = {shard.fingerprint: cache_content(root / shard.fingerprint) for shard in shards}
    for fingerprint, first in agreement.from_first(world, dict, contents).items():
        cache = contents[fingerprint]
        for key in ("slots", "sha256"):
            if cache[key] and first[key] and cache[key] != first[key]:
                raise InputError(
                    f"{root / fingerprint}: other tokens than process 0 has "
                    f"({key}: {cache[key]}, there {first[key]}); remove that folder, and start again"
                )


def cache_content(folder) -> dict:
    """What meta.json of a token cache says of its content; earlier versions wrote no checksum."""
    meta = read_json(folder / "meta.json", META)
    return {"slots": meta["slots"], "sha256": meta.get("sha256")}
