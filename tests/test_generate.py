"""The generate command: which run, what it prints and where, and every refusal."""

import io
import json
import os
from types import SimpleNamespace

import pytest
import torch

from nanochat import metrics
from nanochat.engine import GREEDY
from nanochat.engine import generate as generate_tokens
from nanochat.errors import InputError
from scripts import generate
from scripts.generate import Text, newest_finished_run, open_model

CPU = torch.device("cpu")


@pytest.fixture
def low(train):
    return train("--attn-rank", 4, "--mlp-rank", 0.25, "--max-seq-len", 16, tag="low")


@pytest.fixture
def run(capsys):
    """run('--flag', …) -> (stdout, stderr) of the command, on a CPU."""

    def call(*flags):
        capsys.readouterr()
        generate.main(["--device-type", "cpu", *map(str, flags)])
        return capsys.readouterr()

    return call


def test_the_text_is_the_models_and_the_seeds(low, run):
    out, err = run("-p", "the cat", "--max-tokens", 30, "--temperature", 0)
    model, tokenizer, step = open_model("low", -1, CPU)
    prompt = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    steps = generate_tokens(model, [prompt], 30, GREEDY, stop=(tokenizer.bos_id,))
    assert step == 6 and out == "the cat" + tokenizer.decode(token for (token,) in steps) + "\n"
    assert err.startswith("low, step 6 (the newest finished run)\n") and "tokens/s" in err.splitlines()[-1]
    warm = ("-p", "the cat", "--max-tokens", 10, "--temperature", 1.5)
    first, again, other = (run(*warm, "--seed", seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    for limit in (("--top-k", 1), ("--top-p", 1e-6)):
        assert run("-p", "the cat", "--max-tokens", 30, *limit)[0] == out


def test_several_samples_and_a_prompt_longer_than_the_context(low, run):
    checkpoint = ("--model-tag", "low", "--step", 6)
    out, err = run("-p", "the cat", "--num-samples", 3, "--max-tokens", 8, "--temperature", 1.5, *checkpoint)
    texts = out.removesuffix("\n").split("\n\nthe cat")
    assert len(set(texts)) == 3 and texts[0].startswith("the cat") and err.startswith("low, step 6\n")
    assert "24 tokens in" in err
    long = " ".join(["the cat sees"] * 20)
    out, err = run("-p", long, "--max-tokens", 4)
    assert out.startswith(long) and "more than the context of 16: the model reads its last 8\n" in err


def test_a_prompt_a_line_until_an_empty_one(low, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na dog \n\nnot this\n"))
    out, err = run("--max-tokens", 3, "--temperature", 0)
    alone = [run("--max-tokens", 3, "--temperature", 0, "-p", prompt)[0] for prompt in ("the cat", "a dog ")]
    assert out == "".join(alone) and err.count("tokens/s") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))  # Ctrl-D
    assert run("--max-tokens", 3, "--temperature", 0)[0] == alone[0]


def test_it_ends_where_the_model_ends_its_document(low, run, monkeypatch):
    _, tokenizer, _ = open_model("low", -1, CPU)
    cat = tokenizer.encode(" cat")[0]
    bos = tokenizer.bos_id
    script = iter([cat, cat, bos])
    monkeypatch.setattr("nanochat.engine.sample", lambda *arguments: torch.tensor([next(script)]))
    out, err = run("-p", "the", "--max-tokens", 30)
    assert out == f"the{2 * tokenizer.decode([cat])}\n" and err.splitlines()[-1].startswith("2 tokens in")


def test_a_character_of_several_tokens_is_printed_once_it_is_whole():
    tokenizer = SimpleNamespace(tokens=[b"a", b"\xe2", b"\x9f\xb6 b", "é".encode()])
    text = Text(tokenizer)
    parts = [text.add(token) for token in (0, 1, 2, 3, 1, 4, None)]  # 4: a special token
    assert parts == ["a", "", "⟶ b", "é", "", "", "\ufffd"]
    assert text.text == "a⟶ bé\ufffd"


def test_the_newest_finished_run_is_chosen(base_dir):
    assert_refused("no finished run with a checkpoint", "-p", "a")
    for age, (tag, status, saved) in enumerate(
        (
            ("new", "running", True),
            ("bare", "finished", False),
            ("z", "finished", True),
            ("a", "finished", True),
        )
    ):
        folder = metrics.runs_dir() / tag
        (folder / "checkpoints" / ("step_000006" if saved else ".none")).mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "summary.json").write_text(json.dumps({"status": status}))
        os.utime(folder / "summary.json", (1e9 - age, 1e9 - age))
    assert newest_finished_run() == "z"


def assert_refused(message, *flags):
    with pytest.raises(InputError, match=message):
        generate.main(["--device-type", "cpu", *flags])


@pytest.mark.parametrize(
    "flags,message",
    [
        (("-p", " "), "^-p: the prompt is empty; give some text"),
        (("-p", "a", "--temperature", "-1"), "--temperature: '-1' is not a number from 0"),
        (("-p", "a", "--temperature", "nan"), "--temperature: 'nan' is not a number from 0"),
        (("-p", "a", "--top-p", "0"), "^--top-p 0: leaves no token"),
        (("-p", "a", "--top-p", "1.1"), "--top-p: '1.1' is not a number from 0 to 1"),
        (("-p", "a", "--top-k", "-1"), "--top-k: '-1' is not a whole number >= 0"),
        (("-p", "a", "--num-samples", "0"), "--num-samples: '0' is not a whole number >= 1"),
        (("-p", "a", "--seed", str(2**64)), "--seed: .* is not a whole number <= 9223372036854775807"),
        (("-p", "a", "--model-tag", "none"), "^--model-tag none: no such run in"),
    ],
)
def test_bad_input_is_named(base_dir, flags, message):
    assert_refused(message, *flags)


def test_a_run_whose_parts_do_not_belong_together_is_refused(low, base_dir):
    assert_refused(r"no checkpoint of step 5; there are: \[6\]", "-p", "a", "--step", "5")
    from scripts import tok_train

    tok_train.main(["--data", low.config["flags"]["data"], "--vocab-size", "290"])
    folder = metrics.runs_dir() / "low"
    (folder / "tokenizer.json").write_text((base_dir / "tokenizer" / "tokenizer.json").read_text())
    assert_refused("the checkpoint was trained with tokenizer .*, tokenizer.json is", "-p", "a")
    (folder / "tokenizer.json").unlink()
    assert_refused("tokenizer.json: no tokenizer here", "-p", "a")
    os.rename(folder / "checkpoints", folder / "elsewhere")
    assert_refused("--model-tag low: no checkpoint in", "-p", "a", "--model-tag", "low")
