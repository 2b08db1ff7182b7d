"""Text from a model, token by token: what attention has computed for a position is kept and not computed again.

A batch of prompts of unequal lengths is padded on the left, so that all rows write into the same slot of the cache and end in it.
Rotary scores depend on distances only, so a row may begin at any slot: its logits are those it would have by itself, up to rounding.
Shapes as in gpt.py; S: slots of the cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nanochat.attention import window_mask
from nanochat.common import InputError
from nanochat.functional import SOFTCAP, for_rows, squashed
from nanochat.gpt import GPT, GPTConfig

# ---- the cache ------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer for the positions read so far, and the last token's embedding, which the smear needs.

    padding: (B,), the first slot of each row that holds a token; None: all rows begin at slot 0.
    `GPT.hidden` calls `before`, `mask` and, in each layer, `extend` for T new positions, and then adds T to `length`.
    """

    def __init__(self, config: GPTConfig, rows: int, slots: int, dtype, device, padding=None):
        shape = (rows, config.n_kv_head, slots, config.n_embd // config.n_head)
        self.config = config
        self.device = device
        self.length = 0
        self.padding = padding
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in config.positions] for _ in range(2)
        )  # a (B, K, S, D) each
        self.last = torch.zeros(rows, 1, config.n_embd, dtype=dtype, device=device)

    def repeat(self, times: int):
        """Every row `times` times, one after another."""
        self.keys, self.values = (
            [t.repeat_interleave(times, dim=0) for t in tensors] for tensors in (self.keys, self.values)
        )
        self.last = self.last.repeat_interleave(times, dim=0)
        self.padding = None if self.padding is None else self.padding.repeat_interleave(times)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def before(self, x):
        """x: (B, T, C), embeddings -> (B, T, C), of the token before each; zeros before the first."""
        before = torch.cat((self.last, x), dim=1)[:, :-1]
        self.last = x[:, -1:]
        return before if self.padding is None else before * self.real(self.length - 1, x.size(1))[..., None]

    def real(self, start: int, count: int):
        """(B, count) bool: which of the slots from `start` on hold a token, and not padding."""
        return torch.arange(start, start + count, device=self.device) >= self.padding[:, None]

    def first_seen(self, window: int) -> int:
        """The first slot that a query in slot `length` sees; later queries see no earlier one."""
        return max(0, self.length + 1 - window)

    def extend(self, place: int, k, v):
        """k, v: (B, K, T, D), of the new positions, at a place in the stack -> the same of all that they see, (B, K, n, D)."""
        keys = self.keys[place]
        values = self.values[place]
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        start = self.first_seen(self.config.window(self.config.positions[place]))
        n = self.length + T - start
        return keys.narrow(2, start, n), values.narrow(2, start, n)

    def mask(self, window: int, T: int):
        """What the T new queries see of the keys from `extend`: (T, n) or (B, 1, T, n) bool; None: all of them, or all that are not later."""
        start = self.first_seen(window)
        end = self.length + T
        plain = T == 1 or (self.length == 0 and window >= T)
        if self.padding is None:
            return None if plain else window_mask(end - start, window, self.device)[-T:]
        real = self.real(start, end - start)[:, None, None]  # (B, 1, 1, n)
        if T == 1:
            return real
        n = end - start
        itself = torch.eye(n, dtype=torch.bool, device=self.device)[
            -T:
        ]  # padding too must see something, or it would be NaN
        return (window_mask(n, window, self.device)[-T:] & real) | itself


# ---- generation -----------------------------------------------------------------------------------------------------


def next_logits(model: GPT, idx, dtype, cache: KVCache):
    """idx: (B, T), the tokens after those in the cache, which are added to it -> float32 logits (B, V) of the one that follows."""
    with model.eager(), for_rows(idx.numel()):
        x, weight = model.head(idx, dtype, cache)
        return SOFTCAP * squashed(x.unflatten(0, idx.shape)[:, -1], weight)


def prefill(model: GPT, prompts: list[list[int]], slots: int, dtype=torch.float32):
    """Read prompts in one pass, up to `slots` tokens long: (logits (B, V) of the tokens that follow, a cache of so many slots)."""
    device = model.wte.weight.device
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    unequal = any(len(prompt) < longest for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device) if unequal else None
    cache = KVCache(model.config, len(prompts), slots, dtype, device, padding)
    return next_logits(model, idx, dtype, cache), cache


def sample(logits, temperature: float, top_k: int, top_p: float, rng):
    """logits: (B, V) -> (B,) tokens. top_k 0 = all; more than k where several are equally likely to the k-th.

    InputError: logits that are not finite.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = F.softmax(logits, dim=-1)
    if not probabilities.isfinite().all():  # drawing from them would end a GPU's whole process
        raise InputError(
            "the model's logits are not finite numbers: it diverged in training; take an earlier checkpoint"
        )
    if top_p < 1:  # the fewest tokens whose probabilities add up to top_p
        descending, order = probabilities.sort(descending=True)
        beyond = descending.cumsum(dim=-1) - descending >= top_p
        probabilities = probabilities.scatter(1, order, descending.masked_fill(beyond, 0))
    return torch.multinomial(probabilities, 1, generator=rng).squeeze(1)


def what_fits(tokens: list[int], context: int) -> list[int]:
    """All tokens or, where they are more than the context, the first (BOS, as in every row of training) and the last half a context."""
    return tokens if len(tokens) <= context else tokens[:1] + tokens[-(context // 2) :]


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    dtype=torch.float32,
) -> Iterator[list[int | None]]:
    """Yield, up to max_tokens times, the next token of every row; rows are the samples of the first prompt, of the second, ….

    A row ends at a token of `stop`: None in its place and from there on; when all have ended, nothing more is yielded. The samples
    of a prompt share its prefill. temperature 0: the likeliest token. The draws of one seed depend on the number of rows.
    A row that outgrows the context (config.sequence_len) goes on from `what_fits` of it, read anew from position 0, as a prompt that
    is too long is from the start: one more prefill every half context. ValueError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty: begin each with BOS")
    context = model.config.sequence_len
    rows = [what_fits(list(prompt), context) for prompt in prompts]
    slots = min(context, max(map(len, rows)) + max_tokens)
    logits, cache = prefill(model, rows, slots, dtype)
    if samples > 1:
        rows = [list(row) for row in rows for _ in range(samples)]
        logits = logits.repeat_interleave(samples, dim=0)
        cache.repeat(samples)
    rng = torch.Generator(logits.device).manual_seed(seed)
    ended = [False] * len(rows)
    for count in range(1, max_tokens + 1):
        tokens = sample(logits, temperature, top_k, top_p, rng)
        for i, token in enumerate(tokens.tolist()):
            rows[i].append(token)
            ended[i] = ended[i] or token in stop
        if all(ended):
            return
        yield [None if end else row[-1] for row, end in zip(rows, ended)]
        if count == max_tokens:
            return
        if cache.length < context:
            logits = next_logits(model, tokens[:, None], dtype, cache)
        else:
            rows = [what_fits(row, context) for row in rows]
            logits, cache = prefill(model, rows, context, dtype)
