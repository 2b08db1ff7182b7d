"""Train the tokenizer: python -m scripts.tok_train --data stdlib --vocab-size 4096

Writes $NANOCHAT_BASE_DIR/tokenizer/tokenizer.json, or with --tokenizer-tag NAME
tokenizer/NAME/tokenizer.json. The same text and vocabulary again: nothing to do.
"""

import time

from nanochat.common import ArgumentParser, InputError, locked, run_script, whole_number
from nanochat.dataset import open_corpus
from nanochat.files import check_out, remove_temporary
from nanochat.naming import lock_path, optional_tag
from nanochat.tokenizer import EncodingError, load_tokenizer, tokenizer_path, train_tokenizer


def capped(documents, doc_cap: int, max_chars: int):
    """Documents cut to doc_cap characters, until max_chars in all."""
    left = max_chars
    for text in documents:
        if left <= 0:
            return
        text = text[: min(doc_cap, left)]
        left -= len(text)
        yield text


class Documents:
    """The non-empty documents of some shards. `place` says where the last one is."""

    def __init__(self, shards):
        self.shards = shards
        self.place = ""

    def __iter__(self):
        for shard in self.shards:
            for self.place, text in shard.located():
                if text:
                    yield text


def previous_tokenizer(path):
    """The tokenizer that is there; None if there is none, or a damaged one."""
    try:
        return load_tokenizer(path)
    except InputError:
        return None


def parse(argv=None):
    parser = ArgumentParser("Train a byte-pair encoding on the training text.")
    parser.add_argument(
        "--data", default="stdlib", help="stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder"
    )
    parser.add_argument(
        "--tokenizer-tag",
        type=optional_tag,
        default="",
        help="its name, for base_train; '' = the one that is used where none is named",
    )
    parser.add_argument(
        "--vocab-size",
        type=whole_number(258, 2**31 - 1),
        default=32768,
        help="ids in all, the BOS token included",
    )
    parser.add_argument(
        "--max-chars", type=whole_number(1), default=2_000_000_000, help="characters to train on"
    )
    parser.add_argument("--doc-cap", type=whole_number(1), default=10_000, help="characters of each document")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    # of two nodes, or tasks, one trains it and the other finds it
    with locked(lock_path("tokenizer", "all")):
        train(args)


def train(args):
    path = tokenizer_path(args.tokenizer_tag)
    corpus = open_corpus(args.data)
    source = {
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint("train"),
        "vocab_size": args.vocab_size,
        "max_chars": args.max_chars,
        "doc_cap": args.doc_cap,
    }
    previous = previous_tokenizer(path)
    if previous and previous.trained_on == source:
        return print(
            f"tokenizer: {path} is already trained on this text "
            f"({previous.vocab_size} tokens, hash {previous.hash})"
        )
    check_out("NANOCHAT_BASE_DIR", path, is_file=True)
    remove_temporary(path.parent, path.name)
    print(corpus.line())
    started = time.perf_counter()
    documents = Documents(corpus.train)
    try:
        tokenizer = train_tokenizer(capped(documents, args.doc_cap, args.max_chars), args.vocab_size, source)
    except EncodingError as e:
        raise InputError(f"{documents.place} or shortly before: {e}")
    tokenizer.save(path)
    seconds = time.perf_counter() - started
    line = f"tokenizer: {path}, {tokenizer.vocab_size} tokens, hash {tokenizer.hash}, {seconds:.1f} s"
    if previous and previous.hash != tokenizer.hash:
        text = previous.trained_on.get("corpus")
        line += (
            f"; it replaces one of {previous.vocab_size} tokens trained on {text}, "
            f"hash {previous.hash} (--tokenizer-tag NAME keeps both)"
        )
    print(line)


if __name__ == "__main__":
    run_script(main)
