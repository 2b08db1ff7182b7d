"""Byte-pair encoding: trained by rustbpe, run by tiktoken, stored as one JSON file of plain data with a content hash."""
import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.common import InputError, get_base_dir, write_atomic

BOS = "<|bos|>"
SPECIAL_TOKENS = (BOS,)  # they take the last ids of the vocabulary
# Words with their leading space, digits by twos (long numbers would eat a small vocabulary), punctuation, line ends;
# the shape of GPT-4's pattern (OpenAI, tiktoken's cl100k_base).
PATTERN = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""


def tokenizer_path() -> Path:
    return get_base_dir() / "tokenizer" / "tokenizer.json"


class Tokenizer:
    """A trained vocabulary.

    tokens: the byte string of each ordinary token, in order of id; special tokens follow.
    trained_on: where it came from (corpus, fingerprint, …); not part of the hash.
    """

    def __init__(self, pattern: str, tokens: list[bytes], trained_on: dict):
        self.pattern, self.tokens, self.trained_on = pattern, tokens, trained_on
        self.special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("nanochat-lowrank", pat_str=pattern, special_tokens=self.special,
                                          mergeable_ranks={token: i for i, token in enumerate(tokens)})
        self.vocab_size = len(tokens) + len(self.special)
        self.bos_id = self.special[BOS]
        self.hash = hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()[:16]

    def _content(self) -> dict:
        return {"pattern": self.pattern, "special_tokens": list(SPECIAL_TOKENS),
                "tokens": [base64.b64encode(t).decode() for t in self.tokens]}

    def encode_batch(self, texts: list[str], threads: int = 8) -> list[list[int]]:
        """Token ids of each text, without BOS. Text that looks like a special token is ordinary text."""
        return self.encoding.encode_ordinary_batch(texts, num_threads=threads)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text each id stands for; 0 for special tokens."""
        return np.array([len(t) for t in self.tokens] + [0] * len(self.special), dtype=np.int64)

    def save(self, path: Path):
        content = {"format": 1, "hash": self.hash, "vocab_size": self.vocab_size, "trained_on": self.trained_on, **self._content()}
        write_atomic(path, json.dumps(content, indent=0) + "\n")


def load_tokenizer(path: Path | None = None) -> Tokenizer:
    """Read a tokenizer (default: the one scripts.tok_train wrote). InputError if absent, damaged or of another kind."""
    path = path or tokenizer_path()
    if not path.is_file():
        raise InputError(f"{path}: no tokenizer here yet; train one with: python -m scripts.tok_train --data NAME")
    try:
        stored = json.loads(path.read_text("utf-8"))
        tokenizer = Tokenizer(stored["pattern"], [base64.b64decode(t) for t in stored["tokens"]], stored["trained_on"])
        intact = tokenizer.hash == stored["hash"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(f"{path}: damaged (its content does not match its hash); train it again with: python -m scripts.tok_train")
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int, trained_on: dict) -> Tokenizer:
    """Train a BPE vocabulary of exactly vocab_size ids, special tokens included. InputError if the text is too small for it."""
    import rustbpe
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokenizer = Tokenizer(PATTERN, [bytes(token) for token, _ in ranks], trained_on)
    if tokenizer.vocab_size != vocab_size:
        raise InputError(f"--vocab-size {vocab_size}: the text only yields {tokenizer.vocab_size} tokens; "
                         f"give more text or at most --vocab-size {tokenizer.vocab_size}")
    return tokenizer
