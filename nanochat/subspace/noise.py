"""Random numbers that are a function of their place: entry i of the stream (seed, labels).

They are equal to the bit on every device and in every process, and do not depend on how many are drawn at
once. This matters because a model may be stored as the seed of its weights. Integer operations that cannot
overflow 64 bits mix a counter and two 32-bit keys; a float is rounded at most once. torch's random state does
not change.
"""

from functools import lru_cache

import torch

VERSION = "mix32x2-1"  # of the streams below: a checkpoint made with another cannot be restored
MASK = 0xFFFFFFFF
# how many words are mixed at a time: a cache holds them, or they fill a GPU
WORDS = {"cpu": 2**13, "cuda": 2**20}

# the first label of a stream: its purpose
FROZEN, BASIS, SIGNS, PERMUTATION, GAUSSIAN, FACTOR, EMBEDDING = range(7)


def words_at_once(device) -> int:
    return WORDS.get(torch.device(device).type, 2**13)


def mix(x):
    """A bijection of the 32-bit numbers in which every output bit depends on every input bit.

    x: an int below 2^32, or an int64 tensor of such numbers, which is overwritten. TheIronBorn found the
    shifts and multipliers with C. Wellons' hash-prospector (github.com/skeeto/hash-prospector, issue 19).
    Both multipliers are below 2^31, so no product overflows int64.
    """
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= MASK
    x ^= x >> 15
    x *= 0x735A2D97
    x &= MASK
    x ^= x >> 15
    return x


def stream(seed: int, *labels: int) -> tuple[int, int]:
    """The keys of a stream: 64 bits, mixed from a seed below 2^64 and any labels below 2^32."""
    keys = 0x9E3779B9, 0x7F4A7C15
    for label in (seed & MASK, seed >> 32, *labels):
        keys = tuple(mix(key ^ label) for key in keys)
    return keys


def words(keys, counters):
    """The 32-bit numbers, int64, at int64 `counters` of a stream.

    keys: of `stream`, or tensors that broadcast with the counters.
    """
    return mix(mix((counters & MASK) ^ keys[0]) ^ keys[1] ^ (counters >> 32))


def word_range(keys, start: int, end: int, device):
    return words(keys, torch.arange(start, end, device=device))


# ---- signs -------------------------------------------------------------------------------------------------


@lru_cache
def signs_of_bytes(device, dtype):
    """(256, 8): row b holds the bits of b, lowest first, as 1 and -1."""
    with torch.inference_mode(False), torch.no_grad():
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
        return ((bits & 1) * 2 - 1).to(dtype)


def signs(keys, start: int, end: int, device, dtype=torch.float32):
    """Entries start to end of streams of ±1, 32 of them from each word.

    keys: one stream's -> (end - start,), or (count, 1) tensors -> (count, end - start).
    """
    device = torch.device(device)
    numbers = word_range(keys, start // 32, -(-end // 32), device)
    octets = (numbers[..., None] >> torch.arange(0, 32, 8, device=device)) & 255
    entries = signs_of_bytes(device, dtype).index_select(0, octets.flatten()).view(*numbers.shape[:-1], -1)
    return entries[..., start % 32 : start % 32 + end - start]


def sub_streams(keys: tuple[int, int], first: int, end: int, device):
    """The keys, (end - first, 1) each, of sub-streams `first` to `end` of one stream; all differ."""
    k = torch.arange(first, end, device=device)[:, None]
    return tuple(mix(k ^ key) for key in keys)


# ---- other distributions -----------------------------------------------------------------------------------


def draw_in_pieces(n: int, words_each: int, device, draw):
    """(n,) float32 of draw(start, end), in pieces for which `words_at_once` words are drawn."""
    out = torch.empty(n, device=device)
    step = words_at_once(device) // words_each
    for i in range(0, n, step):
        out[i : i + step] = draw(i, min(n, i + step))
    return out


def uniform(keys, n: int, bound: float, device="cpu"):
    """(n,) float32, uniform in (-bound, bound): 24 bits each, symmetric."""

    def draw(start, end):
        odd = (word_range(keys, start, end, device) >> 8) * 2 - (2**24 - 1)  # exact in float32
        return odd.float().mul_(bound / 2**24)

    return draw_in_pieces(n, 1, device, draw)


def gaussian(keys, n: int, device="cpu"):
    """(n,) float32 of mean 0 and variance 1: exact sums of twelve uniform 16-bit numbers.

    The kurtosis is 2.9; that of a Gaussian is 3. Formulas with logarithms and cosines would differ in their
    last bits between devices.
    """

    def draw(start, end):
        six = word_range(keys, 6 * start, 6 * end, device).view(-1, 6)
        return ((six >> 16) + (six & 0xFFFF)).sum(1).sub_(6 * 65535).float().div_(65536)

    return draw_in_pieces(n, 6, device, draw)


def permutation(keys, n: int, device="cpu"):
    """(n,) int64: the order of n words, which all differ below 2^32."""
    return torch.argsort(word_range(keys, 0, n, device), stable=True)
