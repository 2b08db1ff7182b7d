"""Validation: mean loss, perplexity and bits per byte over a fixed list of rows; text samples."""

import math

import numpy as np
import torch
import torch.distributed as dist

from nanochat.dataloader import Rows, make_batch
from nanochat.engine import generate
from nanochat.errors import InputError
from nanochat.processes import World
from nanochat.run_text import open_run_text, recorded_text
from nanochat.signals import NEVER, StopRequest


class EvalSet:
    """The rows of a validation text on which a model is evaluated, always the same ones."""

    def __init__(self, rows: Rows, limit: int, tokenizer):
        """The first `limit` rows, or all where there are fewer."""
        self.rows = rows
        self.count = min(rows.count, limit)
        self.token_bytes = tokenizer.token_bytes()  # (vocab,) bytes of text of an id; of special tokens 0

    @property
    def tokens(self) -> int:
        return self.count * self.rows.T


@torch.no_grad()
def evaluate(
    model, eval_set: EvalSet, device_batch_size: int, world: World, dtype, stop: StopRequest = NEVER
) -> dict | None:
    """Loss over an EvalSet, whose rows are divided among the processes. None if one was asked to stop.

    val/loss   mean nats per token, BOS included
    val/ppl    perplexity: exp(val/loss)
    val/bpb    bits per byte of text: the nats of all ordinary tokens, divided by ln 2 and by their bytes. It
               does not depend on the vocabulary.
    """
    device = world.device
    own_rows = range(world.rank, eval_set.count, world.size)
    token_bytes = torch.as_tensor(eval_set.token_bytes, device=device)
    # nats, tokens, nats of ordinary tokens, bytes; processes that broke off
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for start in range(0, len(own_rows), device_batch_size):
        if stop.is_set():
            sums[4] = 1
            break
        batch = own_rows[start : start + device_batch_size]
        inputs, targets = make_batch([eval_set.rows.row(i) for i in batch], device)
        nats = model.token_losses(inputs, targets, dtype).double()  # (B, T)
        n_bytes = token_bytes[targets]
        n_tokens = torch.tensor(nats.numel(), device=device, dtype=torch.float64)
        sums[:4] += torch.stack([nats.sum(), n_tokens, nats[n_bytes > 0].sum(), n_bytes.sum().double()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, tokens, text_nats, text_bytes, broken_off = sums.tolist()
    if broken_off:
        return None
    loss = nats / tokens
    return {
        "val/loss": loss,
        "val/ppl": math.exp(min(loss, 700.0)),
        "val/bpb": text_nats / math.log(2) / max(1.0, text_bytes),
    }


def reference_losses(
    train_rows: Rows, eval_set: EvalSet, vocab_size: int, most_tokens: int = 2**22
) -> dict[str, float]:
    """What models that read nothing reach on an EvalSet, in nats a token.

    `uniform` gives all tokens the same probability. `unigram` gives a token its share of the first
    `most_tokens` of the training text; each is counted once more, so that none is impossible.
    """
    n_rows = min(train_rows.count, most_tokens // train_rows.T)
    train_counts = token_counts(train_rows, n_rows, vocab_size) + 1.0
    val_counts = token_counts(eval_set.rows, eval_set.count, vocab_size)
    nats = -np.log(train_counts / train_counts.sum())
    return {"uniform": math.log(vocab_size), "unigram": float((val_counts * nats).sum() / val_counts.sum())}


def token_counts(rows: Rows, n_rows: int, vocab_size: int) -> np.ndarray:
    """(vocab_size,): how often each token is a target in the first rows."""
    targets = np.concatenate([rows.row(i)[1:] for i in range(n_rows)])
    return np.bincount(targets, minlength=vocab_size)


def sample_texts(model, tokenizer, rows: Rows, dtype, stop: StopRequest = NEVER) -> list[str] | None:
    """48 tokens after the first 16 of each of the first two rows. None if this process was asked to stop."""
    texts = []
    for i in range(min(2, rows.count)):
        prompt = rows.row(i)[:16].tolist()
        continuation = []
        try:
            for (token,) in generate(model, [prompt], 48, dtype=dtype):
                if stop.is_set():
                    return None
                continuation.append(token)
            text = tokenizer.decode(continuation)
        except InputError as e:  # a training that diverged is to be saved all the same
            text = f"({e})"
        texts.append(tokenizer.decode(prompt[1:]) + " ⟶ " + text)
    return texts


def validation_rows(
    run, tokenizer, T: int, eval_tokens: int, data: str = "", optional: bool = False
) -> EvalSet:
    """The rows that the run was evaluated on. T: tokens in a row.

    data: where the text is now, if not where the run read it. optional: --eval-tokens 0 means no evaluation.
    """
    corpus = open_run_text(run, data)
    now = corpus.fingerprint("val")
    then = recorded_text(run)["val"]
    if now != then:
        without = ", or --eval-tokens 0" if optional else ""
        raise InputError(
            f"--data {corpus.place}: the validation text is no longer the one of the run "
            f"({then} then, {now} now); give the folder of that text{without}"
        )
    eval_set = EvalSet(Rows(corpus.val, tokenizer, T), eval_tokens // T, tokenizer)
    if not eval_set.count:
        without = ", or 0 for none" if optional else ""
        raise InputError(f"--eval-tokens {eval_tokens}: less than one row of {T} tokens; give more{without}")
    return eval_set
