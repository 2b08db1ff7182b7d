"""Reading the documents of a file: parquet, JSON lines, a JSON array or plain text.

All but parquet may be compressed. In all formats a row with a null or empty text is an empty document, which
training skips and counts. A row without a field `text`, or with one that is no string, is an error that names
the row.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanochat.errors import InputError, first_line
from nanochat.files import path_in_errors

MAX_DOCUMENT_CHARS = 64 * 2**20  # tokenising takes several times this much memory, in every worker
COMPRESSIONS = (".gz", ".zst")
LINE_FORMATS = (".jsonl", ".ndjson")
FORMATS = (".parquet", *LINE_FORMATS, ".json", ".txt")
FORMAT_NAMES = ".parquet, .jsonl, .json or .txt, and .gz or .zst of the last three"  # for messages
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")

ARRAY_BLOCK = 2**16  # bytes of a JSON array that are read together

# Python refuses to convert an integer of 5,000 digits, though it is valid JSON. Numbers are not used here.
DECODER = json.JSONDecoder(parse_int=float)


def text_format(path: Path) -> str:
    """Which of FORMATS the file's name tells; '' if none."""
    name = path.name.lower()
    compressed = name.endswith(COMPRESSIONS)
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    suffix = next((f for f in FORMATS if name.endswith(f)), "")
    return "" if compressed and suffix == ".parquet" else suffix


def stem(path: Path) -> str:
    """The file's name without the endings of its format and compression."""
    name = path.name
    for suffix in (*COMPRESSIONS, text_format(path)):
        if suffix and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each document in order; the text of an empty document is ''.

    InputError: a file of another format than its name tells, a row that is no document, invalid UTF-8, a
    document longer than MAX_DOCUMENT_CHARS.
    """
    with path_in_errors(path):
        for place, text in read_format(path):
            if len(text) > MAX_DOCUMENT_CHARS:
                raise too_long(place)
            yield place, text


def text_bytes(path: Path) -> int:
    """About how many bytes of text a file has, without reading it."""
    size = path.stat().st_size
    if path.suffix.lower() in COMPRESSIONS:
        return 3 * size
    if text_format(path) != ".parquet":
        return size
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # who reads the file reports the fault
        metadata = pq.read_metadata(path)
        column = metadata.schema.names.index("text")
        return sum(
            metadata.row_group(i).column(column).total_uncompressed_size
            for i in range(metadata.num_row_groups)
        )
    return size


def read_format(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".py":  # a file of the embedded corpus
        return read_source(path)
    suffix = text_format(path)
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix in LINE_FORMATS:
        return read_json(path, is_array=False)
    if suffix == ".json":
        return read_json(path, is_array=begins_with_bracket(path))
    return read_text(path)


# ---- parquet -----------------------------------------------------------------------------------------------


def read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow as pa  # here: the embedded corpus does not need it
    import pyarrow.parquet as pq

    with open(path, "rb") as f:
        try:
            parquet = pq.ParquetFile(f)
            check_text_column(path, parquet.schema_arrow)
            row = 0
            for batch in parquet.iter_batches(batch_size=64, columns=["text"]):  # rows may be long
                for value in as_bytes(batch.column(0)):
                    row += 1
                    place = f"{path}: row {row}"
                    yield place, decode(value.as_py() or b"", place)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{path}: not a readable parquet file ({first_line(e)})") from None


def check_text_column(path: Path, schema):
    """InputError unless there is a column `text` of strings, plain or dictionary-encoded."""
    types = {field.name: field.type for field in schema}
    kind = types.get("text")
    kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if str(kind) not in TEXT_TYPES:
        columns = ", ".join(f"{name}: {type}" for name, type in types.items())
        raise InputError(f"{path}: no string column 'text' (it has {columns or 'no columns'})")


def as_bytes(column):
    """The column as bytes: pyarrow does not check that strings are valid UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) == "string_view":  # pyarrow has no direct cast to bytes
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary())


# ---- JSON --------------------------------------------------------------------------------------------------


def read_json(path: Path, is_array: bool) -> Iterator[tuple[str, str]]:
    with open_decompressed(path) as f:
        yield from json_array(f, path) if is_array else json_lines(f, path)


def json_lines(f, path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each object, one on a line."""
    for line_number, line in enumerate(iter(lambda: f.readline(max_bytes() + 1), b""), 1):
        if line.isspace():
            continue
        place = f"{path}: line {line_number}"
        try:
            row = DECODER.decode(decode(line, place).rstrip())
        except json.JSONDecodeError as e:
            raise not_a_document(place, f"invalid JSON at column {e.colno}: {e.msg}") from None
        except RecursionError:
            raise not_a_document(place, "nested too deeply") from None
        yield place, text_field(row, place)


def json_array(f, path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each object or string, read in parts: the file may be larger than memory."""
    stream = CharacterStream(f, path)
    stream.skip(" \t\r\n")
    stream.position += 1  # the bracket
    while True:
        stream.skip(" \t\r\n,")
        if stream.text[stream.position] == "]":
            return
        place = f"{path}: item {stream.items + 1}"
        try:
            item, end = DECODER.raw_decode(stream.text, stream.position)
        except RecursionError:
            raise not_a_document(place, "nested too deeply") from None
        except json.JSONDecodeError as e:  # invalid, or the rest of the item is not read yet
            reason = f"invalid JSON at its character {e.pos - stream.position + 1}: {e.msg}"
            if len(stream.text) - stream.position > max_bytes():
                reason = f"{reason}, or more than {MAX_DOCUMENT_CHARS:,} characters"
                raise not_a_document(place, reason) from None
            if not stream.read_more():
                raise not_a_document(place, reason) from None
            continue
        stream.end_item(end)
        yield place, text_field({"text": item} if isinstance(item, str) else item, place)


class CharacterStream:
    """Decodes a file in blocks. The characters of `text` from `position` on are read and not used yet."""

    def __init__(self, f, path: Path):
        self.file = f
        self.path = path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0  # in the text
        self.items = 0  # read so far
        self.block = ARRAY_BLOCK

    def read_more(self) -> bool:
        """Read another block; False at the end of the file. Blocks grow: after each one the item is tried."""
        data = self.file.read(self.block)
        try:
            self.text = self.text[self.position :] + self.decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            message = f"{self.path}: invalid UTF-8 after item {self.items}; convert the file to UTF-8"
            raise InputError(message) from None
        self.position = 0
        self.block = 2 * self.block
        return bool(data)

    def skip(self, characters: str):
        """Move to the next character that is none of these. InputError at the end of the file."""
        while self.position < len(self.text) or self.read_more():
            if self.position < len(self.text):
                if self.text[self.position] not in characters:
                    return
                self.position += 1
        raise InputError(f"{self.path}: cut off after item {self.items}: the array has no end")

    def end_item(self, position: int):
        self.items += 1
        self.position = position
        self.block = ARRAY_BLOCK


def text_field(row, place: str) -> str:
    """The text of a row, '' for null. InputError, with the reason, if it has none."""
    if not isinstance(row, dict):
        raise not_a_document(place, f"it is {json_kind(row)}")
    if "text" not in row:
        keys = list(map(repr, row))
        if len(keys) > 8:
            keys[8:] = ["…"]
        raise not_a_document(place, f"its keys are {', '.join(keys)}" if row else "it has no keys")
    text = row["text"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise not_a_document(place, f"its 'text' is {json_kind(text)}")
    if not is_text(text):
        raise not_a_document(place, "its 'text' has half of a surrogate pair, which is no character")
    return text


def json_kind(value) -> str:
    """The kind of a JSON value, in words."""
    words = {dict: "an object", list: "a list", str: "a string", float: "a number", bool: "a boolean"}
    return words.get(type(value), "null")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can escape half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def not_a_document(place: str, reason: str) -> InputError:
    return InputError(f"{place}: not a JSON object with a string 'text' ({reason})")


def begins_with_bracket(path: Path) -> bool:
    with open_decompressed(path) as f:
        return f.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def holds_no_text(path: Path) -> bool:
    """Whether a .json file holds settings or describes a data set.

    Such a file is neither an array nor lines of which the first has a field `text`. False for a file that
    cannot be read: whoever reads it gets the error.
    """
    try:
        if begins_with_bracket(path):
            return False
        with open_decompressed(path) as f:
            line = f.readline(max_bytes() + 1)
            while line.isspace():
                line = f.readline(max_bytes() + 1)
        row = DECODER.decode(line.decode("utf-8-sig"))
    except InputError:
        return False
    except (ValueError, RecursionError):
        return True
    return not (isinstance(row, dict) and "text" in row)


# ---- plain text, compressed files --------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix.lower() not in COMPRESSIONS and path.stat().st_size > max_bytes():
        raise too_long(path)
    with open_decompressed(path) as f:
        yield str(path), decode(f.read(max_bytes() + 1), path)


def read_source(path: Path) -> Iterator[tuple[str, str]]:
    """read_text without empty files, and without CPython's few files in other encodings (tests of codecs)."""
    with contextlib.suppress(InputError):
        for place, text in read_text(path):
            if text:
                yield place, text


@contextlib.contextmanager
def open_decompressed(path: Path):
    """Open a file for reading its decompressed bytes, with `peek`.

    InputError if it is not compressed as its name tells.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        try:
            with gzip.open(path, "rb") as f:
                yield f
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise InputError(f"{path}: not a readable gzip file ({first_line(e)})") from None
    elif suffix == ".zst":
        import pyarrow as pa

        try:
            with io.BufferedReader(pa.input_stream(str(path), compression="zstd")) as f:
                yield f
        except (pa.ArrowException, OSError) as e:
            if getattr(e, "errno", None) is not None:  # an error of the file system
                raise
            raise InputError(f"{path}: not a readable zstd file ({first_line(e)})") from None
    else:
        with open(path, "rb") as f:
            yield f


def decode(data: bytes, place) -> str:
    if len(data) > max_bytes():
        raise too_long(place)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as e:
        message = f"{place}: invalid UTF-8 at byte {e.start}; convert the file to UTF-8"
        raise InputError(message) from None
    return text


def max_bytes() -> int:
    return 4 * MAX_DOCUMENT_CHARS  # a character takes at most 4 bytes


def too_long(place) -> InputError:
    return InputError(f"{place}: a document of more than {MAX_DOCUMENT_CHARS:,} characters; split it")
