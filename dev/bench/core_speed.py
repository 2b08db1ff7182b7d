"""CORE's questions scored many at a time against one by one: the ratio of times, with random tokens.

    python dev/bench/core_speed.py --depth 6 --model-dim 384 --vocab-size 32768

One by one means a forward pass for each question. Its answers are the rows of the batch, and all logits are
computed. Each round runs both ways; the median and the range of the ratio over the rounds are shown. They
also hold on a machine that does other work. The losses have to agree to 1e-5.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # works without an installation

import numpy as np
import torch
import torch.nn.functional as F

from nanochat import common, devices, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.core_eval import score
from nanochat.errors import InputError
from nanochat.flag_types import DEEPEST, LONGEST, WIDEST
from nanochat.gpt import GPT, GPTConfig

KINDS = ("multiple_choice", "schema", "language_modeling")


def question(kind: str, longest: int, vocab_size: int, rng) -> list[tuple]:
    """Rows of (prompt, continuations): one row with four answers, two rows with contexts, or one with a text.

    The prompt has between longest / 2 and `longest` tokens.
    """

    def text(shortest, longest):
        return rng.integers(1, vocab_size, rng.integers(shortest, longest + 1)).astype(np.int32)

    prompt = text(longest // 2, longest)
    if kind == "multiple_choice":
        return [(prompt, [text(1, 8) for _ in range(4)])]
    continuation = text(1, 8)
    if kind == "language_modeling":
        return [(prompt, [continuation])]
    other = prompt.copy()
    other[len(prompt) // 2] = 0
    return [(prompt, [continuation]), (other, [continuation])]


@torch.inference_mode()
def one_by_one(model, questions: list) -> list[float]:
    """Mean loss of every continuation, in nats a token."""
    means = []
    for rows in questions:
        texts = []
        for prompt, continuations in rows:
            texts += [(np.concatenate((prompt, c)), len(c)) for c in continuations]
        idx = torch.zeros(len(texts), max(len(text) for text, _ in texts), dtype=torch.long)
        for row, (text, _) in zip(idx, texts):
            row[: len(text)] = torch.from_numpy(text)
        logits = model(idx)[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, idx[:, 1:].flatten(), reduction="none").view(len(texts), -1)
        for row, (text, n) in zip(losses, texts):
            means.append(row[len(text) - n - 1 : len(text) - 1].mean().item())
    return means


def together(model, questions: list, tokens: int) -> list[float]:
    rows = [row for question_rows in questions for row in question_rows]
    return [loss for pairs in score(model, rows, torch.float32, tokens) for loss, _ in pairs]


def main(argv=None):
    parser = ArgumentParser("Scoring CORE's questions together against one by one, on a CPU in float32.")
    add = parser.add_argument
    add("--depth", type=whole_number(1, DEEPEST), default=6)
    add("--model-dim", type=whole_number(1, WIDEST), default=384, help="a multiple of 64")
    add("--vocab-size", type=whole_number(2, LONGEST), default=32768)
    add("--prompt-tokens", type=whole_number(2, LONGEST), default=200, help="of the longest prompt")
    add("--questions", type=whole_number(1), default=16)
    add("--tokens", type=whole_number(1), default=8192, help="in one pass")
    add("--repeats", type=whole_number(1), default=5, help="rounds")
    args = parser.parse_args(argv)
    if args.model_dim % 64:
        raise InputError(f"--model-dim {args.model_dim}: not a multiple of 64")
    processes.init_process("cpu")
    heads = args.model_dim // 64
    config = GPTConfig(args.prompt_tokens + 8, args.vocab_size, args.depth, heads, heads, args.model_dim)
    model = GPT(config).requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    print(
        f"{devices.device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads; "
        f"{args.depth} layers, width {args.model_dim}, vocabulary {args.vocab_size}; "
        f"{args.questions} questions, prompts of up to {args.prompt_tokens} tokens\n\n"
        f"| kind | one by one / together |\n|---|---:|"
    )
    for kind in KINDS:
        rng = np.random.default_rng(0)
        ratios = []
        questions = [question(kind, args.prompt_tokens, args.vocab_size, rng) for _ in range(args.questions)]
        losses = together(model, questions, args.tokens)
        np.testing.assert_allclose(losses, one_by_one(model, questions), atol=1e-5)
        for _ in range(args.repeats):
            start = time.perf_counter()
            one_by_one(model, questions)
            middle = time.perf_counter()
            together(model, questions, args.tokens)
            ratios.append((middle - start) / (time.perf_counter() - middle))
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"| {kind} | {statistics.median(ratios):.2f} ({spread}) |", flush=True)


if __name__ == "__main__":
    common.run_script(main)
