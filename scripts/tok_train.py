"""Train the tokenizer: python -m scripts.tok_train --data stdlib --vocab-size 4096

Writes $NANOCHAT_BASE_DIR/tokenizer/tokenizer.json, or with --tokenizer-tag NAME
tokenizer/NAME/tokenizer.json. If that file was trained with the same text and flags, nothing is done.
"""

import time

from nanochat.arguments import ArgumentParser, whole_number
from nanochat.common import locked, run_script
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.files import check_out, remove_temporary
from nanochat.naming import lock_path, optional_tag
from nanochat.tokenizer import EncodingError, load_tokenizer, tokenizer_path, train_tokenizer


def cut_documents(documents, doc_cap: int, max_chars: int):
    """The documents, each cut to doc_cap characters, until they have max_chars characters together."""
    remaining = max_chars
    for text in documents:
        if remaining <= 0:
            return
        text = text[: min(doc_cap, remaining)]
        remaining -= len(text)
        yield text


class Documents:
    """Iterates over the non-empty documents of shards. `place` tells where the last one is."""

    def __init__(self, shards):
        self.shards = shards
        self.place = ""

    def __iter__(self):
        for shard in self.shards:
            for self.place, text in shard.read():
                if text:
                    yield text


def previous_tokenizer(path):
    """The tokenizer in the file; None if there is none or it is damaged."""
    try:
        return load_tokenizer(path)
    except InputError:
        return None


def parse(argv=None):
    parser = ArgumentParser("Train a byte-pair encoding on the training text.")
    add = parser.add_argument
    add("--data", default="stdlib", help="stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder")
    add(
        "--tokenizer-tag",
        type=optional_tag,
        default="",
        help="name of the tokenizer, for base_train; '' = the default one",
    )
    add(
        "--vocab-size",
        type=whole_number(258, 2**31 - 1),
        default=32768,
        help="number of ids, the BOS token included",
    )
    add("--max-chars", type=whole_number(1), default=2_000_000_000, help="characters to train on")
    add("--doc-cap", type=whole_number(1), default=10_000, help="characters to read of each document")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    # if two nodes or tasks start together, one trains the tokenizer and the other finds it
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
        print(
            f"tokenizer: {path} is already trained on this text "
            f"({previous.vocab_size} tokens, hash {previous.hash})"
        )
        return
    check_out("NANOCHAT_BASE_DIR", path, is_file=True)
    remove_temporary(path.parent, path.name)
    print(corpus.line())
    started = time.perf_counter()
    documents = Documents(corpus.train)
    try:
        tokenizer = train_tokenizer(
            cut_documents(documents, args.doc_cap, args.max_chars), args.vocab_size, source
        )
    except EncodingError as e:
        raise InputError(f"{documents.place} or shortly before: {e}") from None
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
