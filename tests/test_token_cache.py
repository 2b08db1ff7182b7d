"""Token caches hold what was written: lost writes, damages, caches of earlier versions, --verify."""

import builtins
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import losses, story

from nanochat import token_cache
from nanochat.common import locked
from nanochat.dataset import Shard
from nanochat.errors import InputError
from nanochat.token_cache import cached_tokens, verify_caches
from nanochat.tokenizer import load_tokenizer


@pytest.fixture
def text(base_dir, tmp_path):
    """A shard with a cache of several pages: (shard, tokenizer, the folder of its cache, its slots)."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(400)))
    shard = Shard("text", (file,))
    tokenizer = load_tokenizer()
    slots = cached_tokens(shard, tokenizer).tolist()
    return shard, tokenizer, token_cache.cache_folder(shard, tokenizer), slots


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def without_sum(folder: Path):
    """As earlier versions wrote it."""
    meta = meta_of(folder)
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))


def change(path: Path, offset: int, data: bytes):
    """A damage that keeps the size."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def inode(folder: Path) -> int:
    return (folder / "tokens.bin").stat().st_ino


class LosesAWrite:
    """A file on a disk that was full for a moment: the second page is not written, and nobody is told."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        begin = self.file.tell()
        for start in range(0, len(data), 2):  # a slot
            if 4096 <= begin + start < 8192:
                self.file.seek(2, os.SEEK_CUR)
            else:
                self.file.write(data[start : start + 2])
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.file.close()


def test_a_lost_write_is_noticed_and_leaves_no_cache(text, monkeypatch):
    shard, tokenizer, folder, slots = text
    (folder / "meta.json").unlink()
    real = open

    def lossy(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return LosesAWrite(file) if "building" in str(path) and "w" in mode else file

    monkeypatch.setattr(builtins, "open", lossy)
    with pytest.raises(InputError, match="tokens.bin: the disk gives back other bytes than were written"):
        cached_tokens(shard, tokenizer)
    monkeypatch.setattr(builtins, "open", real)
    assert not list(folder.parent.glob("*.building*"))
    assert cached_tokens(shard, tokenizer).tolist() == slots
    assert meta_of(folder)["sha256"] == hashlib.sha256((folder / "tokens.bin").read_bytes()).hexdigest()


def test_what_killed_builders_left_is_removed_unless_somebody_builds_it(text, tmp_path):
    shard, tokenizer, folder, slots = text
    left = [folder.with_name(f"{name}.building.x") for name in (folder.name, "killed", "alive")]
    for path in left:
        path.mkdir()
    (folder / "meta.json").unlink()
    with locked(folder.with_name(".alive.lock")):
        assert cached_tokens(shard, tokenizer).tolist() == slots
    assert [path.exists() for path in left] == [False, False, True]


def test_a_cache_of_an_earlier_version_is_examined_once(text, capsys, monkeypatch):
    shard, tokenizer, folder, slots = text
    before = inode(folder)
    sum = meta_of(folder)["sha256"]
    without_sum(folder)
    assert cached_tokens(shard, tokenizer).tolist() == slots
    assert inode(folder) == before and meta_of(folder)["sha256"] == sum and not capsys.readouterr().out

    for offset, damage in ((4096, bytes(4096)), (8192, b"\xff" * 8)):
        without_sum(folder)
        change(folder / "tokens.bin", offset, damage)
        assert cached_tokens(shard, tokenizer).tolist() == slots
        assert f"{folder}: the token cache there was not whole (tokens.bin has " in capsys.readouterr().out
    without_sum(folder)
    os.truncate(folder / "tokens.bin", 4096)  # the end of the file is lost, and its size is not
    os.truncate(folder / "tokens.bin", 2 * len(slots))
    assert cached_tokens(shard, tokenizer).tolist() == slots and meta_of(folder)["sha256"] == sum


def test_a_cache_of_an_earlier_version_that_is_somebody_elses_is_examined_once_a_process(text, monkeypatch):
    """Root may write everywhere, so writing fails by decree."""
    shard, tokenizer, folder, slots = text

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(token_cache, "locked", refused)
    monkeypatch.setattr(token_cache, "write_json", lambda path, content: refused(path))
    without_sum(folder)
    assert cached_tokens(shard, tokenizer).tolist() == slots
    change(folder / "tokens.bin", 4096, bytes(4096))  # it is not read again
    assert len(cached_tokens(shard, tokenizer)) == len(slots)
    token_cache.verified_folders.clear()
    with pytest.raises(InputError, match=r"denied: .* cannot be kept there \(tokens.bin has pages of zeros"):
        cached_tokens(shard, tokenizer)


DAMAGES = [
    {"dtype": "float64"},
    {"dtype": ["uint16"]},
    {"dtype": None},
    {"dtype": "uint32"},
    {"slots": -1},
    {"slots": float("nan")},
    {"slots": 1e3},
    {"slots": True},
    {"slots": 10**400},
    {"vocab_size": "300"},
    {"vocab_size": 299},
    {"tokenizer_hash": "0" * 16},
    {"tokenizer_hash": 5},
    {"sha256": "abc"},
    {"sha256": None},
    {"format": 99},
]


def test_whatever_meta_json_says_there_is_no_traceback(text, capsys):
    shard, tokenizer, folder, slots = text
    intact = meta_of(folder)
    contents = [json.dumps(intact | damage) for damage in DAMAGES]
    contents += ["", "null", "[" * 100_000, '{"slots": 1' + "0" * 5000 + "}", "\ud800"]
    for content in contents:
        (folder / "meta.json").write_text(content, errors="surrogatepass")
        assert cached_tokens(shard, tokenizer).tolist() == slots, content[:80]
        output = capsys.readouterr().out
        assert output.count("\n") == 1 and "was not whole (" in output and "meta.json" in output
        assert meta_of(folder) == intact
    for name in ("meta.json", "tokens.bin"):  # a folder in the place of a file
        (folder / name).unlink()
        (folder / name).mkdir()
        assert cached_tokens(shard, tokenizer).tolist() == slots


def test_verify_reads_every_cache_and_builds_the_damaged_again(train, base_dir, corpus_dir, capsys):
    whole = train(tag="whole")
    caches = sorted(base_dir.glob("token_cache/*/*/tokens.bin"))
    change(caches[0], 100, b"\x01\x00\x02\x00")
    change(caches[2], 100, b"\x01\x00\x02\x00")
    capsys.readouterr()
    mended = train("--verify", tag="mended")
    output = capsys.readouterr().out
    assert output.count("was not whole (tokens.bin differs from its checksum) and is built again") == 2
    assert "token caches: 3 read whole" in output
    assert losses(mended) == losses(whole) and mended.summary["val/ppl"] == whole.summary["val/ppl"]
    assert train(tag="mended").summary == mended.summary, "the flag is free at a resume"


def test_the_processes_of_a_machine_share_the_verifying(text, tmp_path, monkeypatch):
    shard, tokenizer, folder, slots = text
    (tmp_path / "other.txt").write_text("the cat")
    other = Shard("other", (tmp_path / "other.txt",))
    for name, value in (("RANK", 3), ("LOCAL_RANK", 1), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    change(folder / "tokens.bin", 0, b"\x01\x00")
    verify_caches([shard, other], tokenizer)
    assert np.fromfile(folder / "tokens.bin", np.uint16)[0] == 1
    assert token_cache.cache_folder(other, tokenizer).is_dir()
    verify_caches([other, shard], tokenizer)
    assert cached_tokens(shard, tokenizer).tolist() == slots


def test_a_downloaded_set_verifies_its_caches_of_all_tokenizers(text, capsys):
    shard, tokenizer, folder, slots = text
    assert token_cache.remove_damaged([shard]) == (1, 0)
    without_sum(folder)
    assert token_cache.remove_damaged([shard]) == (1, 0) and "sha256" in meta_of(folder)
    change(folder / "tokens.bin", 4, b"\x01\x00")
    assert token_cache.remove_damaged([shard]) == (1, 1) and not folder.exists()
    assert f"{folder}: removed, the token cache there was not whole (tokens" in capsys.readouterr().out
    assert cached_tokens(shard, tokenizer).tolist() == slots
