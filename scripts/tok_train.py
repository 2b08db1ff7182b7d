"""Train the tokenizer: python -m scripts.tok_train --data stdlib --vocab-size 4096

Writes $NANOCHAT_BASE_DIR/tokenizer/tokenizer.json. The same text and vocabulary again: nothing to do.
"""
import time

from nanochat.common import ArgumentParser, InputError, run_script, whole_number
from nanochat.dataset import open_corpus
from nanochat.tokenizer import load_tokenizer, tokenizer_path, train_tokenizer


def capped(documents, doc_cap: int, max_chars: int):
    """Documents cut to doc_cap characters, until max_chars in all."""
    left = max_chars
    for text in documents:
        if left <= 0:
            return
        text = text[:min(doc_cap, left)]
        left -= len(text)
        yield text


def main(argv=None):
    parser = ArgumentParser("Train a byte-pair encoding on the training text.")
    parser.add_argument("--data", default="stdlib", help="stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder")
    parser.add_argument("--vocab-size", type=whole_number(258), default=32768, help="ids in all, the BOS token included")
    parser.add_argument("--max-chars", type=whole_number(1), default=2_000_000_000, help="characters to train on")
    parser.add_argument("--doc-cap", type=whole_number(1), default=10_000, help="characters of each document")
    args = parser.parse_args(argv)

    corpus = open_corpus(args.data)
    source = {"corpus": corpus.name, "fingerprint": corpus.fingerprint("train"), "vocab_size": args.vocab_size,
              "max_chars": args.max_chars, "doc_cap": args.doc_cap}
    if tokenizer_path().exists():
        try:
            present = load_tokenizer()
        except InputError:  # damaged: this run replaces it
            present = None
        if present and present.trained_on == source:
            return print(f"tokenizer: {tokenizer_path()} is already trained on this text ({present.vocab_size} tokens, hash {present.hash})")
    started = time.perf_counter()
    tokenizer = train_tokenizer(capped(corpus.documents("train"), args.doc_cap, args.max_chars), args.vocab_size, source)
    tokenizer.save(tokenizer_path())
    print(f"tokenizer: {tokenizer_path()}, {tokenizer.vocab_size} tokens, hash {tokenizer.hash}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run_script(main)
