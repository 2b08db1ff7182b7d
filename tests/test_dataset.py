"""Corpora: the embedded one, folders of the user's files, and downloaded sets as they lie on disk."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, fingerprints, readers
from nanochat.dataset import Shard, open_corpus
from nanochat.errors import InputError

DATA = Path(__file__).parents[2] / "shared/corpora/tinystories"


STRING = pa.string()


def write_parquet(path, texts, column="text", type=STRING):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), column: pa.array(texts, type)}), path, row_group_size=2)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts))


def documents(path):
    return list(Shard(path.name, (path,)).documents())


def refuses(words, call, *args):
    """call(*args) raises an InputError of one line that contains `words`."""
    with pytest.raises(InputError) as e:
        call(*args)
    assert words in str(e.value) and "\n" not in str(e.value)


# ---- readers -----------------------------------------------------------------------------------------------

TEXTS = ["one", "", "two\nlines", "drei – 三 🙂", "five"]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string()])
def test_parquet_documents(tmp_path, type):
    write_parquet(tmp_path / "a.parquet", TEXTS + [None], type=type)
    assert documents(tmp_path / "a.parquet") == [t for t in TEXTS if t]


def test_jsonl_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": ""}\n{"text": "two \\u4e09 \xe4\xb8\x89", "x": [1]}'
    )
    assert documents(path) == ["one", "two 三 三"]


def test_gzipped_json_lines(tmp_path):
    path = tmp_path / "a.json.gz"
    whole = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 50).encode())
    path.write_bytes(whole)
    assert documents(path) == [t for t in TEXTS if t] * 50
    for broken in (b"not gzip", whole[:-9], whole[:-8] + b"\xff" * 8, whole[:30] + b"\xff" * 20 + whole[50:]):
        path.write_bytes(broken)
        refuses("a.json.gz: not a readable gzip file", documents, path)
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n{"content": "x"}\n'))
    refuses("a.json.gz: line 2: not a JSON object with a string 'text'", documents, path)


def test_a_txt_is_one_document_and_keeps_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"")
    assert documents(tmp_path / "a.txt") == ["one\r\ntwo\n"]
    assert documents(tmp_path / "b.txt") == []


def test_parquet_without_a_string_column_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], column="content")
    refuses(
        "a.parquet: no string column 'text' (it has id: int64, content: string)",
        documents,
        tmp_path / "a.parquet",
    )
    write_parquet(tmp_path / "b.parquet", [1], type=pa.int64())
    refuses("b.parquet: no string column 'text'", documents, tmp_path / "b.parquet")


def test_corrupt_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"some text {i}" * 50 for i in range(100)])
    whole = path.read_bytes()
    for broken in (
        b"",
        b"PAR1",
        whole[:-10],
        whole[len(whole) // 2 :],
        whole[:4] + b"\xff" * 200 + whole[204:],
    ):
        path.write_bytes(broken)
        refuses("a.parquet: not a readable parquet file", documents, path)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": 1}',
        '{"content": "x"}',
        '["text"]',
        '"text"',
        "null",
        '{"text": "x"',
        '{"text": "\\ud800"}',
        "[" * 100_000,
    ],
)
def test_jsonl_line_that_is_no_document(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    refuses("a.jsonl: line 2: not a JSON object with a string 'text'", documents, tmp_path / "a.jsonl")


def test_invalid_utf8_is_located(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    refuses("a.txt: invalid UTF-8 at byte 2", documents, tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "na\xefve"}\n')
    refuses("a.jsonl: line 2: invalid UTF-8 at byte 12", documents, tmp_path / "a.jsonl")
    table = pa.table({"text": pa.array([b"fine", b"na\xefve"]).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    refuses("a.parquet: row 2: invalid UTF-8 at byte 2", documents, tmp_path / "a.parquet")


def test_too_long_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARS", 1000)
    for length, allowed in ((1000, True), (1001, False), (5000, False)):
        text = "三" * 10 + "x" * (length - 10)
        write_parquet(tmp_path / "a.parquet", ["short", text])
        write_jsonl(tmp_path / "a.jsonl", ["short", text])
        (tmp_path / "a.txt").write_text(text)
        for name, where in (("a.parquet", ": row 2"), ("a.jsonl", ": line 2"), ("a.txt", "")):
            if allowed:
                assert documents(tmp_path / name)[-1] == text
            else:
                message = f"{name}{where}: a document of more than 1,000 characters; split it"
                refuses(message, documents, tmp_path / name)


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    with open(tmp_path / "a.txt", "wb") as f:
        f.truncate(2**40)  # sparse
    refuses("a document of more than 67,108,864 characters", documents, tmp_path / "a.txt")


# ---- fingerprints ------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_alone(tmp_path):
    a = tmp_path / "a.jsonl"
    b = tmp_path / "b.jsonl"
    write_jsonl(a, ["one", "two"])
    write_jsonl(b, ["one", "two"])
    os.utime(b, (0, 0))
    first = Shard("a", (a,)).fingerprint
    assert first == Shard("b", (b,)).fingerprint
    write_jsonl(b, ["one", "twO"])
    assert first != Shard("b", (b,)).fingerprint
    assert first != Shard("a", (a, a)).fingerprint


@pytest.mark.parametrize("name", ["a.parquet", "a.json.gz"])
def test_fingerprint_of_a_large_file_sees_head_tail_and_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fingerprints, "SAMPLES", 3)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 10)
    path = tmp_path / name

    def fingerprint(content):
        path.write_bytes(content)
        return Shard("a", (path,)).fingerprint

    contents = [
        bytes(100),
        b"x" + bytes(99),
        bytes(99) + b"x",
        bytes(50) + b"x" + bytes(49),
        bytes(101),
        bytes(29),
    ]
    assert len(set(map(fingerprint, contents))) == len(contents)
    assert fingerprint(bytes(20) + b"x" + bytes(79)) == fingerprint(bytes(100)), (
        "between the samples nothing is read"
    )


def test_corpus_fingerprint_depends_on_the_order_of_shards_and_not_on_their_names(tmp_path):
    for name in ("a", "b", "swapped"):
        (tmp_path / name).mkdir()
    for name, texts in (
        ("a/1.jsonl", "x"),
        ("a/2.jsonl", "y"),
        ("a/val.jsonl", "v"),
        ("b/5.jsonl", "x"),
        ("b/6.jsonl", "y"),
        ("b/val.jsonl", "w"),
        ("swapped/1.jsonl", "y"),
        ("swapped/2.jsonl", "x"),
        ("swapped/val.jsonl", "v"),
    ):
        write_jsonl(tmp_path / name, [texts])
    a, b, swapped = (open_corpus(str(tmp_path / name)) for name in ("a", "b", "swapped"))
    assert a.fingerprint("train") == b.fingerprint("train") != swapped.fingerprint("train")
    assert a.fingerprint("val") == swapped.fingerprint("val") != b.fingerprint("val")


# ---- Python's standard library -----------------------------------------------------------------------------


@pytest.fixture
def stdlib_root(tmp_path, monkeypatch):
    root = tmp_path / "python3"
    monkeypatch.setattr(dataset.sysconfig, "get_path", lambda name: str(root))
    return root


def write_sources(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")


def names_of(shards, root):
    return [path.relative_to(root).as_posix() for shard in shards for path in shard.paths]


def test_stdlib_takes_sources_alone(stdlib_root):
    write_sources(stdlib_root, ["os.py", "json/decoder.py", "test/x.py"])
    packages = ["site-packages/a.py", "dist-packages/a.py", ".venv/lib/a.py", "env/lib/a.py"]
    write_sources(stdlib_root, [*packages, "__pycache__/a.py", "notes.txt", "x.pyc"])
    (stdlib_root / "env/pyvenv.cfg").touch()
    corpus = open_corpus("stdlib")
    names = sorted(names_of(corpus.train + corpus.val, stdlib_root))
    assert names == ["json/decoder.py", "os.py", "test/x.py"]
    assert [s.name for s in corpus.train + corpus.val] == ["train", "val"]


def test_stdlib_skips_empty_and_non_utf8_files(stdlib_root):
    write_sources(stdlib_root, ["os.py"])
    (stdlib_root / "latin.py").write_bytes(b"# na\xefve")
    (stdlib_root / "empty.py").touch()
    corpus = open_corpus("stdlib")
    assert [*corpus.documents("train"), *corpus.documents("val")] == ["# os.py\n"]


def test_stdlib_order_and_split_do_not_depend_on_other_files_or_on_listing_order(stdlib_root, monkeypatch):
    names = [f"{folder}/m{i}.py" for folder in ("b", "a", "a/c") for i in range(100)]
    write_sources(stdlib_root, names)
    before = open_corpus("stdlib")
    train = names_of(before.train, stdlib_root)
    val = names_of(before.val, stdlib_root)
    assert train == sorted(train) and val == sorted(val) and sorted(train + val) == sorted(names)
    assert 5 <= len(val) <= 30

    write_sources(stdlib_root, [f"a/new{i}.py" for i in range(50)])
    listing = [(folder, subfolders, files[::-1]) for folder, subfolders, files in os.walk(stdlib_root)][::-1]
    monkeypatch.setattr(dataset.os, "walk", lambda root: listing)
    after = open_corpus("stdlib")
    assert [n for n in names_of(after.train, stdlib_root) if "new" not in n] == train
    assert [n for n in names_of(after.val, stdlib_root) if "new" not in n] == val


def test_stdlib_split_is_pinned():
    """Another hash would silently change everyone's validation text."""
    assert [i for i in range(60) if dataset.is_val(f"package/module{i}.py")] == [17, 22, 26, 43, 47, 55]


def test_no_stdlib_sources(stdlib_root):
    refuses("--data stdlib: no Python source", open_corpus, "stdlib")


def test_this_machines_stdlib():
    corpus = open_corpus("stdlib")
    sizes = {split: sum(map(len, corpus.documents(split))) for split in ("train", "val")}
    assert sizes["train"] > 3_000_000 and 0.01 < sizes["val"] / sizes["train"] < 0.2


# ---- folders -----------------------------------------------------------------------------------------------


def test_last_file_by_name_is_validation(tmp_path):
    for name in ("b.jsonl", "c.jsonl", "a.parquet"):
        write = write_parquet if name.endswith("parquet") else write_jsonl
        write(tmp_path / name, [name])
    write_jsonl(tmp_path / ".z.jsonl", ["hidden"])
    (tmp_path / "z.csv").touch()
    (tmp_path / "zz.jsonl").mkdir()
    corpus = open_corpus(str(tmp_path))
    assert [s.name for s in corpus.train] == ["a.parquet", "b.jsonl"]
    assert [s.name for s in corpus.val] == ["c.jsonl"]
    assert list(corpus.documents("train")) == ["a.parquet", "b.jsonl"]


@pytest.mark.parametrize("name", ["val.jsonl", "validation.jsonl", "val/a.jsonl", "validation/a.jsonl"])
def test_named_validation_wins(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for file in ("a.jsonl", "z.jsonl", name):
        write_jsonl(tmp_path / file, [file])
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.documents("val")) == [name]
    assert list(corpus.documents("train")) == [f for f in ("a.jsonl", "z.jsonl") if f != name]


def test_many_txt_files_are_one_shard(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    corpus = open_corpus(str(tmp_path))
    assert len(corpus.train) == len(corpus.val) == 1
    assert list(corpus.documents("train")) == [f"text {i}" for i in range(9)]
    assert list(corpus.documents("val")) == ["text 9"]


def test_ways_to_name_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "my text"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    for data in (str(folder), f"{folder}/", "../my text", ".", "~/my text"):
        corpus = open_corpus(data)
        assert corpus.name == "my text" and list(corpus.documents("val")) == ["b.txt"]


def test_folders_that_do_not_do(tmp_path):
    def fill(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text("x")
        return str(tmp_path / name)

    for unknown in (str(tmp_path / "absent"), "wikipedia", ""):
        refuses(
            "neither a folder nor one of stdlib, tinystories, climbmix, fineweb-edu, c4", open_corpus, unknown
        )
    refuses("a file; give the folder it is in", open_corpus, fill("f", "a.txt") + "/a.txt")
    refuses("no .parquet, .jsonl, .txt file", open_corpus, fill("empty"))
    refuses("no .parquet, .jsonl, .txt file", open_corpus, fill("other", "a.csv", ".a.txt"))
    refuses(
        "val: no .parquet, .jsonl, .txt file", open_corpus, fill("empty val", "a.txt", "b.txt", "val/c.csv")
    )
    refuses("only a.txt", open_corpus, fill("one", "a.txt"))
    refuses("only val.txt", open_corpus, fill("val alone", "val.txt"))


def test_unreadable_folder(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    refuses(f"--data {tmp_path}: Permission denied", open_corpus, str(tmp_path))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
def test_real_shards():
    corpus = open_corpus(str(DATA))
    assert corpus.name == "tinystories"
    assert len(list(corpus.documents("val"))) == 400
    assert sum(len(list(corpus.documents(split))) for split in ("train", "val")) == 7151


# ---- downloaded sets ---------------------------------------------------------------------------------------


def test_downloaded_set_keeps_its_validation_however_much_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "data" / "climbmix"
    command = "run: python -m nanochat.dataset --data climbmix"
    refuses(command, open_corpus, "climbmix")
    write_parquet(folder / "shard_00003.parquet", ["three"])
    refuses(f"the validation file shard_06542.parquet is missing; {command}", open_corpus, "climbmix")
    write_parquet(folder / "shard_06542.parquet", ["val"])
    one = open_corpus("climbmix")
    write_parquet(folder / "shard_06541.parquet", ["last"])
    write_parquet(folder / "shard_00000.parquet", ["zero"])
    write_parquet(folder / "zzz.parquet", ["not of the set"])
    three = open_corpus("climbmix")
    assert list(one.documents("train")) == ["three"]
    assert list(three.documents("train")) == ["zero", "three", "last"]
    assert list(one.documents("val")) == list(three.documents("val")) == ["val"]
    assert three.name == "climbmix"
    for file in folder.glob("shard_0000*"):
        file.unlink()
    (folder / "shard_06541.parquet").unlink()
    refuses(command, open_corpus, "climbmix")


def test_import_is_light():
    heavy = ["torch", "matplotlib", "pyarrow", "huggingface_hub"]
    code = f"import sys, nanochat.dataset; print([m for m in {heavy} if m in sys.modules])"
    root = Path(dataset.__file__).parents[1]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert process.stdout == "[]\n"


# ---- fingerprints that are kept ----------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Every fingerprint is kept; hashed(path) -> (fingerprint, whether the file was read for it)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(fingerprints, "RECORDED_FROM", 0)
    monkeypatch.setattr(fingerprints, "SETTLED_AFTER", -1)
    reads = []
    read = fingerprints.content_hash
    monkeypatch.setattr(fingerprints, "content_hash", lambda path: reads.append(path) or read(path))

    def hashed(path):
        reads.clear()
        return Shard("a", (path,)).fingerprint, bool(reads)

    return hashed


def test_a_large_file_is_hashed_once(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["one"])
    first, read = kept(path)
    assert read and kept(path) == (first, False)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert kept(link) == (first, False)


def test_a_changed_file_is_hashed_again(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["one"])
    first, _ = kept(path)
    before = path.stat()
    write_jsonl(path, ["two"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a program that sets the time back
    second, read = kept(path)
    assert read and second != first
    other = tmp_path / "other.jsonl"
    write_jsonl(other, ["six"])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    assert kept(path)[0] not in (first, second)


def test_what_is_kept_of_fingerprints_may_be_damaged_or_unwritable(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["one"])
    first, _ = kept(path)
    folder = tmp_path / "base/fingerprints"
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    other = whole.replace(whole.split()[6][:5], b"00000")  # a hash that is not this file's
    for content in (b"", b"\xff", whole[:-10], b"x" * 64, other):
        entry.write_bytes(content)
        assert kept(path) == (first, True)
    entry.unlink()
    folder.rmdir()
    folder.touch()
    assert kept(path) == (first, True)


def test_a_file_that_just_changed_is_not_kept(tmp_path, kept, monkeypatch):
    """Within a tick of the file system's clock it could change again without its times changing."""
    monkeypatch.setattr(fingerprints, "SETTLED_AFTER", 100)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["one"])
    assert kept(path)[1] and kept(path)[1]
