"""Validation: mean loss, perplexity and bits per byte over a fixed list of rows; text samples."""

import math

import numpy as np
import torch
import torch.distributed as dist

from nanochat.common import InputError
from nanochat.dataloader import Rows, batch_of
from nanochat.engine import generate
from nanochat.run_text import open_run_text, recorded_text
from nanochat.signals import NEVER, StopRequest


@torch.no_grad()
def evaluate(
    model,
    rows: Rows,
    count: int,
    token_bytes,
    device_batch_size: int,
    device,
    dtype,
    rank: int = 0,
    world_size: int = 1,
    stop: StopRequest = NEVER,
) -> dict | None:
    """Loss over rows 0 … count-1, shared out over the processes; the same rows whatever their number or the
    batch size. None if a process was asked to stop before it was through.

    token_bytes: (vocab,) bytes of text an id stands for, 0 for special tokens.
    Returns val/loss: mean nats per token, BOS included; val/ppl = exp of it; val/bpb: bits per byte of text, the nats of
    all ordinary tokens over ln 2 and their bytes, which does not depend on the vocabulary.
    """
    mine = range(rank, count, world_size)
    token_bytes = torch.as_tensor(token_bytes, device=device)
    # nats, tokens, nats of ordinary tokens, bytes; processes that broke off
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for i in range(0, len(mine), device_batch_size):
        if stop.is_set():
            sums[4] = 1
            break
        inputs, targets = batch_of([rows.row(j) for j in mine[i : i + device_batch_size]], device)
        nats = model.token_losses(inputs, targets, dtype).double()  # (B, T)
        n_bytes = token_bytes[targets]
        sums[:4] += torch.stack(
            [
                nats.sum(),
                torch.tensor(nats.numel(), device=device, dtype=torch.float64),
                nats[n_bytes > 0].sum(),
                n_bytes.sum().double(),
            ]
        )
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
    train_rows: Rows, val_rows: Rows, count: int, vocab_size: int, most: int = 2**22
) -> dict[str, float]:
    """What models that read nothing reach on validation rows 0 … count-1, in nats a token: `uniform` guesses every token alike, `unigram` by
    how often it occurs in the training text (the first `most` tokens; one more of each, so that none is impossible).
    """
    rows = min(train_rows.count, most // train_rows.T)
    seen = (
        np.bincount(np.concatenate([train_rows.row(i)[1:] for i in range(rows)]), minlength=vocab_size) + 1.0
    )
    asked = np.bincount(np.concatenate([val_rows.row(i)[1:] for i in range(count)]), minlength=vocab_size)
    return {
        "uniform": math.log(vocab_size),
        "unigram": float(-(asked * np.log(seen / seen.sum())).sum() / asked.sum()),
    }


def sample_texts(model, tokenizer, val_rows: Rows, dtype, stop: StopRequest = NEVER) -> list[str] | None:
    """48 tokens after the first 16 of each of the first two validation rows. None if this process was asked
    to stop before they were all there.
    """
    texts = []
    for i in range(min(2, val_rows.count)):
        prompt = val_rows.row(i)[:16].tolist()
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
) -> tuple[Rows, int]:
    """The rows that the run was evaluated on, and how many. data: where the text is, if not where the run
    read it. optional: the caller can do without, by --eval-tokens 0.
    """
    corpus = open_run_text(run, data)
    if (now := corpus.fingerprint("val")) != (then := recorded_text(run)["val"]):
        without = ", or --eval-tokens 0" if optional else ""
        raise InputError(
            f"--data {corpus.place}: the validation text is no longer the one of the run "
            f"({then} then, {now} now); give the folder of that text{without}"
        )
    rows = Rows(corpus.val, tokenizer, T)
    if not (count := min(rows.count, eval_tokens // T)):
        raise InputError(
            f"--eval-tokens {eval_tokens}: less than one row of {T} tokens; give more{', or 0 for none' * optional}"
        )
    return rows, count
