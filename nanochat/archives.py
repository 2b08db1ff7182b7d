"""Downloading and unpacking a zip archive, within limits of size and time."""

import hashlib
import os
import re
import stat
import threading
import time
import zipfile
from pathlib import Path, PurePosixPath

from nanochat.arguments import quoted
from nanochat.errors import InputError, first_line
from nanochat.files import create_folder, open_new, sync, sync_folder

# CORE's bundle has about 25 MB packed and 160 MB unpacked, in about 100 files.
MAX_PACKED = 256 * 2**20  # bytes
MAX_UNPACKED = 512 * 2**20  # bytes
MAX_FILES = 10_000
MAX_DEPTH = 20  # folders inside each other
MAX_SECONDS = 3600.0  # of a download
QUIET_SECONDS = 60.0  # in this time at least QUIET_BYTES must arrive
QUIET_BYTES = 2**16
BLOCK_BYTES = 2**16
LIMITS = (
    f"at most {MAX_PACKED >> 20} MiB packed, {MAX_UNPACKED >> 20} MiB unpacked and {MAX_FILES:,} files "
    "are taken"
)


# ---- downloading -------------------------------------------------------------------------------------------


class Download:
    """A download in its own thread. Whatever the server does, the program waits a limited time for it.

    The time limits of a connection are not enough: a server may send one byte a minute.
    """

    def __init__(self, url: str, path: Path):
        self.url = url
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        self.failure = ""
        self.ended = threading.Event()
        self.abandoned = threading.Event()
        threading.Thread(target=self._run, name="download", daemon=True).start()

    def wait(self) -> str:
        """The SHA-256 of the file. InputError if it did not arrive complete, in time, within the limits."""
        begin = since = time.monotonic()
        size = 0
        try:
            while not self.ended.wait(0.05):
                now = time.monotonic()
                if now - begin > MAX_SECONDS:
                    raise InputError(f"not there after {MAX_SECONDS:.0f} s")
                if now - since > QUIET_SECONDS:
                    if self.size - size < QUIET_BYTES:
                        raise InputError(f"{self.size - size:,} bytes in {QUIET_SECONDS:.0f} s")
                    since = now
                    size = self.size
        finally:
            self.abandoned.set()
        if self.failure:
            raise InputError(self.failure)
        return self.digest.hexdigest()

    def _run(self):
        try:
            self._fetch()
        except InputError as e:
            self.failure = str(e)
        except Exception as e:  # of a socket, TLS, HTTP, the address it redirects to, the disk
            self.failure = first_line(e) or type(e).__name__
        self.ended.set()

    def _fetch(self):
        import urllib.request  # here: it takes 0.2 s, and only a download needs it

        with urllib.request.urlopen(self.url, timeout=QUIET_SECONDS) as answer, open_new(self.path) as f:
            length = answer.headers.get("Content-Length") or ""
            announced = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            if announced and announced > MAX_PACKED:
                raise InputError(f"{announced:,} bytes announced; {LIMITS}")
            while (block := answer.read1(BLOCK_BYTES)) and not self.abandoned.is_set():
                self.digest.update(block)
                self.size += f.write(block)
                if self.size > MAX_PACKED:
                    raise InputError(f"more than {MAX_PACKED:,} bytes came; {LIMITS}")
        if announced is not None and self.size != announced:
            raise InputError(f"{self.size} of {announced} bytes arrived")


def fetch(url: str, path: Path) -> str:
    """Download into a new file; returns its SHA-256. InputError: see Download.wait."""
    return Download(url, path).wait()


# ---- unpacking ---------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path):
    """Unpack a zip archive into a new folder. The files survive a power cut.

    InputError if the archive is damaged or exceeds a limit, or holds a link, a device, or a path that leads
    out of the folder.
    """
    try:
        check_directory(archive)
        with zipfile.ZipFile(archive) as z:
            check_entries(z.infolist())
            remaining = MAX_UNPACKED
            for entry in z.infolist():
                remaining -= unpack_entry(z, entry, folder, remaining)
    except (InputError, OSError):
        raise
    except Exception as e:  # zipfile and its decompressors raise many kinds
        raise InputError(first_line(e) or type(e).__name__) from None
    for subfolder, _, _ in os.walk(folder):
        sync_folder(Path(subfolder))


def check_directory(archive: Path):
    """InputError if the list of files is too long for MAX_FILES files: zipfile reads all of it at once.

    The archive ends with a record of 22 bytes, and perhaps a comment. Bytes 12 to 15 of the record are the
    length of the list. Archives above 4 GiB (Zip64) have another record of 20 bytes before it.
    """
    size = archive.stat().st_size
    with open(archive, "rb") as f:
        f.seek(max(0, size - 2**16 - 22))
        tail = f.read()
    signature = b"PK\5\6"
    start = tail.rfind(signature)
    if tail[-22:-18] == signature and tail.endswith(b"\0\0"):  # no comment after it
        start = len(tail) - 22
    if start < 0 or len(tail) < start + 22:
        raise InputError("File is not a zip file")
    length = int.from_bytes(tail[start + 12 : start + 16], "little")
    is_zip64 = tail[max(0, start - 20) : start].startswith(b"PK\6\7")
    if length > 512 * MAX_FILES or is_zip64:
        raise InputError(f"the archive lists too many files; {LIMITS}")


def check_entries(entries: list[zipfile.ZipInfo]):
    """InputError if an entry is no file or folder, or has an odd name, or all exceed the limits."""
    if len(entries) > MAX_FILES:
        raise InputError(f"the archive holds {len(entries):,} files; {LIMITS}")
    if (size := sum(entry.file_size for entry in entries)) > MAX_UNPACKED:
        raise InputError(f"the archive unpacks to {size:,} bytes; {LIMITS}")
    for entry in entries:
        name = quoted(entry.filename)
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"the archive holds the path {name}, which leads out of its folder")
        if not entry.filename.isprintable() or "\\" in entry.filename or len(path.parts) > MAX_DEPTH:
            raise InputError(f"the archive holds the path {name}, which is no ordinary one")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"the archive holds {name}, a link or a device")


def unpack_entry(z: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, remaining: int) -> int:
    """Unpack one file of at most `remaining` bytes; returns its size. zipfile checks its checksum."""
    path = folder / entry.filename
    if entry.is_dir():
        create_folder(path)
        return 0
    create_folder(path.parent)
    size = 0
    with z.open(entry) as source, open_new(path) as f:
        while block := source.read(BLOCK_BYTES):
            size += f.write(block)
            if size > remaining:
                raise InputError(f"the archive unpacks to more than {MAX_UNPACKED:,} bytes; {LIMITS}")
        sync(f)
    return size
