"""Files that are whole or not there, and that survive a power cut.

A file keeps its content, and its folder keeps its name. A power cut may take either until it is synced:
first the file, then the folder.
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

from nanochat.errors import InputError, named, shortened

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a file system says that cannot
MAX_NESTING = 100  # lists and objects in one another, in JSON
LARGEST_JSON = 2**30  # bytes of a file: several times what a tokenizer of 2**24 tokens takes
TEMPORARY = ".tmp"  # ends the name of a file that is being written


def write_atomic(path: Path, content: str | bytes):
    """Write a file so that a reader, a crash, a full disk or a power cut sees the old content or the new.

    Once this returns, the new content is there to stay.
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
    """A new file, open for writing bytes, with the permissions that the umask leaves. Not through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


class NoOrdinaryFile(OSError):
    """A pipe, which would never end, a device or a socket."""


def open_file(path: Path):
    """An ordinary file, open for reading bytes. NoOrdinaryFile if it is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoOrdinaryFile(errno.EINVAL, "no ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def sync(file):
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path):
    """The same for a file that somebody else wrote, where the file system can be asked for that."""
    with open(path, "rb") as f:
        try:
            os.fsync(f.fileno())
        except OSError as e:
            if e.errno not in (*NO_SYNC, errno.EROFS):
                e.filename = str(path)
                raise


def sync_folder(folder: Path):
    """Make the names in a folder survive a power cut, where the file system can be asked for that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NO_SYNC:
            e.filename = str(folder)
            raise
    finally:
        os.close(descriptor)


def create_folder(folder: Path):
    """The folder and those around it, where they are missing, there to stay."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove_temporary(folder: Path, *names: str):
    """Remove what killed processes left of writing the files of these names. Nobody may write them now."""
    for name in names:
        for left in folder.glob(f".{name}.*{TEMPORARY}"):
            left.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    return digest_file(path, hashlib.sha256()).hexdigest()


def digest_file(path: Path, digest, size: int = sys.maxsize):
    """The digest, updated with the first `size` bytes of a file, or with fewer if it has fewer."""
    with named(path), open_file(path) as f:
        while size > 0 and (block := f.read(min(2**22, size))):
            digest.update(block)
            size -= len(block)
    return digest


def check_out(flag: str, path: Path, is_file: bool = False):
    """InputError if results cannot be written there; ask before they are computed. path:
    a folder, or a file.
    """
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
    raise InputError(f"{flag} {path}: {'' if existing == folder else f'{existing} '}is a file; give a folder")


# ---- JSON --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """What a JSON file of one kind holds: an object with these keys, and perhaps others.

    A value's kind is `str`, `int` (no boolean), `float` (any number), `bool`, `list`, `dict`, or a tuple of
    these.
    remedy: what the user of a damaged file can do.
    """

    name: str
    required: dict[str, type | tuple]
    optional: dict[str, type | tuple] = field(default_factory=dict)
    format: int = 1  # the newest that this version of the program knows; a file without one has format 1
    remedy: str = "restore it"

    def check(self, where: str, content) -> dict:
        """The content itself. InputError, beginning with `where`, if it is none of this kind."""
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
    """What a text says in JSON; None where it is none: json.loads fails in several ways, by the text."""
    try:
        content = json.loads(text, parse_int=parse_integer)
    except (ValueError, RecursionError):
        return None
    may_be_deep = text.count("[") + text.count("{") > MAX_NESTING
    return None if may_be_deep and is_deep(content) else content


def is_deep(content) -> bool:
    """Whether lists and objects lie so deep in one another that a function which follows them may fail."""
    level = [content]
    for _ in range(MAX_NESTING):
        inner = [part for part in level if isinstance(part, (dict, list))]
        level = [value for part in inner for value in (part.values() if isinstance(part, dict) else part)]
    return bool(level)


def parse_integer(text: str) -> int:
    """ValueError if it is too large to be used as a float."""
    if len(text) > 300:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def read_json(path: Path, schema: Schema) -> dict:
    """The object in a JSON file. InputError if it is no such one, OSError if it cannot be read."""
    with named(path), open_file(path) as f:
        content = f.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise InputError(f"{path}: not a {schema.name} (more than {LARGEST_JSON:,} bytes); {schema.remedy}")
    return schema.check(str(path), parse_json(content.decode("utf-8", "replace")))


def write_json(path: Path, content: dict):
    write_atomic(path, json.dumps(content, indent=2) + "\n")
