"""CORE: small tasks of each kind with known answers, scores against a loop in float64, and every refusal."""

import copy
import dataclasses
import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import losses, story

from nanochat import core_bundle, metrics
from nanochat.core_bundle import Unavailable, open_bundle, read_bundle
from nanochat.core_eval import (
    MAX_ROWS,
    batches,
    evaluate_core,
    few_shot_examples,
    prompts,
    questions,
    row_length,
    score,
    select_examples,
    tokenize_example,
    with_intervals,
)
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from scripts import base_eval, report


class Letters:
    """A tokenizer in which every character is a token."""

    bos_id = 128
    vocab_size = 129

    def encode_batch(self, texts):
        return [list(map(ord, text)) for text in texts]


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TASKS = {  # label -> (core.yaml's entry, baseline in percent, examples); "abc…" is what `recite` goes on with
    "choice": (
        {"icl_task_type": "multiple_choice", "num_fewshot": [2], "continuation_delimiter": "\nAnswer: "},
        25,
        [
            {
                "query": f"after {c}?",
                "choices": [f"x{c}", ALPHABET[i : i + 4], f"no {c * 3}", "?"],
                "gold": i % 4,
                "more": 0,
            }
            for i, c in enumerate(ALPHABET[:20])
        ],
    ),
    "contexts": (
        {"icl_task_type": "schema", "num_fewshot": [0]},
        50,
        [
            {"context_options": [f"the {a}", "zz " + a * 2], "continuation": "is here", "gold": i % 2}
            for i, a in enumerate(ALPHABET[:11])
        ],
    ),
    "next": (
        {"icl_task_type": "language_modeling", "num_fewshot": [1], "continuation_delimiter": ""},
        0,
        [
            {"context": f" {ALPHABET[i : i + 3]}", "continuation": ALPHABET[i + 3 : i + 6] if i % 3 else "zq"}
            for i in range(15)
        ],
    ),
}


def write_bundle(folder, tasks=TASKS):
    (folder / "eval_data/some").mkdir(parents=True)
    entries = [
        {"label": label, "dataset_uri": f"some/{label}.jsonl", "has_categories": True, **entry}
        for label, (entry, _, _) in tasks.items()
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\n"
        + "".join(f"{label},commonsense reasoning,{percent}\n" for label, (_, percent, _) in tasks.items())
    )
    for label, (_, _, examples) in tasks.items():
        (folder / f"eval_data/some/{label}.jsonl").write_text(
            "".join(json.dumps(e) + "\n" for e in examples) + "\n"
        )
    return folder


@pytest.fixture
def bundle_dir(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def bundle(bundle_dir):
    return read_bundle(bundle_dir)


def random_model(**shape):
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(
            **{
                "sequence_len": 64,
                "vocab_size": 129,
                "n_layer": 3,
                "n_head": 2,
                "n_kv_head": 1,
                "n_embd": 16,
                "window_pattern": "SL",
                "value_embeddings": True,
            }
            | shape
        )
    )
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def recite():
    """A model without a doubt that b comes after a, c after b, …"""
    model = random_model(n_layer=1, n_embd=64, value_embeddings=False)
    with torch.no_grad():
        model.init_weights()
        model.lm_head.weight.zero_()
        model.lm_head.weight[1:] = model.wte.weight[:-1]
    return model


def core(model, bundle, max_per_task=-1, tokens=512, **layout):
    context = model.config.sequence_len
    return evaluate_core(
        model, bundle, questions(bundle, Letters(), context, max_per_task, **layout), torch.float32, tokens
    )


def reference(model, prompt, continuation):
    """(mean loss, greedy) of one continuation, from the logits of the whole text in float64."""
    logits = model(torch.tensor([[*prompt, *continuation]]), compute_dtype=torch.float64)[0]
    nats = 0.0
    greedy = True
    for i, token in enumerate(continuation, len(prompt) - 1):
        nats -= torch.log_softmax(logits[i], -1)[token].item()
        greedy &= logits[i].argmax().item() == token
    return nats / len(continuation), greedy


# ---- prompts and tokens ------------------------------------------------------------------------------------


def test_prompts_show_solved_examples_and_then_ask(bundle):
    choice, contexts, following = bundle.tasks
    first, second = few_shot_examples(choice, 5)
    assert first != second and choice.examples[5] not in (first, second)
    assert few_shot_examples(choice, 5) == [first, second] != few_shot_examples(choice, 6)
    before = "".join(f"{e['query']}\nAnswer: {e['choices'][e['gold']]}\n\n" for e in (first, second))
    assert prompts(choice, 5) == [f"{before}after f?\nAnswer: {c}" for c in ("xf", "fghi", "no fff", "?")]
    assert prompts(contexts, 1) == ["the b is here", "zz bb is here"]
    (shown,) = few_shot_examples(following, 4)
    before = shown["context"].strip() + shown["continuation"] + "\n\nefg"
    assert prompts(following, 4) == [before, before + "hij"]


def test_few_shot_examples_come_from_the_whole_task_but_the_example_itself(bundle):
    task = dataclasses.replace(bundle.tasks[0], shots=8)
    shown = set()
    for number, example in enumerate(task.examples):
        queries = {shot["query"] for shot in few_shot_examples(task, number)}
        assert example["query"] not in queries
        shown |= queries
    assert shown == {example["query"] for example in task.examples}


def test_fewer_questions_are_the_same_questions(bundle):
    task = bundle.tasks[0]
    assert select_examples(task, -1) == list(range(20)) and select_examples(task, 99) == list(range(20))
    five = select_examples(task, 5)
    assert len(set(five)) == 5 and five == select_examples(task, 9)[:5]
    some, every = (questions(bundle, Letters(), 99, n)[0] for n in (3, -1))
    assert [q.index for q in some] == select_examples(task, 3)
    for q in some:  # after the same solved examples, drawn from all examples of the task
        np.testing.assert_array_equal(q.rows[0][0], every[q.index].rows[0][0])


def text(ids):
    return "".join("<bos>" if i == 128 else chr(i) for i in ids)


def test_prompt_and_continuations_are_told_apart_by_token(bundle):
    choice, contexts, following = bundle.tasks

    def split(task, number):
        rows = tokenize_example(task, number, Letters(), 200).rows
        return [(text(prompt), list(map(text, continuations))) for prompt, continuations in rows]

    before = "<bos>" + prompts(choice, 0)[0].removesuffix("xa")
    assert split(choice, 0) == [(before, ["xa", "abcd", "no aaa", "?"])]
    assert split(contexts, 2) == [("<bos>the ", ["c is here"]), ("<bos>zz c", ["c is here"])]
    assert split(following, 1) == [("<bos>" + prompts(following, 1)[0], ["efg"])]


def test_one_answer_that_begins_another_keeps_a_token(tmp_path):
    example = {"query": "q", "choices": ["ab", "abc", "ab"], "gold": 1}
    task = ({"icl_task_type": "multiple_choice", "num_fewshot": [0]}, 0, [example])
    bundle = read_bundle(write_bundle(tmp_path / "b", {"t": task}))
    ((_, continuations),) = tokenize_example(bundle.tasks[0], 0, Letters(), 9).rows
    assert list(map(text, continuations)) == ["b", "bc", "b"]


def test_a_prompt_longer_than_the_context_keeps_its_end(bundle):
    ((prompt, continuations),) = tokenize_example(bundle.tasks[0], 3, Letters(), 200).rows
    ((end, same),) = tokenize_example(bundle.tasks[0], 3, Letters(), 12).rows
    assert list(map(text, continuations)) == list(map(text, same)) and max(map(len, same)) == len("no ddd")
    # 7 tokens and the 6 of the longest answer, of which the last is not read
    assert text(end) == text(prompt)[-7:]
    message = "CORE task choice, example 4: a continuation of 6 tokens, more than the model's context of 5"
    with pytest.raises(InputError, match=message):
        tokenize_example(bundle.tasks[0], 3, Letters(), 5)


# ---- scores ------------------------------------------------------------------------------------------------


def test_a_model_that_recites_the_alphabet(tmp_path):
    def task(kind, examples):
        return {"icl_task_type": kind, "num_fewshot": [0], "continuation_delimiter": ""}, 20, examples

    choice = {"query": "abc", "choices": ["dee", "def", "xyz"]}
    context = {"context_options": ["xx", "ab"], "continuation": "cd"}
    continuations = ("pqr", "pqs", "p", "qr", "pqrst")
    tasks = {
        "choice": task("multiple_choice", [{**choice, "gold": gold} for gold in (1, 1, 0, 1)]),
        "contexts": task("schema", [{**context, "gold": gold} for gold in (1, 0, 0, 0)]),
        "next": task("language_modeling", [{"context": "mxo", "continuation": c} for c in continuations]),
    }
    result = core(recite(), read_bundle(write_bundle(tmp_path / "b", tasks)))
    correct = {label: task["correct"] for label, task in result["tasks"].items()}
    assert correct == {"choice": 3, "contexts": 1, "next": 3}
    accuracies = {label: task["accuracy"] for label, task in result["tasks"].items()}
    assert accuracies == {"choice": 0.75, "contexts": 0.25, "next": 0.6}
    assert result["centered_results"] == pytest.approx(
        {"choice": 0.55 / 0.8, "contexts": 0.05 / 0.8, "next": 0.4 / 0.8}
    )
    assert result["core_metric"] == pytest.approx((0.55 + 0.05 + 0.4) / 0.8 / 3)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"attn_ranks": (4,) * 3, "mlp_ranks": (5,) * 3, "lm_head_rank": 7},
        {"sequence_len": 16, "tie_embeddings": True},
    ],
)
def test_scores_are_those_of_a_loop_in_float64(bundle, shape):
    model = random_model(**shape)
    shares = questions(bundle, Letters(), model.config.sequence_len, 3)
    rows = [row for share in shares for question in share for row in question.rows]
    wide = copy.deepcopy(model).double()
    expected = [
        reference(wide, prompt, continuation)
        for prompt, continuations in rows
        for continuation in continuations
    ]
    for tokens in (1, 4000):
        result = [pair for pairs in score(model, rows, torch.float32, tokens) for pair in pairs]
        assert [g for _, g in result] == [g for _, g in expected]
        np.testing.assert_allclose([loss for loss, _ in result], [loss for loss, _ in expected], rtol=2e-5)


def test_many_at_a_time_and_over_processes_is_one_at_a_time(bundle):
    model = random_model()
    one = core(model, bundle, tokens=1)
    many = core(model, bundle, tokens=4000)
    assert one == many and many["core_metric"] != 0
    examples = {label: task["examples"] for label, task in many["tasks"].items()}
    assert examples == {"choice": 20, "contexts": 11, "next": 15}
    shares = [core(model, bundle, rank=rank, world_size=3)["tasks"] for rank in range(3)]
    for label, task in one["tasks"].items():
        for key in ("correct", "examples"):
            assert sum(share[label][key] for share in shares) == task[key]


def test_batches_hold_rows_of_like_length_within_the_tokens(bundle):
    rows = [row for of_task in questions(bundle, Letters(), 64, -1) for q in of_task for row in q.rows]
    result = batches(rows, 300)
    assert sorted(i for batch in result for i in batch) == list(range(len(rows)))
    for batch in result:
        lengths = [row_length(rows[i]) for i in batch]
        (continuations,) = {len(rows[i][1]) for i in batch}
        assert lengths == sorted(lengths, reverse=True)
        assert len(batch) == 1 or lengths[0] * len(batch) * continuations <= 300
    assert sum(row_length(rows[batch[0]]) * len(batch) for batch in result) < 1.1 * sum(map(row_length, rows))
    assert max(map(len, batches([rows[0]] * 200, 10**6))) == MAX_ROWS // len(rows[0][1])


def test_intervals_are_those_of_drawing_the_examples_again():
    answers = {"a": [1] * 30 + [0] * 70, "b": [1] * 9 + [0] * 3}
    baselines = {"a": 0.25, "b": 0.0}
    tasks = {
        label: {"examples": len(values), "accuracy": np.mean(values), "baseline": baselines[label]}
        for label, values in answers.items()
    }
    result = with_intervals({"tasks": tasks})
    rng = np.random.default_rng(7)
    draws = {}
    for label, values in answers.items():
        means = rng.choice(values, (20_000, len(values))).mean(1)
        draws[label] = (means - baselines[label]) / (1 - baselines[label])
        np.testing.assert_allclose(
            result["tasks"][label]["centered_interval"], np.quantile(draws[label], [0.025, 0.975]), atol=0.015
        )
    np.testing.assert_allclose(
        result["core_metric_interval"], np.quantile((draws["a"] + draws["b"]) / 2, [0.025, 0.975]), atol=0.01
    )


# ---- the bundle --------------------------------------------------------------------------------------------


def edit(name, change):
    def apply(folder):
        path = folder / name
        path.unlink() if change is None else path.write_text(change(path.read_text()))

    return apply


def line(change):
    return edit(
        "eval_data/some/choice.jsonl", lambda t: t.replace(t.split("\n")[2], change(t.split("\n")[2]), 1)
    )


def wrong_baseline(text):
    """(damage, message) of a baseline that is no percentage."""
    damage = edit("eval_meta_data.csv", lambda content: content.replace(",25", f",{text}"))
    return damage, rf"in percent for task choice: '{text}'; give 0, or a number from 1"


@pytest.mark.parametrize(
    "damage,message",
    [
        (edit("core.yaml", None), r"core.yaml: missing from the evaluation bundle"),
        (edit("core.yaml", lambda t: "icl_tasks: ["), r"core.yaml: no list of tasks under icl_tasks"),
        (
            edit("core.yaml", lambda t: t.replace("language_modeling", "essay")),
            r"task next: unknown icl_task_type 'essay'; known: multiple_choice, schema, lang",
        ),
        (
            edit("core.yaml", lambda t: t.replace('"num_fewshot": [2], ', "")),
            r"task choice: num_fewshot missing",
        ),
        (
            edit("core.yaml", lambda t: t.replace("[2]", "[2, 3]")),
            r"task choice: num_fewshot \[2, 3\] is not a list of one whole number",
        ),
        (
            edit("core.yaml", lambda t: t.replace("[2]", "[20]")),
            r"choice.jsonl: 20 examples, but task choice asks about one after showing 20 others",
        ),
        (
            edit("core.yaml", lambda t: t.replace('"next"', '"choice"')),
            r"core.yaml: choice listed more than once",
        ),
        (edit("eval_meta_data.csv", None), r"eval_meta_data.csv: missing"),
        (
            edit("eval_meta_data.csv", lambda t: t.replace(",50", ",")),
            r"eval_meta_data.csv: no \"Random baseline\" .* for task contexts",
        ),
        *map(wrong_baseline, ("0.25", "25%", "nan", "-25", "100", "1e400", "inf", "")),
        (
            edit("eval_meta_data.csv", lambda t: t.replace("Random baseline", "baseline")),
            r"csv: no column 'Random baseline'; there are: Eval Task, Task Category, baseline",
        ),
        (
            edit("eval_meta_data.csv", lambda t: ""),
            r"csv: no column 'Eval Task' and no column 'Random baseline'; there are: none",
        ),
        (
            edit("eval_meta_data.csv", lambda t: t + "choice,again,50\n"),
            r'csv: task choice is listed twice, with "Random baseline" 25 and 50',
        ),
        (edit("eval_meta_data.csv", lambda t: t + "x" * 200_000), r"csv: not a table in CSV: field larger"),
        (
            edit("core.yaml", lambda t: t.replace('"schema"', '["schema"]')),
            r"task contexts: unknown icl_task_type \['schema'\]",
        ),
        (
            edit("core.yaml", lambda t: "icl_tasks: 2026-99-99"),
            r"core.yaml: no list of tasks under icl_tasks",
        ),
        (
            line(lambda t: t.replace("after c?", "after \\ud800")),
            r"choice.jsonl: line 3: 'query' has half of a surrogate pair",
        ),
        (line(lambda t: "[" * 100_000), r"choice.jsonl: line 3: not a JSON object"),
        (edit("eval_data/some/next.jsonl", None), r"eval_data/some/next.jsonl: missing"),
        (line(lambda t: t[:30]), r"choice.jsonl: line 3: not a JSON object"),
        (
            line(lambda t: t.replace('"query"', '"question"')),
            r"choice.jsonl: line 3: 'query' missing; a multiple_choice example has query, choices, gold",
        ),
        (
            line(lambda t: t.replace('"gold": 2', '"gold": 4')),
            r"choice.jsonl: line 3: 'gold' is 4, not the index of one of the 4 choices",
        ),
        (
            line(lambda t: t.replace('"?"', "7")),
            r"choice.jsonl: line 3: 'choices' is not a list of two texts or more",
        ),
        (line(lambda t: t.replace('"after c?"', "null")), r"choice.jsonl: line 3: 'query' is not text"),
    ],
)
def test_a_damaged_bundle_is_named_by_file_and_line(bundle_dir, damage, message):
    damage(bundle_dir)
    with pytest.raises(InputError, match=message) as e:
        open_bundle(str(bundle_dir))
    assert "\n" not in str(e.value) and not isinstance(e.value, Unavailable)


def test_a_folder_that_is_not_there():
    with pytest.raises(InputError, match="--core-dir nowhere: no such folder"):
        open_bundle("nowhere")


def zipped(files: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return buffer.getvalue()


def files_of(folder):
    return {
        f"eval_bundle/{path.relative_to(folder)}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def served(monkeypatch, tmp_path):
    """served(content, announced size, status) sets the answer of the bundle's address; returns requests."""
    answer = []
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            content, size, status = answer
            self.send_response(status)
            self.send_header("Content-Length", str(size or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(core_bundle, "URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")

    def serve(content, size=None, status=200):
        answer[:] = content, size, status
        return requests

    yield serve
    server.shutdown()
    server.server_close()


def test_the_bundle_is_downloaded_once_and_its_checksum_kept(served, bundle_dir, tmp_path):
    archive = zipped(files_of(bundle_dir) | {"__MACOSX/._core.txt": b"x"})
    requests = served(archive)
    first = open_bundle()
    second = open_bundle()
    assert len(requests) == 1 and first == second
    assert first.sha256 == hashlib.sha256(archive).hexdigest()
    assert first.fingerprint == read_bundle(bundle_dir).fingerprint
    assert sorted(p.name for p in (tmp_path / "base/core").iterdir()) == [".lock", "eval_bundle"]


@pytest.mark.parametrize(
    "how,reason",
    [
        ("gone", "HTTP Error 404"),
        ("cut", "bytes arrived|File is not a zip file|IncompleteRead"),
        ("page", "File is not a zip file"),
        ("escapes", r"the archive holds the path '../evil', which leads out"),
        ("incomplete", r"eval_data/some/next.jsonl: missing"),
    ],
)
def test_what_cannot_be_had_whole_is_not_there(served, bundle_dir, tmp_path, how, reason):
    files = files_of(bundle_dir)
    if how == "incomplete":
        del files["eval_bundle/eval_data/some/next.jsonl"]
    archive = zipped(files | ({"../evil": b"x"} if how == "escapes" else {}))
    answers = {"gone": (b"", None, 404), "cut": (archive[:-500], len(archive)), "page": (b"<html>",)}
    served(*answers.get(how, (archive,)))
    with pytest.raises(Unavailable, match=reason) as e:
        open_bundle()
    message = str(e.value)
    assert "give its folder with --core-dir" in message
    assert "\n" not in message and ".incoming" not in message
    assert [p.name for p in (tmp_path / "base/core").iterdir()] == [".lock"]
    assert not (tmp_path / "evil").exists()
    served(zipped(files_of(bundle_dir)))
    assert len(open_bundle().tasks) == 3  # and later it may be


# ---- end to end --------------------------------------------------------------------------------------------

STORIES = {
    "choice": (
        {"icl_task_type": "multiple_choice", "num_fewshot": [1]},
        50,
        [{"query": story(i)[:40], "choices": ["the cat", "zebra"], "gold": i % 2} for i in range(12)],
    ),
    "next": (
        {"icl_task_type": "language_modeling", "num_fewshot": [0]},
        0,
        [{"context": story(i)[:30], "continuation": "a"} for i in range(9)],
    ),
}


def test_core_of_a_run_from_training_to_report(train, corpus_dir, tmp_path, capsys, monkeypatch):
    folder = write_bundle(tmp_path / "bundle", STORIES)
    run = train("--core-metric-every", 4, "--core-metric-max-per-task", 5, "--core-dir", folder, tag="core")
    plain = train(tag="plain")
    measured = {entry["step"]: entry for entry in run.history if "core_metric" in entry}
    assert list(measured) == [4, 6] and losses(run) == losses(plain)
    assert {"centered_results/choice", "centered_results/next"} <= measured[6].keys()
    assert run.summary["core_metric"] == measured[6]["core_metric"]
    assert "| CORE " in capsys.readouterr().out

    flags = ["--model-tag", "core", "--core-dir", str(folder), "--max-per-task", "5"]
    base_eval.main([*flags, "--eval", "core"])
    place = metrics.runs_dir() / "core"
    result = json.loads((place / "core_000006.json").read_text())
    assert result["core_metric"] == measured[6]["core_metric"]
    assert result["tasks"]["next"]["examples"] == 5 and result["bundle_sha256"] is None
    low, high = result["core_metric_interval"]
    assert low <= result["core_metric"] <= high and not (place / "eval_000006.json").exists()
    output = capsys.readouterr().out
    assert f"{result['core_metric']:.4f}   {low:.4f} to {high:.4f}" in output
    with monkeypatch.context() as m:
        m.setattr(base_eval, "evaluate_core", lambda *a: pytest.fail("measured again"))
        base_eval.main([*flags, "--eval", "core"])
        assert capsys.readouterr().out == output
    base_eval.main([*flags[:-1], "6", "--eval", "core"])
    assert json.loads((place / "core_000006.json").read_text())["settings"]["max_per_task"] == 6

    report.main(["core", "plain", "--out", str(tmp_path / "report")])
    result = json.loads((place / "core_000006.json").read_text())
    page = (tmp_path / "report/report.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| CORE ") and "–" in line)
    assert f"{result['core_metric']:.4f}" in row and f"{result['core_metric_interval'][0]:.4f} to" in row


def test_without_a_bundle_all_else_goes_on(train, served, capsys):
    served(b"", None, 404)
    run = train("--core-metric-every", 2)
    assert run.summary["status"] == "finished" and "core_metric" not in run.summary
    output = capsys.readouterr().out
    assert output.count("\nCORE is not measured: no evaluation bundle in") == 1
    with pytest.raises(Unavailable, match="give its folder with --core-dir"):
        base_eval.main(["--model-tag", "tiny", "--eval", "core,bpb", "--eval-tokens", "1024"])
    assert "val   | 1,024 tokens" in capsys.readouterr().out
    assert (metrics.runs_dir() / "tiny/eval_000006.json").exists()


def test_parts_are_evaluated_as_they_are_asked_for(train, capsys, monkeypatch):
    train()
    base = ["--model-tag", "tiny", "--eval-tokens", "1024", "--eval"]
    base_eval.main([*base, "bpb"])
    monkeypatch.setattr(base_eval, "evaluate", lambda *a: pytest.fail("evaluated again"))
    base_eval.main([*base, "sample"])
    both = json.loads((metrics.runs_dir() / "tiny/eval_000006.json").read_text())
    assert "val/bpb" in both and len(both["sample"]) == 2
    with pytest.raises(InputError, match="--eval: 'bpb,joy': give one or more of core,bpb,sample"):
        base_eval.main([*base, "bpb,joy"])


def test_a_bad_bundle_stops_a_run_before_its_first_step(train, corpus_dir, tmp_path):
    with pytest.raises(InputError, match="--core-dir nowhere: no such folder"):
        train("--core-metric-every", 2, "--core-dir", "nowhere")
    assert not (metrics.runs_dir() / "tiny").exists()
