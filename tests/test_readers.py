"""Files of text in all formats: the same rows are the same documents, and a refusal gives the reason."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import readers
from nanochat.dataloader import Rows
from nanochat.dataset import Shard, open_corpus
from nanochat.errors import InputError
from nanochat.readers import read_documents, text_format
from nanochat.tokenizer import load_tokenizer

TEXTS = [
    "one",
    "",
    "two\nlines\r\n",
    "drei – 三 🙂",
    None,
    "\x00 nul \ufeff and \u2028",
    " ",
    '"quotes" \\ \t',
    "x" * 300_000,
]
FORMATS = [
    ".parquet",
    ".jsonl",
    ".ndjson",
    ".json",
    ".jsonl.gz",
    ".json.gz",
    ".jsonl.zst",
    ".json.zst",
    ".JSONL",
]


def compress(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as f:
            f.write(content)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(content)


def write(path, rows: list[dict]):
    """Write rows in the file's format. JSON is an array unless the name tells lines."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "lines" in path.name or "nd" in path.suffix or "jsonl" in path.name.lower():
        compress(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        compress(path, json.dumps(rows, indent=1, ensure_ascii=False).encode())


def texts_of(path):
    return [text for _, text in read_documents(path)]


def refusal(path):
    with pytest.raises(InputError) as e:
        list(read_documents(path))
    assert "\n" not in str(e.value) and str(e.value).startswith(str(path))
    return str(e.value).removeprefix(str(path))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["array", "lines"])
def test_rows_are_the_same_documents_in_all_formats(tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    write(path, [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    assert texts_of(path) == [text or "" for text in TEXTS]
    assert list(Shard("a", (path,)).documents()) == [text for text in TEXTS if text]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "row", [{"id": 1}, {"text": 1}, {"text": ["a"]}, {"text": {"a": "b"}}, {"text": True}]
)
def test_rows_without_a_string_are_refused_in_all_formats(tmp_path, suffix, row):
    path = tmp_path / f"a{suffix}"
    write(path, [row])
    message = refusal(path)
    if suffix == ".parquet":
        assert message.startswith(": no string column 'text' (it has ")
    else:
        assert message.startswith((": line 1", ": item 1"))
        assert ": not a JSON object with a string 'text' (its " in message


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{"content": "x", "id": 1}', "its keys are 'content', 'id'"),
        (b"{}", "it has no keys"),
        (b'{"text": 1}', "its 'text' is a number"),
        (b'{"text": false}', "its 'text' is a boolean"),
        (b'{"text": ["x"]}', "its 'text' is a list"),
        (b'["x"]', "it is a list"),
        (b'"x"', "it is a string"),
        (b"null", "it is null"),
        (b"12", "it is a number"),
        (b'{"text": "x"', "invalid JSON at column 13: Expecting ',' delimiter"),
        (b'{"text": "x"} {"text": "y"}', "invalid JSON at column 15: Extra data"),
        (b"{'text': 'x'}", "invalid JSON at column 2"),
        (b'{"text": "\\ud83d"}', "its 'text' has half of a surrogate pair"),
        (b'{"text": "a\tb"}', "invalid JSON at column 12: Invalid control character"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_refused_line_gives_the_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert refusal(path).startswith(f": line 2: not a JSON object with a string 'text' ({reason}")


@pytest.mark.parametrize(
    "field", ["NaN", "-Infinity", "1e999", "1" * 10_000, "-0.0", '"\\ud800"', "null", '{"text": 5}']
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_odd_values_of_other_fields_do_not_matter(tmp_path, suffix, field):
    path = tmp_path / f"a{suffix}"
    row = f'{{"x": {field}, "text": "fine \\u4e09", "text2": 1}}'
    path.write_text(row + "\r\n" if suffix == ".jsonl" else f"[{row},\r\n{row}]")
    assert set(texts_of(path)) == {"fine 三"}


@pytest.mark.parametrize(
    "content,reason",
    [
        (
            b'[{"text": "a"}, {"text": "b"',
            ": item 2: not a JSON object with a string 'text' (invalid JSON at its character 13",
        ),
        (b'[{"text": "a"}, ', ": cut off after item 1"),
        (b'["a", {"text": "b"},\n 3]', ": item 3: not a JSON object with a string 'text' (it is a number"),
        (b'["a", "\\ud800"]', ": item 2: not a JSON object with a string 'text' (its 'text' has half"),
        (b'["a", "na\xefve"]', ": invalid UTF-8 after item 0"),
        (b"[" * 100_000, ": item 1: not a JSON object with a string 'text' (nested too deeply"),
    ],
)
def test_a_refused_array_gives_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal(path).startswith(reason)


def test_arrays_of_strings_and_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ARRAY_BLOCK", 1)
    texts = ["a", "", "三 🙂 [,]", 'say "x" \\', "long " * 100]
    array = json.dumps(texts, ensure_ascii=False).encode()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf \n" + array + b"\n")
    assert texts_of(tmp_path / "a.json") == texts
    (tmp_path / "a.json").write_text("[]")
    assert texts_of(tmp_path / "a.json") == []


def test_an_array_is_read_without_holding_all_of_it(tmp_path):
    import tracemalloc

    (tmp_path / "a.json").write_text(json.dumps([{"text": "word " * 2000} for _ in range(2000)]))  # 20 MB
    tracemalloc.start()
    assert sum(len(text) for _, text in read_documents(tmp_path / "a.json")) == 2000 * 10_000
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.parametrize(
    "type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), "dictionary", "null"],
    ids=str,
)
def test_kinds_of_parquet_columns(tmp_path, type):
    texts = [None, None] if type == "null" else ["drei – 三", None, "", "drei – 三"]
    column = pa.array(texts, None if type in ("dictionary", "null") else type)
    if type == "dictionary":
        column = column.dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == [text or "" for text in texts]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_compressed_txt_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    compress(path, "\ufeffone\r\nzwei – 三".encode())
    assert texts_of(path) == ["one\r\nzwei – 三"]


@pytest.mark.parametrize(
    "suffix,kind",
    [
        (".jsonl.gz", "gzip"),
        (".txt.gz", "gzip"),
        (".json.zst", "zstd"),
        (".jsonl.zst", "zstd"),
        (".txt.zst", "zstd"),
    ],
)
def test_damaged_compressed_files(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    compress(path, b'{"text": "x"}\n' * 1000)
    whole = path.read_bytes()
    for broken in (b"not compressed", whole[:-5], whole[:12]):
        path.write_bytes(broken)
        assert refusal(path).startswith(f": not a readable {kind} file (")


def test_long_documents_are_refused_in_all_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARS", 1000)
    for suffix in (*FORMATS, ".txt", ".txt.gz", ".txt.zst"):
        for text in ("x" * 1000, "x" * 1001, "x" * 9000):
            path = tmp_path / f"a{suffix}"
            if ".txt" in suffix:
                compress(path, text.encode())
            else:
                write(path, [{"text": text}])
            if len(text) == 1000:
                assert texts_of(path) == [text]
            else:
                assert "more than 1,000 characters" in refusal(path)


def test_formats_by_name():
    from pathlib import Path

    names = {
        "a.parquet": ".parquet",
        "a.b.JSONL": ".jsonl",
        "a.json.gz": ".json",
        "a.txt.zst": ".txt",
        "a.parquet.gz": "",
        "a.gz": "",
        "txt": "",
        "a.jsonl.bz2": "",
        "a.ndjson.gz": ".ndjson",
        "a.zst": "",
    }
    assert {name: text_format(Path(name)) for name in names} == names


def test_a_folder_of_mixed_formats_is_read_whole(tmp_path):
    for i, suffix in enumerate(FORMATS):
        write(tmp_path / f"{i}-x{suffix}", [{"text": suffix}, {"text": suffix + " again"}])
    compress(tmp_path / "a.txt.gz", b"a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "settings.json").write_text('{"name": "x"}')
    (tmp_path / "pretty.json").write_text('{\n  "text": "one object"\n}')
    (tmp_path / "val.jsonl").write_text('{"text": "v"}\n')
    corpus = open_corpus(str(tmp_path))
    rows = [text for suffix in FORMATS for text in (suffix, suffix + " again")]
    assert list(corpus.documents("train")) == [*rows, "a", "b"]
    assert corpus.left_out == {"no text": ["pretty.json", "settings.json"]}


def test_rows_without_text_are_counted_and_said_once(base_dir, tmp_path, capsys):
    write(tmp_path / "a.jsonl", [{"text": None}, {"text": "the cat"}, {"text": ""}] * 1000)
    write(tmp_path / "b.parquet", [{"text": "the cat"}, {"text": None}] * 20)
    write(tmp_path / "val.jsonl", [{"text": "the cat"}])
    capsys.readouterr()
    for _ in range(2):
        Rows(open_corpus(str(tmp_path)).train, load_tokenizer(), 32)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a.jsonl: 2,000 of 3,000 documents are empty (no text, or null): skipped",
        "b.parquet: 20 of 40 documents are empty (no text, or null): skipped",
    ]
