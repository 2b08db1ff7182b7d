"""Byte-pair encoding: rustbpe trains it, tiktoken encodes with it, one JSON file stores it with its hash."""

import base64
import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import tiktoken

from nanochat import signals
from nanochat.common import get_base_dir
from nanochat.errors import InputError, first_line
from nanochat.files import Schema, read_json, write_atomic

BOS = "<|bos|>"
SPECIAL_TOKENS = (BOS,)  # they take the last ids of the vocabulary
# The form of GPT-4's pattern (OpenAI, tiktoken's cl100k_base). Numbers are split into parts of two digits: a
# small vocabulary has no place for longer ones.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # the ends of "it's", "we'll", …
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # a word with its leading space
    r"|\p{N}{1,2}"  # one or two digits
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # punctuation
    r"|\s*[\r\n]|\s+(?!\S)|\s+"  # ends of lines and other white space
)

# Longer texts are encoded in pieces: on a million blanks in a row tiktoken's regular expression panics.
PIECE_CHARS = 2**17
# Places where the pattern begins a new match, whatever the rest of the text is: before a blank that follows
# another character; after the end of a line, before another character; after a letter, before an ASCII
# character or East Asian punctuation mark that is no letter. LETTERS holds only such letters as are letters
# in every version of Unicode.
LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
NO_LETTERS = r"\x00-@\[-`{-\x7f\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
BREAK = re.compile(rf"(?<=\S)(?= )|(?<=\n)(?=\S)|(?<=[{LETTERS}])(?=[{NO_LETTERS}])")

STORED = Schema(
    "tokenizer",
    {"pattern": str, "tokens": list, "trained_on": dict, "hash": str},
    {"vocab_size": int, "special_tokens": list},
)
LARGEST_FILE = 2**30  # bytes of a tokenizer.json: several times the size of 2**24 tokens


def tokenizer_path(tag: str = "") -> Path:
    """The file of the tokenizer of this name; '' = the default one."""
    return get_base_dir() / "tokenizer" / tag / "tokenizer.json"


def pieces(text: str) -> list[str]:
    """The text in pieces of at most PIECE_CHARS characters. Together they have the same tokens as the text.

    A piece ends at the first BREAK after PIECE_CHARS / 2 characters. If there is none, within a word or
    blanks of more than PIECE_CHARS / 2 characters, it ends after PIECE_CHARS, and tokens may differ there.
    """
    parts = []
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        limit = begin + PIECE_CHARS
        place = BREAK.search(text, begin + PIECE_CHARS // 2, limit)
        end = place.start() if place else limit
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


class EncodingError(InputError):
    """A tokenizer library failed on a text. The caller adds where the text is."""


@contextlib.contextmanager
def encoding_errors(problem: str):
    """EncodingError for any failure of a tokenizer library. Their panics are BaseExceptions."""
    try:
        yield
    except (InputError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise EncodingError(f"{problem} ({type(e).__name__}: {first_line(e)})") from None


def hashed_content(pattern: str, tokens: list[bytes]) -> dict:
    """The entries of a tokenizer.json that decide which tokens a text has. The hash is over them."""
    encoded = [base64.b64encode(token).decode() for token in tokens]
    return {"pattern": pattern, "special_tokens": list(SPECIAL_TOKENS), "tokens": encoded}


def content_hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Tokenizer:
    """A trained vocabulary.

    tokens: the byte string of each ordinary token, in order of id; special tokens follow.
    trained_on: where it came from (corpus, fingerprint, …); not part of the hash.
    """

    def __init__(self, pattern: str, tokens: list[bytes], trained_on: dict):
        self.pattern = pattern
        self.tokens = tokens
        self.trained_on = trained_on
        self.special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "nanochat-lowrank",
            pat_str=pattern,
            special_tokens=self.special,
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
        )
        self.vocab_size = len(tokens) + len(self.special)
        self.bos_id = self.special[BOS]
        self.hash = content_hash(hashed_content(pattern, tokens))

    def encode_batch(self, texts: list[str], threads: int = 8) -> list[list[int]]:
        """Token ids of each text, without BOS. A special token written in a text is ordinary text."""
        parts = [pieces(text) for text in texts]
        with encoding_errors("the text cannot be encoded"):
            encoded = iter(self.encoding.encode_ordinary_batch(list(chain(*parts)), num_threads=threads))
        return [list(chain.from_iterable(islice(encoded, len(part)))) for part in parts]

    def encode(self, text: str) -> list[int]:
        with encoding_errors("the text cannot be encoded"):
            return list(chain(*map(self.encoding.encode_ordinary, pieces(text))))

    def encode_to_array(self, text: str) -> np.ndarray:
        """The same tokens as an array of uint32, in less time. The text must be valid: no half surrogates."""
        with encoding_errors("the text cannot be encoded"):
            parts = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: the number of bytes of each token; 0 for special tokens."""
        return np.array([len(t) for t in self.tokens] + [0] * len(self.special), dtype=np.int64)

    def save(self, path: Path):
        content = {
            "format": 1,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "trained_on": self.trained_on,
            **hashed_content(self.pattern, self.tokens),
        }
        write_atomic(path, json.dumps(content, indent=0) + "\n")


def note_on_tokenizer(tokenizer: Tokenizer, corpus) -> str:
    """A line for the user if the tokenizer was trained on another text; '' if it was trained on this one."""
    trained_on = tokenizer.trained_on
    if trained_on.get("fingerprint") == corpus.fingerprint("train"):
        return ""
    name = trained_on.get("corpus", "an unknown text")
    if name == corpus.name:
        return f"tokenizer: trained on other files of {name} than are trained on now"
    return (
        f"tokenizer: trained on {name}, this text is {corpus.name}: "
        "it takes more tokens than one trained on this text"
    )


def load_tokenizer(path: Path | None = None) -> Tokenizer:
    """Read a tokenizer.json. Default: the one of scripts.tok_train. InputError if missing or damaged."""
    path = path or tokenizer_path()
    tag = path.parent.name
    tag_flag = f" --tokenizer-tag {shlex.quote(tag)}" if path == tokenizer_path(tag) else ""
    if not path.is_file():
        raise InputError(
            f"{path}: no tokenizer here yet; train one with: "
            f"python -m scripts.tok_train --data NAME{tag_flag}"
        )
    remedy = f"train it again with: python -m scripts.tok_train{tag_flag}"
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{path}: damaged (more than {LARGEST_FILE:,} bytes); {remedy}")
    stored = read_json(path, replace(STORED, remedy=remedy))
    try:
        return tokenizer_from(stored)
    except ValueError as e:
        raise InputError(f"{path}: damaged ({e}); {remedy}") from None
    except EncodingError as e:
        raise InputError(f"{path}: {e}; {remedy}") from None


def tokenizer_from(stored: dict) -> Tokenizer:
    """The tokenizer in a tokenizer.json's content. ValueError says what is wrong with the content."""
    try:
        tokens = [base64.b64decode(token, validate=True) for token in stored["tokens"]]
    except (ValueError, TypeError):
        raise ValueError("a token that is no base64") from None
    content = hashed_content(stored["pattern"], tokens)
    if content_hash(content) != stored["hash"]:
        raise ValueError("its content does not match its hash")
    vocab_size = len(tokens) + len(SPECIAL_TOKENS)
    if stored.get("vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"vocab_size is {stored['vocab_size']}, and there are {vocab_size} tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError("two tokens are the same")
    if missing := {bytes([i]) for i in range(256)} - set(tokens):
        raise ValueError(f"no token for {len(missing)} of the 256 bytes")
    if b"" in tokens:
        raise ValueError("a token without bytes")
    with encoding_errors("its pattern or tokens cannot be used"):
        return Tokenizer(stored["pattern"], tokens, stored["trained_on"])


def train_tokenizer(texts: Iterator[str], vocab_size: int, trained_on: dict) -> Tokenizer:
    """Train a BPE vocabulary of exactly vocab_size ids, special tokens included.

    InputError if the text is too small for it.
    """
    import rustbpe

    trainer = rustbpe.Tokenizer()
    parts = chain.from_iterable(map(pieces, texts))
    with encoding_errors("the tokenizer cannot be trained on this text"), signals.default_handlers():
        trainer.train_from_iterator(parts, vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokenizer = Tokenizer(PATTERN, [bytes(token) for token, _ in ranks], trained_on)
    if tokenizer.vocab_size != vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size}: the text only yields {tokenizer.vocab_size} tokens; "
            f"give more text or at most --vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer
