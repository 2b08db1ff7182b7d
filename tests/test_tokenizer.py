"""The tokenizer: round trips, storage, damage."""
import base64
import json

import pytest

from nanochat.common import InputError
from nanochat.tokenizer import load_tokenizer, tokenizer_path, train_tokenizer
from scripts import tok_eval, tok_train

TEXTS = ["Hello, world! It's 2026.", "naïve café — 東京 🚀\n\n\ttabs", "", "<|bos|> is ordinary text here", "\x00\x07 bytes", "a" * 5000]


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
    first, written = load_tokenizer().hash, tokenizer_path().stat().st_mtime_ns
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
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer()


def test_missing_tokenizer_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="scripts.tok_train"):
        load_tokenizer()


def test_too_little_text_for_the_vocabulary_names_the_largest_possible():
    with pytest.raises(InputError, match=r"--vocab-size 1000: .* at most --vocab-size \d+"):
        train_tokenizer(iter(["abab"] * 3), 1000, {})


def test_the_training_text_is_capped():
    assert list(tok_train.capped(iter(["abcdef", "xyz", "12345", "never"]), doc_cap=4, max_chars=9)) == ["abcd", "xyz", "12"]


def test_tok_eval_prints_bytes_per_token(base_dir, corpus_dir, capsys):
    tok_eval.main(["--data", str(corpus_dir)])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    for split in ("train", "val"):
        n_bytes, n_tokens, ratio = (float(x.replace(",", "")) for x in lines[split][1:4])
        assert ratio == pytest.approx(n_bytes / n_tokens, abs=1e-3) and ratio > 1.5
