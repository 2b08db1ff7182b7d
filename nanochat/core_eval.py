"""The CORE metric of DCLM (Li et al., arXiv 2406.11794): how well a model answers short questions, over many tasks.

Three kinds of task, each asked after a few solved examples of the same task:
    multiple_choice    a question and several answers: the answer with the lowest mean loss a token is taken
    schema             several contexts and one continuation: the context that gives the continuation the lowest mean loss is taken
    language_modeling  a context and its continuation: right if the greedy choice is the continuation's token at every place
A task's accuracy a is centred on the accuracy g of guessing, (a - g) / (1 - g): 0 is guessing, 1 is all right. CORE is the mean over tasks.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import InputError
from nanochat.core_bundle import Bundle, Task
from nanochat.engine import prefill
from nanochat.functional import SOFTCAP, rows_at_once, squashed
from nanochat.signals import NEVER, StopRequest

DRAWS = 10_000  # of the bootstrap
MOST_ROWS = 256  # continuations in a batch: their first tokens' logits are held at once


# ---- prompts --------------------------------------------------------------------------------------------------------


def chosen(task: Task, max_per_task: int) -> list[int]:
    """The examples to ask about: all, or a seeded draw of so many; a larger draw contains the smaller."""
    numbers = list(range(len(task.examples)))
    if 0 < max_per_task < len(numbers):
        random.Random(task.label).shuffle(numbers)
        numbers = numbers[:max_per_task]
    return numbers


def shots(task: Task, number: int) -> list[dict]:
    """The solved examples shown before example `number`: drawn from all others of the task, the same ones every time."""
    drawn = random.Random(f"{task.label} {number}").sample(range(len(task.examples) - 1), task.shots)
    return [task.examples[i + (i >= number)] for i in drawn]


def solved(task: Task, example: dict) -> str:
    """An example with its right answer, as it is shown."""
    if task.kind == "multiple_choice":
        return example["query"] + task.delimiter + example["choices"][example["gold"]]
    if task.kind == "schema":
        return example["context_options"][example["gold"]] + task.delimiter + example["continuation"]
    return example["context"].strip() + task.delimiter + example["continuation"]


def prompts(task: Task, number: int) -> list[str]:
    """Solved examples and then example `number`: once with each answer, once with each context, or once without and once with its
    continuation. Without it no space is left at the end, which would be the first character of the continuation's first token.
    """
    example = task.examples[number]
    before = "".join(solved(task, shot) + "\n\n" for shot in shots(task, number))
    if task.kind == "multiple_choice":
        return [
            before + solved(task, {**example, "choices": [choice], "gold": 0})
            for choice in example["choices"]
        ]
    if task.kind == "schema":
        return [before + solved(task, {**example, "gold": i}) for i in range(len(example["context_options"]))]
    return [(before + solved(task, {**example, "continuation": ""})).rstrip(), before + solved(task, example)]


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """An example as tokens: rows of a prompt and its continuations, int32."""

    number: int
    gold: int | None  # which of all continuations is right; None: the only one, if it is the greedy choice
    rows: list[tuple[np.ndarray, list[np.ndarray]]]


def common_length(sequences: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    low, high = (
        min(sequences),
        max(sequences),
    )  # in lexical order: all others lie between and begin with what these two share
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def question(task: Task, number: int, tokenizer, context: int) -> Question:
    """Prompts that differ from some token on are one prompt up to there; a schema's are told apart from the end.

    Where prompt and continuation exceed the model's context (in tokens), the prompt loses its beginning; with several answers, as much as
    the longest asks for. A continuation is always whole: InputError if it does not fit by itself.
    """
    sequences = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts(task, number))]
    shortest = min(map(len, sequences))
    if task.kind == "schema":
        n = min(max(1, common_length([s[::-1] for s in sequences])), shortest - 1)  # of the continuation
        rows = [(s[:-n], [s[-n:]]) for s in sequences]
    elif task.kind == "multiple_choice":
        n = min(common_length(sequences), shortest - 1)  # of the prompt
        rows = [(sequences[0][:n], [s[n:] for s in sequences])]
    else:
        whole = sequences[1]
        n = min(common_length(sequences), len(whole) - 1)
        rows = [(whole[:n], [whole[n:]])]
    if n < 1:
        raise InputError(f"CORE task {task.label}, example {number + 1}: empty")
    longest = max(len(c) for _, continuations in rows for c in continuations)
    if longest > context:
        raise InputError(
            f"CORE task {task.label}, example {number + 1}: a continuation of {longest} tokens, more than the model's context of "
            f"{context}; leave the task out of core.yaml, or train with a longer --max-seq-len"
        )
    keep = context + 1 - longest  # the last token is predicted only
    return Question(
        number,
        task.examples[number].get("gold"),
        [
            (np.array(prompt[-keep:], np.int32), [np.array(c, np.int32) for c in continuations])
            for prompt, continuations in rows
        ],
    )


def questions(
    bundle: Bundle, tokenizer, context: int, max_per_task: int, rank: int = 0, world_size: int = 1
) -> list[list[Question]]:
    """This process's share of each task's questions."""
    return [
        [
            question(task, number, tokenizer, context)
            for number in chosen(task, max_per_task)[rank::world_size]
        ]
        for task in bundle.tasks
    ]


# ---- scores ---------------------------------------------------------------------------------------------------------


def row_length(row) -> int:
    """Tokens of the prompt and its longest continuation, whose last is predicted only."""
    prompt, continuations = row
    return len(prompt) + max(map(len, continuations)) - 1


def batches(rows: list, tokens: int) -> list[list[int]]:
    """Indices of rows to be read together: as many continuations a row, and of like length, longest first. A batch, each continuation
    with its prompt and its padding, comes to at most so many tokens and MOST_ROWS continuations, or is one row.
    """
    out = []
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i][1]), -row_length(rows[i]))):
        first = rows[out[-1][0]] if out else rows[i]
        n = len(rows[i][1])
        if (
            not out
            or len(first[1]) != n
            or (len(out[-1]) + 1) * n > min(MOST_ROWS, tokens // row_length(first))
        ):
            out.append([])
        out[-1].append(i)
    return out


@torch.inference_mode()
def score_batch(model, rows: list, dtype) -> list[tuple[float, bool]]:
    """(mean loss in nats a token, whether every token is the greedy choice) of each continuation of each row, in order.

    rows: (prompt, continuations), equally many continuations in each. A prompt is read once for all of its continuations, and only
    these, which it predicts, have logits computed.
    """
    continuations = [c for _, of_row in rows for c in of_row]
    each = len(rows[0][1])  # the last token is predicted only
    T = max(map(len, continuations)) - 1
    logits, cache = prefill(
        model, [prompt.tolist() for prompt, _ in rows], max(len(prompt) for prompt, _ in rows) + T, dtype
    )
    cache.repeat(each)
    targets = np.full((len(continuations), 1 + T), -1)  # padded at the end, where no token before it looks
    for row, c in zip(targets, continuations):
        row[: len(c)] = c
    targets = torch.from_numpy(targets).to(logits.device)
    losses = torch.zeros(targets.shape, device=logits.device)
    greedy = torch.ones_like(targets, dtype=torch.bool)
    losses[:, 0], greedy[:, 0] = judged(logits.repeat_interleave(each, dim=0), targets[:, 0])
    if T:
        real = targets[:, 1:] >= 0
        with model.eager():
            x, weight = model.head(targets[:, :-1].clamp(min=0), dtype, cache)
        x, n = x[real.flatten()], rows_at_once(x, weight.size(0))
        parts = [
            judged(SOFTCAP * squashed(part, weight), target)
            for part, target in zip(x.split(n), targets[:, 1:][real].split(n))
        ]
        losses[:, 1:][real], greedy[:, 1:][real] = (torch.cat(values) for values in zip(*parts))
    means = losses.double().sum(1).cpu() / torch.tensor([len(c) for c in continuations])
    return list(zip(means.tolist(), greedy.all(1).tolist()))


def judged(logits, targets):
    """logits: (n, V), targets: (n,) -> (loss in nats, whether it is the greedy choice) of each, (n,)."""
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def score(
    model, rows: list, dtype, tokens: int, stop: StopRequest = NEVER
) -> list[list[tuple[float, bool]]] | None:
    """score_batch's pairs for each of any number of rows, so many `tokens` at a time. None if this process
    was asked to stop before the last.
    """
    out: list[list[tuple[float, bool]]] = [[]] * len(rows)
    for batch in batches(rows, tokens):
        if stop.is_set():
            return None
        pairs = iter(score_batch(model, [rows[i] for i in batch], dtype))
        for i in batch:
            out[i] = [next(pairs) for _ in rows[i][1]]
    return out


def right(asked: Question, pairs: list[tuple[float, bool]]) -> bool:
    """pairs: of all continuations of the question. Of equal losses the first counts."""
    if asked.gold is None:
        return pairs[0][1]
    return min(range(len(pairs)), key=lambda i: pairs[i][0]) == asked.gold


def evaluate_core(
    model, bundle: Bundle, asked: list[list[Question]], dtype, tokens: int, stop: StopRequest = NEVER
) -> dict | None:
    """CORE from `questions`, over all processes. None if one of them was asked to stop before it was through.

    tokens: held in one forward pass, padding included; each answer to a question counts with its prompt.
    Returns core_metric, centered_results {label: centred accuracy}, and tasks {label: accuracy, examples, correct}.
    """
    tasks = {}
    # right and asked questions of each task; in the last row the processes that broke off
    counts = torch.zeros(len(asked) + 1, 2, dtype=torch.float64, device=model.wte.weight.device)
    for i, of_task in enumerate(asked):
        scores = score(model, [row for q in of_task for row in q.rows], dtype, tokens, stop)
        if scores is None:
            counts[-1] = 1
            break
        scored = iter(scores)
        correct = [right(q, [pair for _ in q.rows for pair in next(scored)]) for q in of_task]
        counts[i] = torch.tensor([sum(correct), len(correct)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    if counts[-1].any():
        return None
    for task, (correct, n) in zip(bundle.tasks, counts.tolist()):
        tasks[task.label] = {
            "accuracy": correct / n,
            "baseline": task.baseline,
            "centered": centered(correct / n, task.baseline),
            "correct": int(correct),
            "examples": int(n),
        }
    results = {label: values["centered"] for label, values in tasks.items()}
    return {"core_metric": sum(results.values()) / len(results), "centered_results": results, "tasks": tasks}


def centered(accuracy, baseline: float):
    return (accuracy - baseline) / (1 - baseline)


def with_intervals(results: dict, seed: int = 0) -> dict:
    """evaluate_core's results with 95% bootstrap intervals: of CORE and of each task's centred accuracy.

    Examples are drawn again within their task, with replacement. They are right or wrong, so the number of right ones in such a draw is
    binomial, and that is what is drawn. A task with none or all right has an interval of no width.
    """
    rng = np.random.default_rng(seed)
    draws = {
        label: centered(rng.binomial(t["examples"], t["accuracy"], DRAWS) / t["examples"], t["baseline"])
        for label, t in results["tasks"].items()
    }

    def interval(values):
        return np.quantile(values, [0.025, 0.975]).tolist()

    return {
        **results,
        "core_metric_interval": interval(np.mean(list(draws.values()), axis=0)),
        "tasks": {
            label: {**t, "centered_interval": interval(draws[label])} for label, t in results["tasks"].items()
        },
    }
