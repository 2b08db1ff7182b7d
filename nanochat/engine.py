"""Generating text token by token. A cache holds the keys and values of earlier positions.

Prompts of unequal lengths are padded on the left. So all rows write into the same slot of the cache, and all
end in the same slot. Rotary scores depend on distances only, so a row may begin at any slot: its logits are
the ones it would have alone, up to rounding. Shapes as in gpt.py; S: slots of the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanochat.attention import window_mask
from nanochat.cpu import few_rows_by_mkl
from nanochat.decode_graph import Decoder, can_pack
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.ops import logits as head_logits

# ---- the cache ---------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer at the positions read so far, and the last token's embedding.

    The smear needs that embedding.

    slots: at least so many. padding: (B,), the first slot of each row that holds a token; None: all rows
    begin at slot 0. For T new positions `GPT.forward` calls `previous`, `mask` and, in each layer, `extend`.
    Then it adds T to `length`.
    """

    def __init__(self, config: GPTConfig, rows: int, slots: int, dtype, device, padding=None):
        slots = -(-slots // 8) * 8  # matrix units want multiples of 16 bytes
        shape = (rows, config.n_kv_head, slots, config.n_embd // config.n_head)
        self.config = config
        self.device = device
        self.length = 0
        self.padding = padding
        # a tensor (B, K, S, D) for each position in the stack of layers
        # zeros: a masked slot counts nothing, but only if it holds a number
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.positions]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.positions]
        self.last = torch.zeros(rows, 1, config.n_embd, dtype=dtype, device=device)

    def repeat(self, times: int):
        """Repeat every row `times` times. The copies of a row stand side by side."""
        self.keys = [keys.repeat_interleave(times, dim=0) for keys in self.keys]
        self.values = [values.repeat_interleave(times, dim=0) for values in self.values]
        self.last = self.last.repeat_interleave(times, dim=0)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(times)

    def restart(self, padding=None):
        """Forget all positions. The tensors stay where they are: a `Decoder` reads them."""
        self.length = 0
        self.last.zero_()
        if padding is not None and self.padding is not None:
            self.padding.copy_(padding)
        else:
            self.padding = padding

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def previous(self, x):
        """x: (B, T, C), embeddings -> (B, T, C), the one before each; zeros before a row's first."""
        previous = torch.cat((self.last, x), dim=1)[:, :-1]
        self.last.copy_(x[:, -1:])
        if self.padding is None:
            return previous
        return previous * self.is_token(self.length - 1, x.size(1))[..., None]

    def is_token(self, start: int, count: int):
        """(B, count) bool: which of `count` slots from `start` on hold a token; the others are padding."""
        return torch.arange(start, start + count, device=self.device) >= self.padding[:, None]

    def first_visible(self, window: int) -> int:
        """The first slot that a query in slot `length` can see. Later queries see no earlier slot."""
        return max(0, self.length + 1 - window)

    def extend(self, place: int, k, v):
        """Add k, v: (B, K, T, D), of T new positions -> keys and values of all slots they see, (B, K, n, D).

        place: the position in the stack of layers.
        """
        keys = self.keys[place]
        values = self.values[place]
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        start = self.first_visible(self.config.window(self.config.positions[place]))
        n = self.length + T - start
        return keys.narrow(2, start, n), values.narrow(2, start, n)

    def mask(self, window: int, T: int):
        """Which of the n keys from `extend` each of T new queries sees: (T, n) or (B, 1, T, n) bool.

        The window alone where it says that, None where one query sees all keys: neither needs a mask.
        """
        start = self.first_visible(window)
        n = self.length + T - start
        if self.padding is None:
            if self.length == 0:
                return window
            return None if T == 1 else window_mask(n, window, self.device)[-T:]
        tokens = self.is_token(start, n)[:, None, None]  # (B, 1, 1, n)
        if T == 1:
            return tokens
        # Every query sees itself, also in padding: the softmax over no key would be NaN.
        itself = torch.eye(n, dtype=torch.bool, device=self.device)[-T:]
        return (window_mask(n, window, self.device)[-T:] & tokens) | itself


# ---- generation --------------------------------------------------------------------------------------------


def next_logits(model: GPT, idx, dtype, cache: KVCache):
    """idx: (B, T), tokens that follow those in the cache -> float32 logits (B, V) of the token after them.

    Their keys and values are added to the cache.
    """
    with few_rows_by_mkl(idx.numel()):
        return model(idx, compute_dtype=dtype, cache=cache, head=last_logits)


def last_logits(x, weight, targets=None):
    """The head's output (B, V) at the last position."""
    return head_logits(x[:, -1], weight)


def prefill(model: GPT, prompts: list[list[int]], slots: int, dtype=torch.float32, cache=None):
    """Read prompts of at most `slots` tokens in one pass.

    Returns the logits (B, V) of the token after each prompt, and the cache, which has so many slots. cache:
    one of as many rows and slots, to be written over.
    """
    device = model.wte.weight.device
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    idx = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts)], device=device)
    padding = torch.tensor(pads, device=device) if any(pads) else None
    if cache is None:
        cache = KVCache(model.config, len(prompts), slots, dtype, device, padding)
    else:
        cache.restart(padding)
    return next_logits(model, idx, dtype, cache), cache


def token_decoder(model: GPT, cache: KVCache, dtype, graphs: bool = True):
    """A function: one new token for each row, (B,) -> the logits (B, V) of the next ones.

    It is a `Decoder` or, where one cannot serve, `GPT.forward`.
    """
    if can_pack(model, dtype):
        return Decoder(model, cache, dtype, graphs)
    return lambda tokens: next_logits(model, tokens[:, None], dtype, cache)


def sample(logits, temperature: float, top_k: int, top_p: float, rng):
    """logits: (B, V) -> (B,) tokens. top_k 0 = all. Tokens as likely as the k-th are kept too.

    InputError if a logit is not finite.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = F.softmax(logits, dim=-1)
    if not probabilities.isfinite().all():  # on a GPU, multinomial would end the process
        raise InputError(
            "the model's logits are not finite numbers: it diverged in training; take an earlier checkpoint"
        )
    if top_p < 1:  # keep the fewest tokens whose probabilities add up to top_p
        descending, order = probabilities.sort(descending=True)
        beyond = descending.cumsum(dim=-1) - descending >= top_p
        probabilities = probabilities.scatter(1, order, descending.masked_fill(beyond, 0))
    return torch.multinomial(probabilities, 1, generator=rng).squeeze(1)


def crop_to_context(tokens: list[int], context: int) -> list[int]:
    """The tokens, if they fit into the context. If not, the first one and the last context // 2.

    The first one is BOS, with which every row of training begins.
    """
    return tokens if len(tokens) <= context else tokens[:1] + tokens[-(context // 2) :]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `sample`. temperature 0: always the likeliest token."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling(temperature=0)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    stop: tuple[int, ...] = (),
    dtype=torch.float32,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, up to max_tokens times.

    The rows are the samples of the first prompt, then those of the second, and so on. The samples of a prompt
    share its prefill. The draws of one seed depend on the number of rows.

    A row ends at a token of `stop`: None stands in its place and in every later one. Once all rows have
    ended, nothing more is yielded. A row that outgrows the context (config.sequence_len) is cropped by
    `crop_to_context` and read again from position 0. This costs one more prefill for every half context.
    ValueError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty: begin each with BOS")
    context = model.config.sequence_len
    rows = [crop_to_context(list(prompt), context) for prompt in prompts]
    slots = min(context, max(map(len, rows)) + max_tokens)
    logits, cache = prefill(model, rows, slots, dtype)
    if samples > 1:
        rows = [list(row) for row in rows for _ in range(samples)]
        logits = logits.repeat_interleave(samples, dim=0)
        cache.repeat(samples)
    decode = None
    rng = torch.Generator(logits.device).manual_seed(sampling.seed)
    ended = [False] * len(rows)
    for count in range(1, max_tokens + 1):
        tokens = sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, rng)
        for i, token in enumerate(tokens.tolist()):
            rows[i].append(token)
            ended[i] = ended[i] or token in stop
        if all(ended):
            return
        yield [None if end else row[-1] for row, end in zip(rows, ended)]
        if count == max_tokens:
            return
        if cache.length < context:
            decode = decode or token_decoder(model, cache, dtype)
            logits = decode(tokens)
        else:
            rows = [crop_to_context(row, context) for row in rows]
            logits, cache = prefill(model, rows, slots, dtype, cache)
