"""The tokenizer: round trips, storage, damage."""

import base64
import json
import os
import random
from itertools import islice
from pathlib import Path

import pytest
from conftest import Killed, tiny_experiment

from nanochat import metrics
from nanochat import tokenizer as tokenizers
from nanochat.dataset import Shard, open_corpus
from nanochat.errors import InputError
from nanochat.sweep.experiment import read_experiment
from nanochat.token_cache import cached_tokens
from nanochat.tokenizer import load_tokenizer, tokenizer_path, train_tokenizer
from scripts import tok_eval, tok_train

CORPORA = Path(__file__).parents[2] / "shared/corpora"

TEXTS = [
    "Hello, world! It's 2026.",
    "naïve café — 東京 🚀\n\n\ttabs",
    "",
    "<|bos|> is ordinary text here",
    "\x00\x07 bytes",
    "a" * 5000,
]


def test_encoding_and_decoding_gives_back_any_text(base_dir):
    tokenizer = load_tokenizer()
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text)
        assert tokenizer.bos_id not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())


def test_vocabulary_has_the_size_asked_for_and_bos_last(base_dir):
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 300 and tokenizer.bos_id == 299 and tokenizer.token_bytes()[299] == 0
    assert sorted(tokenizer.tokens[:256]) == [bytes([i]) for i in range(256)]


def test_training_is_deterministic_and_repeated_calls_do_nothing(base_dir, corpus_dir, capsys):
    first = load_tokenizer().hash
    written = tokenizer_path().stat().st_mtime_ns
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "300"])
    assert "already trained" in capsys.readouterr().out and tokenizer_path().stat().st_mtime_ns == written
    tokenizer_path().unlink()
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "300"])
    assert load_tokenizer().hash == first
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    assert load_tokenizer().hash != first


def test_storage_is_plain_data_and_damage_is_noticed(base_dir):
    stored = json.loads(tokenizer_path().read_text())
    stored["tokens"][280] = base64.b64encode(b"other").decode()
    tokenizer_path().write_text(json.dumps(stored))
    with pytest.raises(InputError, match="tokenizer.json: damaged"):
        load_tokenizer()
    tokenizer_path().write_text("{")
    with pytest.raises(InputError, match=r"not a tokenizer \(no JSON object\); train it again"):
        load_tokenizer()


def with_hash(stored: dict, **changes) -> dict:
    """Another content, as whoever writes such a file would give it its hash."""
    stored = stored | changes
    tokens = [base64.b64decode(token) for token in stored["tokens"]]
    return stored | {"hash": tokenizers.content_hash(tokenizers.hashed_content(stored["pattern"], tokens))}


def test_no_content_of_a_tokenizer_file_is_more_than_one_line(base_dir):
    stored = json.loads(tokenizer_path().read_text())
    tokens = stored["tokens"]
    empty = base64.b64encode(b"").decode()
    damages = {
        "tokens: 5": stored | {"tokens": 5},
        "pattern: None": stored | {"pattern": None},
        "trained_on: missing": {key: value for key, value in stored.items() if key != "trained_on"},
        "vocab_size: 300.0": stored | {"vocab_size": 300.0},
        "hash: True": stored | {"hash": True},
        "a token that is no base64": stored | {"tokens": [*tokens[:-1], "ä"]},
        "damaged (a token that is no": stored | {"tokens": [*tokens[:-1], 7]},
        "does not match its hash": stored | {"hash": "0" * 16},
        "vocab_size is 301, and there are 300 tokens": stored | {"vocab_size": 301},
        "two tokens are the same": with_hash(stored, tokens=[*tokens[:-1], tokens[0]]),
        "no token for 1 of the 256 bytes": with_hash(stored, tokens=[*tokens[1:], tokens[-1] + tokens[-1]]),
        "a token without bytes": with_hash(stored, tokens=[*tokens[:-1], empty]),
        "pattern or tokens cannot be used": with_hash(stored, pattern="(unclosed"),
        "newer version of this program (format 2, here 1; new: merges)": stored | {"format": 2, "merges": []},
    }
    for words, content in damages.items():
        tokenizer_path().write_text(json.dumps(content))
        with pytest.raises(InputError) as e:
            load_tokenizer()
        assert str(e.value).startswith(str(tokenizer_path())) and words in str(e.value)
        assert "\n" not in str(e.value)
    del stored["format"], stored["vocab_size"]
    tokenizer_path().write_text(json.dumps(stored))
    assert load_tokenizer().vocab_size == 300
    tokenizer_path().write_text(json.dumps(with_hash(stored, pattern="(?:a|a)*(?!b)c|.")))
    with pytest.raises(InputError, match="^the text cannot be encoded .*BacktrackLimit"):
        load_tokenizer().encode("a" * 100)
    os.truncate(tokenizer_path(), 2**31)  # without blocks on the disk
    with pytest.raises(InputError, match="damaged .more than 1,073,741,824 bytes.; train it again"):
        load_tokenizer()


def test_missing_tokenizer_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="scripts.tok_train"):
        load_tokenizer()


def test_too_little_text_for_the_vocabulary_names_the_largest_possible():
    with pytest.raises(InputError, match=r"--vocab-size 1000: .* at most --vocab-size \d+"):
        train_tokenizer(iter(["abab"] * 3), 1000, {})


def test_the_training_text_is_capped():
    documents = iter(["abcdef", "xyz", "12345", "never"])
    assert list(tok_train.cut_documents(documents, doc_cap=4, max_chars=9)) == ["abcd", "xyz", "12"]


# ---- long texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [" ", "\n", "a", "1", "🙂", "\t", "!", "\u3000", " \n", " " * 5, "👨\u200d"])
def test_a_million_of_one_character_is_encoded(base_dir, unit, capfd):
    tokenizer = load_tokenizer()
    text = (unit * 1_000_000)[:1_000_000]
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text and "panicked" not in capfd.readouterr().err


ALPHABET = [
    *"ab'sdmtlvreLL  \n\n\r\t\0!?,.;:-_0123456789²½ſªʼⅧ",
    *"\u00a0\u3000\u2028\x85\x1c",
    *"éß中文あア한。，\u0301\u200d🙂ǅא٠",
    "'s",
    "'ll",
    "\r\n",
    "  ",
    "\n\n",
]


def test_a_text_may_be_cut_at_every_break(base_dir, monkeypatch):
    """In random texts of all kinds of characters the parts before and after have the tokens of the whole."""
    encode = load_tokenizer().encoding.encode_ordinary
    rng = random.Random(1)
    count = 0
    for _ in range(2000):
        text = "".join(rng.choice(ALPHABET) for _ in range(30))
        for place in (match.start() for match in tokenizers.BREAK.finditer(text)):
            assert encode(text[:place]) + encode(text[place:]) == encode(text), (text[:place], text[place:])
            count += 1
    assert count > 10_000


@pytest.mark.parametrize("limit", [2, 16, 100, 999])
def test_pieces_are_the_text_and_have_its_tokens(base_dir, monkeypatch, limit):
    tokenizer = load_tokenizer()
    rng = random.Random(limit)
    parts = [
        "the cat ",
        "it's 2026,\n",
        "  def f(x):\n\t",
        "東京、そして。",
        "naïve – ",
        "0x1f\r\n\r\n",
        "!!\n",
    ]
    text = "".join(rng.choice(parts) for _ in range(400))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", limit)
    parts = tokenizers.pieces(text)
    assert "".join(parts) == text and max(map(len, parts)) <= limit and len(parts) >= len(text) / limit
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if limit >= 100:  # shorter ones cut words
        assert tokenizer.encode(text) == whole == tokenizer.encode_batch(["", text, "x"])[1]


@pytest.mark.skipif(not CORPORA.is_dir(), reason="needs ../shared")
def test_real_text_has_the_same_tokens_in_pieces(base_dir, monkeypatch):
    tokenizer = load_tokenizer()
    texts = list(islice(open_corpus(str(CORPORA / "wiki")).documents("val"), 60))
    whole = tokenizer.encoding.encode_ordinary_batch(texts)
    for limit in (tokenizers.PIECE_CHARS, 512):
        monkeypatch.setattr(tokenizers, "PIECE_CHARS", limit)
        assert tokenizer.encode_batch(texts) == whole


def test_tokenizers_are_trained_on_long_blanks_too(tmp_path, base_dir):
    text = "the cat " * 100 + " " * 1_500_000 + "\n" * 1_500_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("the cat")
    tok_train.main(["--data", str(tmp_path), "--vocab-size", "262", "--doc-cap", "5000000"])
    assert load_tokenizer().decode(load_tokenizer().encode(text)) == text


def test_what_the_tokenizer_throws_is_one_line_with_the_file(tmp_path, base_dir, monkeypatch):
    """Without pieces tiktoken's expression fails. In rustbpe that is a panic, which is no Exception."""
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", 10**9)
    rows = [json.dumps({"text": text}) for text in ("fine", " " * 1_100_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "val.txt").write_text("the cat")
    shard = Shard("a.jsonl", (tmp_path / "a.jsonl",))
    message = r"a.jsonl: line 2: the text cannot be encoded \(ValueError: .*stack size exceeded"
    with pytest.raises(InputError, match=message) as e:
        cached_tokens(shard, load_tokenizer())
    assert "\n" not in str(e.value)
    message = r"a.jsonl: line 2 or shortly before: the tokenizer cannot be trained on this text \(PanicEx"
    with pytest.raises(InputError, match=message):
        tok_train.main(["--data", str(tmp_path), "--vocab-size", "262", "--doc-cap", "5000000"])


# ---- several tokenizers ------------------------------------------------------------------------------------


def test_tokenizers_have_names(base_dir, corpus_dir, train, capsys):
    before = tokenizer_path().read_bytes()
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290", "--tokenizer-tag", "small.v1"])
    assert tokenizer_path().read_bytes() == before
    assert tokenizer_path("small.v1") == base_dir / "tokenizer/small.v1/tokenizer.json"
    assert load_tokenizer(tokenizer_path("small.v1")).vocab_size == 290
    run = train("--tokenizer-tag", "small.v1", tag="other")
    assert run.config["derived"]["model"]["vocab_size"] == 290
    assert run.config["tokenizer"]["trained_on"]["vocab_size"] == 290
    tok_eval.main(["--data", str(corpus_dir), "--tokenizer-tag", "small.v1"])
    assert "290 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="none/tokenizer.json: .*tok_train .* --tokenizer-tag none"):
        train("--tokenizer-tag", "none", tag="none")


@pytest.mark.parametrize("tag", ["../x", "a/b", ".hidden", "..", "x\n"])
def test_names_that_are_no_folder_are_refused(tag):
    with pytest.raises(InputError, match="--tokenizer-tag: .* becomes the name of a folder; use letters"):
        tok_train.main([f"--tokenizer-tag={tag}"])


def test_replacing_a_tokenizer_is_said(base_dir, corpus_dir, tmp_path, capsys):
    hash = load_tokenizer().hash
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    message = (
        f"; it replaces one of 300 tokens trained on {corpus_dir.name}, hash {hash} (--tokenizer-tag NAME"
    )
    assert message in capsys.readouterr().out
    tokenizer_path().unlink()
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    assert "replaces" not in capsys.readouterr().out


def test_a_run_says_that_its_tokenizer_is_of_another_text(train, tmp_path, corpus_dir, capsys):
    first = train(tag="same")
    assert "tokenizer: trained on" not in capsys.readouterr().out
    assert first.config["tokenizer"]["trained_on"]["corpus"] == corpus_dir.name
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a", "val"):
        (other / f"{name}.jsonl").write_bytes((corpus_dir / "part0.jsonl").read_bytes())
    train("--data", other, tag="other")
    message = f"tokenizer: trained on {corpus_dir.name}, this text is other: it takes more tokens"
    assert message in capsys.readouterr().out
    train("--data", other, tag="other")  # finished: the record is the same


def test_a_run_goes_on_with_its_own_tokenizer(train, base_dir, corpus_dir, kill_after):
    kill_after(4)
    with pytest.raises(Killed):
        train("--save-every", 2)
    kill_after(None)
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    resumed = train("--save-every", 2, "--resume", "auto")
    assert resumed.summary["status"] == "finished" and resumed.config["derived"]["model"]["vocab_size"] == 300
    with pytest.raises(InputError, match="tokenizer_hash"):
        train("--save-every", 2)


def test_a_sweep_uses_the_tokenizer_of_its_flags(base_dir, corpus_dir, tmp_path):
    from scripts import base_train, sweep

    before = tokenizer_path().read_bytes()
    path = tiny_experiment(tmp_path / "named.toml", "[points.full]\n", [1], str(corpus_dir))
    path.write_text(path.read_text().replace("vocab-size = 300", "vocab-size = 280\ntokenizer-tag = 'mine'"))
    experiment = read_experiment(path, "", "")
    sweep.prepare(experiment)
    assert load_tokenizer(tokenizer_path("mine")).vocab_size == 280
    assert tokenizer_path().read_bytes() == before
    base_train.main(experiment.points[0].argv)
    run = metrics.load_run(metrics.runs_dir() / "named_full_s1")
    assert run.config["derived"]["model"]["vocab_size"] == 280
    path.write_text(path.read_text() + "[points.other]\ntokenizer-tag = 'x'\n")
    with pytest.raises(InputError, match="tokenizer-tag has to be the same in all runs"):
        read_experiment(path, "", "")


def test_tok_eval_prints_bytes_per_token(base_dir, corpus_dir, capsys):
    tok_eval.main(["--data", str(corpus_dir)])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    for split in ("train", "val"):
        n_bytes, n_tokens, ratio = (float(x.replace(",", "")) for x in lines[split][1:4])
        assert ratio == pytest.approx(n_bytes / n_tokens, abs=1e-3) and ratio > 1.5
