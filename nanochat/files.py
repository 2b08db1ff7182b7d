"""Writing files that are either complete or absent, also after a power cut, and reading JSON files safely.

The disk stores a file's content with the file, and its name with the folder. A power cut can lose both until
they are synced: first the file, then the folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.errors import InputError, path_in_errors, shortened

SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors of a file system without sync
MAX_NESTING = 100  # lists and objects inside each other, in JSON
LARGEST_JSON = 2**30  # bytes of a file: several times the size of a tokenizer of 2**24 tokens
TEMPORARY = ".tmp"  # the end of the name of a file that is being written


def write_atomic(path: Path, content: str | bytes):
    """Write a file so that it has either the old or the new content at any moment.

    This holds for a reader, and after a crash, a full disk or a power cut. Once the function returns, the new
    content survives a power cut.
    """
    create_folder(path.parent)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with open_new(temporary) as f:
            f.write(data)
            sync(f)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError):
            e.filename = str(path)
        raise


def open_new(path: Path):
    """Create a file and open it for writing bytes. It has the usual permissions. A link is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


class NoOrdinaryFile(OSError):
    """The path is a pipe, a device or a socket. Reading a pipe might never end."""


def open_file(path: Path):
    """Open an ordinary file for reading bytes. NoOrdinaryFile for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoOrdinaryFile(errno.EINVAL, "no ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def sync(file):
    """Make the content of an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path):
    """Make the content of a file that is already written survive a power cut, if the file system can."""
    with open(path, "rb") as f:
        try:
            os.fsync(f.fileno())
        except OSError as e:
            if e.errno not in (*SYNC_UNSUPPORTED, errno.EROFS):
                e.filename = str(path)
                raise


def sync_folder(folder: Path):
    """Make the names in a folder survive a power cut, if the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in SYNC_UNSUPPORTED:
            e.filename = str(folder)
            raise
    finally:
        os.close(descriptor)


def create_folder(folder: Path):
    """Create a folder, and the folders around it, where they are missing. They survive a power cut."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove_temporary(folder: Path, *names: str):
    """Remove the temporary files of killed writers. The caller knows that no process writes these names."""
    for name in names:
        for temporary in folder.glob(f".{name}.*{TEMPORARY}"):
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    return digest_file(path, hashlib.sha256()).hexdigest()


def digest_file(path: Path, digest, size: int = sys.maxsize):
    """Update the digest with the first `size` bytes of a file, or with all of a shorter file; return it."""
    with path_in_errors(path), open_file(path) as f:
        while size > 0 and (block := f.read(min(2**22, size))):
            digest.update(block)
            size -= len(block)
    return digest


def check_out(flag: str, path: Path, is_file: bool = False):
    """InputError if results cannot be written to `path`, a folder or a file. Called before computing them."""
    folder = path.absolute().parent if is_file else path.absolute()
    try:
        if is_file and path.is_dir():
            raise InputError(f"{flag} {path}: is a folder; give a file")
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        if existing.is_dir():
            with tempfile.TemporaryFile(dir=existing):  # permissions do not tell of a read-only file system
                return
    except OSError as e:
        message = f"{flag} {shortened(str(path))}: cannot be written ({e.strerror}); give another place"
        raise InputError(message) from None
    subject = "" if existing == folder else f"{existing} "
    raise InputError(f"{flag} {path}: {subject}is a file; give a folder")


# ---- JSON --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """The content of one kind of JSON file: an object with these keys, and perhaps others.

    The kind of a value is `str`, `int` (no boolean), `float` (any number), `bool`, `list`, `dict`, or a tuple
    of these. remedy: what a user can do about a damaged file.
    """

    name: str
    required: dict[str, type | tuple]
    optional: dict[str, type | tuple] = field(default_factory=dict)
    format: int = 1  # the newest one that this version of the program reads; a file without one has 1
    remedy: str = "restore it"

    def check(self, where: str, content) -> dict:
        """The content itself. InputError, which begins with `where`, if it does not fit the schema."""
        if not isinstance(content, dict):
            raise InputError(f"{where}: not a {self.name} (no JSON object); {self.remedy}")
        written = content.get("format", 1)
        if is_kind(written, int) and written > self.format:
            unknown = sorted(content.keys() - self.required.keys() - self.optional.keys() - {"format"})
            raise InputError(
                f"{where}: a {self.name} of a newer version of this program (format {written}, "
                f"here {self.format}; new: {', '.join(unknown) or 'nothing'}); use that version"
            )
        for key, kind in {**self.required, "format": int, **self.optional}.items():
            if key not in content and key not in self.required:
                continue
            if key not in content or not is_kind(content[key], kind):
                value = shortened(repr(content[key])) if key in content else "missing"
                raise InputError(f"{where}: not a {self.name} ({key}: {value}); {self.remedy}")
        return content


def is_kind(value, kind: type | tuple) -> bool:
    if isinstance(kind, tuple):
        return any(is_kind(value, one) for one in kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def parse_json(text: str):
    """The content of a JSON text; None if it is not valid JSON. json.loads fails with several errors."""
    try:
        content = json.loads(text, parse_int=parse_integer)
    except (ValueError, RecursionError):
        return None
    may_be_deep = text.count("[") + text.count("{") > MAX_NESTING
    return None if may_be_deep and is_deep(content) else content


def is_deep(content) -> bool:
    """Whether lists and objects are nested deeper than MAX_NESTING, too deep for a recursive function."""
    level = [content]
    for _ in range(MAX_NESTING):
        children: list = []
        for value in level:
            if isinstance(value, dict):
                children.extend(value.values())
            elif isinstance(value, list):
                children.extend(value)
        level = children
    return bool(level)


def parse_integer(text: str) -> int:
    """ValueError if the number is too large for a float."""
    if len(text) > 300:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def read_json(path: Path, schema: Schema) -> dict:
    """The object in a JSON file. InputError if it does not fit the schema, OSError if it cannot be read."""
    with path_in_errors(path), open_file(path) as f:
        content = f.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise InputError(f"{path}: not a {schema.name} (more than {LARGEST_JSON:,} bytes); {schema.remedy}")
    return schema.check(str(path), parse_json(content.decode("utf-8", "replace")))


def write_json(path: Path, content: dict):
    write_atomic(path, json.dumps(content, indent=2) + "\n")
