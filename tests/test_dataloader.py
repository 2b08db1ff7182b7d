"""Token cache and packed rows: nothing lost, nothing twice, a pure function, safe builders."""

import json
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, story
from processes import Launched

from nanochat.dataloader import Rows, training_batch
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.processes import World
from nanochat.token_cache import cached_tokens
from nanochat.tokenizer import load_tokenizer

CORPORA = Path(__file__).parents[2] / "shared/corpora"


@pytest.fixture
def rows(base_dir, corpus_dir):
    def rows(T=32, seed=0, split="train"):
        return Rows(open_corpus(str(corpus_dir)).split(split), load_tokenizer(), T, seed)

    rows.corpus = str(corpus_dir)
    return rows


def stream(base_dir, corpus_dir, split="train"):
    tokenizer = load_tokenizer()
    return [
        t
        for text in open_corpus(str(corpus_dir)).documents(split)
        for t in tokenizer.encode(text) + [tokenizer.bos_id]
    ]


def test_rows_are_full_begin_with_bos_and_continue_the_stream(rows, base_dir, corpus_dir):
    r = rows()
    slots = stream(base_dir, corpus_dir)
    assert r.count == len(slots) // 32
    for i in range(r.count):  # rows across the border of the two shards included
        row = r.row(i)
        assert row.shape == (33,) and row[0] == r.bos_id and row[1:].tolist() == slots[32 * i : 32 * i + 32]
    assert r.dropped == pytest.approx((len(slots) % 32) / len(slots))


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(rows):
    r = rows()
    visited = [tuple(r.training_row(k)) for k in range(2 * r.count)]
    first = visited[: r.count]
    second = visited[r.count :]
    every = Counter(tuple(r.row(i)) for i in range(r.count))
    assert Counter(first) == Counter(second) == every and first != second


def test_a_row_depends_on_its_number_and_the_seed_alone(rows):
    one = rows(seed=3)
    other = rows(seed=3)
    backwards = {k: one.training_row(k) for k in reversed(range(3 * one.count))}
    assert all(np.array_equal(other.training_row(k), row) for k, row in backwards.items())
    assert not all(np.array_equal(rows(seed=4).training_row(k), backwards[k]) for k in range(10))


@pytest.mark.parametrize("world_size,batch", [(1, 12), (1, 4), (2, 6), (3, 2), (4, 1)])
def test_the_rows_of_a_step_do_not_depend_on_processes_or_batch_size(rows, world_size, batch):
    import torch

    r = rows()
    device = torch.device("cpu")
    first = 24 // (world_size * batch)
    inputs = [
        training_batch(r, micro, batch, World(device, rank, world_size))[0]
        for micro in range(first, first + 12 // (world_size * batch))
        for rank in range(world_size)
    ]
    expected = np.stack([r.training_row(24 + i)[:-1] for i in range(12)])
    assert np.array_equal(torch.cat(inputs).numpy(), expected)


def test_a_number_that_is_no_token_is_refused(rows, base_dir):
    rows()
    for tokens in base_dir.glob("token_cache/*/*/tokens.bin"):
        with open(tokens, "r+b") as f:
            f.write(b"\xff\xff")
    with pytest.raises(InputError, match="row 0 has the number 65535, and there are 300 tokens: .*--verify"):
        rows().row(0)


def test_targets_are_the_next_tokens(rows):
    import torch

    r = rows()
    x, y = training_batch(r, 0, 4, World(torch.device("cpu")))
    assert torch.equal(x[:, 1:], y[:, :-1]) and np.array_equal(
        y[:, -1].numpy(), [r.training_row(i)[-1] for i in range(4)]
    )


@pytest.mark.parametrize("name,T", [("tinystories", 256), ("wiki", 2048)])
def test_cropping_drops_less_than_two_percent_of_real_text(name, T, tmp_path, monkeypatch):
    folder = CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    from scripts import tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tok_train.main(["--data", str(folder), "--vocab-size", "1024", "--max-chars", "1000000"])
    r = Rows(open_corpus(str(folder)).train[:1], load_tokenizer(), T)
    assert r.dropped < 0.002


def test_cache_is_built_once_and_shared(rows, base_dir, monkeypatch):
    rows()
    monkeypatch.setattr("nanochat.token_cache.build_cache", lambda *a: pytest.fail("built again"))
    rows(T=16, seed=9)


def test_another_tokenizer_has_another_cache(rows, base_dir, corpus_dir):
    from scripts import tok_train

    before = rows().row(0)
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "280"])
    assert len(list((base_dir / "token_cache").iterdir())) == 1
    assert not np.array_equal(rows().row(0), before)
    assert len(list((base_dir / "token_cache").iterdir())) == 2


def without_meta(folder):
    (folder / "meta.json").unlink()


def with_half_meta(folder):
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text[: len(text) // 2])


def with_meta_of_another_kind(folder):
    (folder / "meta.json").write_text("[]")


def without_tokens(folder):
    (folder / "tokens.bin").unlink()


def with_no_tokens(folder):
    (folder / "tokens.bin").write_bytes(b"")


def with_fewer_tokens(folder):
    file = folder / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])


def as_an_empty_folder(folder):
    without_meta(folder)
    without_tokens(folder)


def as_a_file(folder):
    as_an_empty_folder(folder)
    folder.rmdir()
    folder.touch()


DAMAGES = [
    without_meta,
    with_half_meta,
    with_meta_of_another_kind,
    without_tokens,
    with_no_tokens,
    with_fewer_tokens,
    as_an_empty_folder,
    as_a_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_is_not_whole_is_built_again(rows, base_dir, capsys, damage):
    before = rows().row(0)
    folder = next((base_dir / "token_cache").glob("*/*/tokens.bin")).parent
    names = sorted(p.name for p in folder.parent.iterdir())
    damage(folder)
    (folder.parent / f"{folder.name}.building").mkdir()  # as a killed builder of an earlier version left it
    capsys.readouterr()
    assert np.array_equal(rows().row(0), before)
    assert sorted(p.name for p in folder.parent.iterdir()) == names
    output = capsys.readouterr().out
    assert f"{folder}: the token cache there was not whole" in output or damage is as_an_empty_folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_not_be_written_names_the_way_out(rows, base_dir):
    (base_dir / "token_cache").mkdir()
    (base_dir / "token_cache").chmod(0o555)
    with pytest.raises(InputError, match="Permission denied.*NANOCHAT_BASE_DIR"):
        rows()


def test_what_another_user_left_behind_is_no_hindrance(rows, base_dir, monkeypatch):
    """Root may remove anything, so removing fails by decree."""
    monkeypatch.setattr("nanochat.token_cache.shutil.rmtree", lambda *a, **k: None)
    cache = base_dir / "token_cache" / load_tokenizer().hash
    fingerprints = [shard.fingerprint for shard in open_corpus(rows.corpus).train]
    for fingerprint in fingerprints:
        (cache / f"{fingerprint}.building").mkdir(parents=True)
    assert rows().count
    assert all((cache / fingerprint / "meta.json").exists() for fingerprint in fingerprints)


def test_a_full_disk_leaves_no_cache(rows, base_dir, monkeypatch):
    """Writing is refused as a full disk refuses it, when the buffer is written."""
    real = open

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith("tokens.bin") and "w" in mode:
            return real("/dev/full", mode, *args, **kwargs)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left"):
        rows()
    monkeypatch.setattr("builtins.open", real)
    assert not [p for p in base_dir.glob("token_cache/*/*") if p.is_dir()]
    assert rows().count


def train_with_few_files(folder, limit):
    """A short training run in which this process may have `limit` files open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    from scripts import base_train

    base_train.main([*TINY, "--data", str(folder), "--model-tag", "few", "--num-iterations", "2"])


def test_more_shards_than_files_may_be_open(base_dir, tmp_path):
    text = tmp_path / "shards"
    text.mkdir()
    for i in range(150):
        rows = [json.dumps({"text": story(100 * i + j)}) for j in range(3)]
        (text / f"shard_{i:05d}.jsonl").write_text("\n".join(rows))
    for part in ("val", "validation"):
        (text / part).mkdir()
        for i in range(60):
            (text / part / f"{i}.jsonl").write_text(json.dumps({"text": story(i)}) + "\n")
    output = tmp_path / "output"
    assert Launched(1, output, train_with_few_files, text, 128).codes() == [0], output.read_text()
    rows = Rows(open_corpus(str(text)).train, load_tokenizer(), 32, 42)
    assert len(rows.starts) == 151 and len(open_files()) < 128


def open_files():
    return os.listdir("/dev/fd")


class SlowShard:
    """A shard whose documents take a while, to be killed or raced while it is read."""

    name = "slow"
    paths = ()
    fingerprint = "slow"

    def __init__(self, log):
        self.log = log

    def read(self):
        with open(self.log, "a") as f:
            f.write("read\n")
        for i in range(40):
            time.sleep(0.02)
            yield f"line {i}", f"the cat number {i}"


def build(log):
    cached_tokens(SlowShard(log), load_tokenizer())


def test_two_builders_at_once_read_the_text_once(base_dir, tmp_path):
    log = tmp_path / "log"
    builders = [Launched(1, tmp_path / "output", build, log) for _ in range(2)]
    assert [b.codes() for b in builders] == [[0], [0]] and log.read_text() == "read\n"


def test_a_builder_killed_half_way_leaves_nothing_and_blocks_no_one(base_dir, tmp_path):
    log = tmp_path / "log"
    (victim,) = Launched(1, tmp_path / "output", build, log).processes
    while not log.exists():
        assert victim.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    folder = next((base_dir / "token_cache").iterdir())
    assert not (folder / "slow").exists()
    tokens = cached_tokens(SlowShard(log), load_tokenizer())
    tokenizer = load_tokenizer()
    texts = [f"the cat number {i}" for i in range(40)]
    assert tokens.tolist() == [t for text in texts for t in tokenizer.encode(text) + [tokenizer.bos_id]]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["slow"]
    assert json.loads((folder / "slow/meta.json").read_text())["documents"] == 40
