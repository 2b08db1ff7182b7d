"""Measure how well a tokenizer compresses text: bytes per token, beside those of GPT-2's encoding.

python -m scripts.tok_eval --data stdlib
"""

import os
from pathlib import Path

from nanochat.arguments import ArgumentParser, whole_number
from nanochat.common import run_script
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.naming import optional_tag
from nanochat.tokenizer import encoding_errors, load_tokenizer, pieces, tokenizer_path
from scripts.tok_train import cut_documents


def gpt2_encoding():
    """tiktoken's gpt2, if its files are already on this machine, else None: nothing is downloaded."""
    import hashlib
    import tempfile

    import tiktoken

    # the folder where tiktoken keeps a download, under the SHA-1 of its address
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        if not (Path(cache) / hashlib.sha1(address.encode()).hexdigest()).exists():
            return None
    return tiktoken.get_encoding("gpt2")


def main(argv=None):
    parser = ArgumentParser("Print bytes per token of the trained tokenizer.")
    add = parser.add_argument
    add("--data", default="stdlib", help="stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder")
    add("--tokenizer-tag", type=optional_tag, default="", help="name of the tokenizer; '' = the default one")
    add("--max-chars", type=whole_number(1), default=10_000_000, help="characters to read of each split")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(tokenizer_path(args.tokenizer_tag))
    corpus = open_corpus(args.data)
    gpt2 = gpt2_encoding()
    corpus_name = tokenizer.trained_on.get("corpus")
    print(f"tokenizer {tokenizer.hash}: {tokenizer.vocab_size} tokens, trained on {corpus_name}")
    print(f"{'split':8}{'bytes':>14}{'tokens':>14}{'bytes/token':>14}{'gpt2 (50257)':>16}")
    for split in ("train", "val"):
        texts = list(cut_documents(corpus.documents(split), args.max_chars, args.max_chars))
        n_bytes = sum(len(text.encode()) for text in texts)
        if not n_bytes:
            raise InputError(f"--data {args.data}: no {split} text")
        n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        gpt2_ratio = "not on disk"
        if gpt2:
            parts = [part for text in texts for part in pieces(text)]
            with encoding_errors("GPT-2's encoding cannot encode the text"):
                gpt2_tokens = sum(map(len, gpt2.encode_ordinary_batch(parts)))
            gpt2_ratio = f"{n_bytes / gpt2_tokens:.3f}"
        print(f"{split:8}{n_bytes:14,}{n_tokens:14,}{n_bytes / n_tokens:14.3f}{gpt2_ratio:>16}")


if __name__ == "__main__":
    run_script(main)
