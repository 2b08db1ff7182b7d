"""The CORE metric of DCLM (Li et al., arXiv 2406.11794): how well a model answers short questions.

There are three kinds of task. Each question comes after a few solved examples of the same task:
    multiple_choice    a question and several answers. The model chooses the answer with the lowest mean loss
                       per token.
    schema             several contexts and one continuation. The model chooses the context that gives the
                       continuation the lowest mean loss per token.
    language_modeling  a context and its continuation. The model is right if every token of the continuation
                       is its greedy choice.
With a task's accuracy a and the accuracy g of guessing, the centred accuracy is (a - g) / (1 - g): 0 is
guessing, 1 is all right. CORE is the mean of the centred accuracies.
"""

import random
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.core_bundle import Bundle, Task
from nanochat.engine import prefill
from nanochat.errors import InputError
from nanochat.ops import logits as head_logits
from nanochat.ops import rows_at_once
from nanochat.signals import NEVER, StopRequest

DRAWS = 10_000  # of the bootstrap
MAX_ROWS = 256  # continuations in one batch: the logits of their first tokens are in memory together


# ---- prompts -----------------------------------------------------------------------------------------------


def select_examples(task: Task, max_per_task: int) -> list[int]:
    """Indices of the examples to ask about: all, or a seeded draw. A larger draw contains the smaller one."""
    indices = list(range(len(task.examples)))
    if 0 < max_per_task < len(indices):
        random.Random(task.label).shuffle(indices)
        indices = indices[:max_per_task]
    return indices


def few_shot_examples(task: Task, index: int) -> list[dict]:
    """The solved examples shown before an example: a draw from all others, the same one every time."""
    rng = random.Random(f"{task.label} {index}")
    draws = rng.sample(range(len(task.examples) - 1), task.shots)
    return [task.examples[i if i < index else i + 1] for i in draws]  # all but the example itself


def solved_text(task: Task, example: dict) -> str:
    """The text of an example with its right answer."""
    if task.kind == "multiple_choice":
        return example["query"] + task.delimiter + example["choices"][example["gold"]]
    if task.kind == "schema":
        return example["context_options"][example["gold"]] + task.delimiter + example["continuation"]
    return example["context"].strip() + task.delimiter + example["continuation"]


def prompts(task: Task, index: int) -> list[str]:
    """The texts that the model reads for the example of this index, each after the solved examples.

    multiple_choice: one text with each answer. schema: one with each context. language_modeling: one without
    the continuation and one with it. The one without ends in no space, because that space is the first
    character of the continuation's first token.
    """
    example = task.examples[index]
    shots_text = "".join(solved_text(task, shot) + "\n\n" for shot in few_shot_examples(task, index))
    if task.kind == "multiple_choice":
        variants = [{**example, "choices": [choice], "gold": 0} for choice in example["choices"]]
    elif task.kind == "schema":
        variants = [{**example, "gold": i} for i in range(len(example["context_options"]))]
    else:
        without = shots_text + solved_text(task, {**example, "continuation": ""})
        return [without.rstrip(), shots_text + solved_text(task, example)]
    return [shots_text + solved_text(task, variant) for variant in variants]


# ---- tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """An example as tokens: rows of a prompt and its continuations, int32."""

    index: int
    gold: int | None  # index of the right one among all continuations; None: the only one, if it is greedy
    rows: list[tuple[np.ndarray, list[np.ndarray]]]


def common_length(sequences: list[list[int]]) -> int:
    """The number of first tokens that all sequences share."""
    # All others lie between these two in lexical order, so they share what these two share.
    low = min(sequences)
    high = max(sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def split_prompts(task: Task, sequences: list[list[int]]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, continuations) of each row, from the tokens of `prompts`.

    The tokens that the sequences share are the prompt; of a schema task they are the continuation, counted
    from the end. Each continuation has at least one token.
    """
    shortest = min(map(len, sequences))
    if task.kind == "schema":
        reverse = [sequence[::-1] for sequence in sequences]
        n = min(max(1, common_length(reverse)), shortest - 1)
        return [(sequence[:-n], [sequence[-n:]]) for sequence in sequences]
    if task.kind == "multiple_choice":
        n = min(common_length(sequences), shortest - 1)
        return [(sequences[0][:n], [sequence[n:] for sequence in sequences])]
    sequence = sequences[1]  # with the continuation
    n = min(common_length(sequences), len(sequence) - 1)
    return [(sequence[:n], [sequence[n:]])]


def tokenize_example(task: Task, index: int, tokenizer, context: int) -> Question:
    """The example of this index as tokens.

    If a prompt and its longest continuation exceed the model's context (in tokens), the prompt loses its
    first tokens. A continuation is never cut: InputError if it does not fit into the context.
    """
    sequences = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts(task, index))]
    rows = split_prompts(task, sequences)
    if not rows[0][0]:
        raise InputError(f"CORE task {task.label}, example {index + 1}: empty")
    longest = max(len(c) for _, continuations in rows for c in continuations)
    if longest > context:
        raise InputError(
            f"CORE task {task.label}, example {index + 1}: a continuation of {longest} tokens, "
            f"more than the model's context of {context}; leave the task out of core.yaml, "
            "or train with a longer --max-seq-len"
        )
    keep = context + 1 - longest  # the model predicts the last token and does not read it
    arrays = []
    for prompt, continuations in rows:
        parts = [np.array(c, np.int32) for c in continuations]
        arrays.append((np.array(prompt[-keep:], np.int32), parts))
    return Question(index, task.examples[index].get("gold"), arrays)


def questions(
    bundle: Bundle, tokenizer, context: int, max_per_task: int, rank: int = 0, world_size: int = 1
) -> list[list[Question]]:
    """The questions of each task that this process asks."""
    shares = []
    for task in bundle.tasks:
        share = select_examples(task, max_per_task)[rank::world_size]
        shares.append([tokenize_example(task, index, tokenizer, context) for index in share])
    return shares


# ---- scores ------------------------------------------------------------------------------------------------


def row_length(row) -> int:
    """Tokens that the model reads of the prompt and its longest continuation: all but the last."""
    prompt, continuations = row
    return len(prompt) + max(map(len, continuations)) - 1


def batches(rows: list, tokens: int) -> list[list[int]]:
    """Indices of the rows that the model reads together, longest rows first.

    The rows of a batch have equally many continuations and similar lengths. A batch has at most so many
    tokens, counting each continuation with its prompt and its padding, and at most MAX_ROWS continuations; or
    it is one row.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i][1]), -row_length(rows[i]))):
        n = len(rows[i][1])
        if groups:
            first = rows[groups[-1][0]]  # the longest row of the batch
            limit = min(MAX_ROWS, tokens // row_length(first))
            if len(first[1]) == n and (len(groups[-1]) + 1) * n <= limit:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


@torch.inference_mode()
def score_batch(model, rows: list, dtype) -> list[tuple[float, bool]]:
    """(mean loss in nats per token, whether every token is the greedy choice) of each continuation, in order.

    rows: (prompt, continuations), with equally many continuations in each. The model reads a prompt once for
    all of its continuations. Logits are computed for the tokens of the continuations only.
    """
    continuations = list(chain.from_iterable(row[1] for row in rows))
    each = len(rows[0][1])
    T = max(map(len, continuations)) - 1  # the model predicts the last token and does not read it
    prompt_ids = [prompt.tolist() for prompt, _ in rows]
    logits, cache = prefill(model, prompt_ids, max(map(len, prompt_ids)) + T, dtype)
    cache.repeat(each)
    targets = np.full((len(continuations), 1 + T), -1)  # padding is at the end, after all real tokens
    for row, c in zip(targets, continuations):
        row[: len(c)] = c
    targets = torch.from_numpy(targets).to(logits.device)
    losses = torch.zeros(targets.shape, device=logits.device)
    greedy = torch.ones_like(targets, dtype=torch.bool)
    losses[:, 0], greedy[:, 0] = token_scores(logits.repeat_interleave(each, dim=0), targets[:, 0])
    if T:
        is_token = targets[:, 1:] >= 0
        inputs = targets[:, :-1].clamp(min=0)
        x, weight = model(inputs, compute_dtype=dtype, cache=cache, head=head_input)
        x = x[is_token]
        n = rows_at_once(x, weight.size(0))
        pairs = zip(x.split(n), targets[:, 1:][is_token].split(n))
        parts = [token_scores(head_logits(part, weight), target) for part, target in pairs]
        losses[:, 1:][is_token], greedy[:, 1:][is_token] = (torch.cat(values) for values in zip(*parts))
    means = losses.double().sum(1).cpu() / torch.tensor([len(c) for c in continuations])
    return list(zip(means.tolist(), greedy.all(1).tolist()))


def head_input(x, weight, targets=None):
    """What the head multiplies: (B, T, C) and (V, C)."""
    return x, weight


def token_scores(logits, targets):
    """logits: (n, V), targets: (n,) -> (loss in nats, whether it is the greedy choice) of each, (n,)."""
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def score(
    model, rows: list, dtype, tokens: int, stop: StopRequest = NEVER
) -> list[list[tuple[float, bool]]] | None:
    """score_batch's pairs for each row, in batches of at most `tokens`.

    None if this process was asked to stop before the last batch.
    """
    scores: list[list[tuple[float, bool]]] = [[]] * len(rows)
    for batch in batches(rows, tokens):
        if stop.is_set():
            return None
        pairs = iter(score_batch(model, [rows[i] for i in batch], dtype))
        for i in batch:
            scores[i] = list(islice(pairs, len(rows[i][1])))
    return scores


def is_correct(question: Question, pairs: list[tuple[float, bool]]) -> bool:
    """pairs: of all continuations of the question. If losses are equal, the first one counts."""
    if question.gold is None:
        return pairs[0][1]
    return min(range(len(pairs)), key=lambda i: pairs[i][0]) == question.gold


def count_correct(task_questions: list[Question], scores: list[list[tuple[float, bool]]]) -> int:
    """scores: of all rows of these questions, in order."""
    rows = iter(scores)
    correct = 0
    for question in task_questions:
        pairs = list(chain.from_iterable(islice(rows, len(question.rows))))
        correct += is_correct(question, pairs)
    return correct


# ---- the metric --------------------------------------------------------------------------------------------


def evaluate_core(
    model, bundle: Bundle, shares: list[list[Question]], dtype, tokens: int, stop: StopRequest = NEVER
) -> dict | None:
    """CORE over all processes. None if one of them was asked to stop before the end.

    shares: this process's part, from `questions`. tokens: the most in one forward pass, padding included;
    each answer to a question counts with its prompt. Returns core_metric, centered_results {label: centred
    accuracy}, and tasks {label: accuracy, baseline, centered, correct, examples}.
    """
    # a row for each task: correct questions, all questions; the last row counts the processes that stopped
    counts = torch.zeros(len(shares) + 1, 2, dtype=torch.float64, device=model.wte.weight.device)
    for i, task_questions in enumerate(shares):
        rows = list(chain.from_iterable(question.rows for question in task_questions))
        scores = score(model, rows, dtype, tokens, stop)
        if scores is None:
            counts[-1] = 1
            break
        counts[i] = torch.tensor([count_correct(task_questions, scores), len(task_questions)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    if counts[-1].any():
        return None
    tasks = {}
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


def interval(values: np.ndarray) -> list[float]:
    """The middle 95% of the values."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def with_intervals(results: dict, seed: int = 0) -> dict:
    """evaluate_core's results with 95% bootstrap intervals of CORE and of each task's centred accuracy.

    The bootstrap draws each task's examples again, with replacement. An example is right or wrong, so the
    number of right ones in a draw is binomial, and that number is drawn here. If all or none of a task's
    examples are right, its interval has no width.
    """
    rng = np.random.default_rng(seed)
    draws = []
    tasks = {}
    for label, task in results["tasks"].items():
        n = task["examples"]
        accuracies = rng.binomial(n, task["accuracy"], DRAWS) / n
        draws.append(centered(accuracies, task["baseline"]))
        tasks[label] = {**task, "centered_interval": interval(draws[-1])}
    return {**results, "core_metric_interval": interval(np.mean(draws, axis=0)), "tasks": tasks}
