"""What a disk holds after a power cut, from the log of faulty_files.c.

A file's content is safe once the file was synced, and a name once its folder was. Of what was not synced, a
cut may keep anything that the order of the calls allows:

    strict      nothing. A file that was never synced is empty, or as it was at its last sync.
    journal     names up to some call before the cut (a journal keeps their order); of data, some of the
                blocks of 4096 bytes, zeros in the others. The choice is drawn from a seed.
"""

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096


@dataclass
class File:
    content: bytearray = field(default_factory=bytearray)
    safe: bytes = b""  # as of the last sync
    pending: list = field(default_factory=list)  # (offset, data) and (size,), since then

    def write(self, offset: int, data: bytes):
        if len(self.content) < offset:
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def truncate(self, size: int):
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        self.pending.append((size,))

    def sync(self):
        self.safe = bytes(self.content)
        self.pending = []

    def after_cut(self, rng: random.Random | None) -> bytes:
        if rng is None or not self.pending:
            return self.safe
        content = bytearray(self.safe)
        for change in self.pending[: rng.randint(0, len(self.pending))]:
            if len(change) == 1:
                del content[change[0] :]
                content.extend(bytes(change[0] - len(content)))
                continue
            offset, data = change
            if len(content) < offset + len(data):
                content.extend(bytes(offset + len(data) - len(content)))
            for begin in range(0, len(data), BLOCK):
                if rng.random() < 0.5:
                    part = data[begin : begin + BLOCK]
                    content[offset + begin : offset + begin + len(part)] = part
        return bytes(content)


@dataclass
class Folder:
    names: dict = field(default_factory=dict)  # name -> File, Folder or Link
    safe: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)  # (number of the call, name, what is there then or None)

    def put(self, number: int, name: str, thing):
        if thing is None:
            self.names.pop(name, None)
        else:
            self.names[name] = thing
        self.pending.append((number, name, thing))

    def sync(self):
        self.safe = dict(self.names)
        self.pending = []

    def after_cut(self, journal: int) -> dict:
        """journal: the number of the last call whose name survived."""
        names = dict(self.safe)
        for number, name, thing in self.pending:
            if number > journal:
                break
            if thing is None:
                names.pop(name, None)
            else:
                names[name] = thing
        return names


@dataclass
class Link:
    target: str


class Disk:
    """The tree below `root`, as it is now and as a cut would leave it."""

    def __init__(self, root: Path):
        """root: a real folder. All that is in it is safe."""
        self.root = str(root)
        self.files = {}  # inode -> File, of files that are open or have a name
        self.top = self.read(root)

    def read(self, path: Path):
        folder = Folder()
        self.files[path.stat().st_ino] = folder
        for child in sorted(path.iterdir()):
            if child.is_symlink():
                folder.names[child.name] = Link(os.readlink(child))
            elif child.is_dir():
                folder.names[child.name] = self.read(child)
            else:
                file = File(bytearray(child.read_bytes()))
                file.sync()
                folder.names[child.name] = file
                self.files[child.stat().st_ino] = file
        folder.sync()
        return folder

    def inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def place(self, path: str) -> tuple[Folder, str]:
        """(the folder of a path, the name in it)."""
        *folders, name = path[len(self.root) :].strip("/").split("/")
        folder = self.top
        for part in folders:
            folder = folder.names[part]
        return folder, name

    def at(self, path: str):
        if path == self.root:
            return self.top
        folder, name = self.place(path)
        return folder.names.get(name)

    def apply(self, number: int, change: dict):
        kind, inode, path, target = (change[key] for key in ("kind", "inode", "path", "target"))
        if kind == "write":
            if inode in self.files:
                self.files[inode].write(change["offset"], change["data"])
        elif not self.inside(path):
            return
        elif kind == "truncate":
            self.files[inode].truncate(change["offset"])
        elif kind == "fsync":
            self.files[inode].sync()
        elif kind in ("create", "mkdir"):
            folder, name = self.place(path)
            self.files[inode] = File() if kind == "create" else Folder()
            folder.put(number, name, self.files[inode])
        elif kind == "rename":
            thing = self.at(path)
            folder, name = self.place(target)
            folder.put(number, name, thing)
            folder, name = self.place(path)
            folder.put(number, name, None)
        elif kind == "link":
            folder, name = self.place(target)
            folder.put(number, name, self.at(path))
        elif kind == "symlink":
            folder, name = self.place(path)
            folder.put(number, name, Link(target))
        elif kind in ("unlink", "rmdir"):
            folder, name = self.place(path)
            folder.put(number, name, None)
        else:
            raise ValueError(f"unknown change: {kind}")

    def write_out(self, to: Path, rng: random.Random | None, journal: int):
        """Make the tree that a cut now would leave. rng: of the variant 'journal', else None."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        write_folder(
            self.top.after_cut(journal),
            to,
            lambda thing: thing.after_cut(journal),
            lambda file: file.after_cut(rng),
        )

    def write_now(self, to: Path):
        """Make the tree as it is before a cut."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        write_folder(self.top.names, to, lambda thing: thing.names, lambda file: bytes(file.content))


def write_folder(names: dict, to: Path, names_of, hashed_content):
    for name, thing in names.items():
        if isinstance(thing, Folder):
            (to / name).mkdir()
            write_folder(names_of(thing), to / name, names_of, hashed_content)
        elif isinstance(thing, Link):
            os.symlink(thing.target, to / name)
        else:
            (to / name).write_bytes(hashed_content(thing))


def read_log(path: Path) -> list[dict]:
    changes = []
    with open(path, "rb") as f:
        while line := f.readline():
            kind, inode, offset, size, name, target = line.decode().rstrip("\n").split("\t")
            changes.append(
                {
                    "kind": kind,
                    "inode": int(inode),
                    "offset": int(offset),
                    "data": f.read(int(size)),
                    "path": name,
                    "target": target,
                }
            )
    return changes


def cuts(disk: Disk, changes: list[dict], points: list[int], to: Path, seed: int | None = None):
    """Make in `to`, one after the other, what a power cut after the first N changes leaves, for each N of
    `points`; yields N each time. disk: as it was before the first change. seed: None for the strict variant.
    """
    done = 0
    for point in sorted(points):
        for number, change in enumerate(changes[done:point], done + 1):
            disk.apply(number, change)
        done = point
        rng = None if seed is None else random.Random(f"{seed} {point}")
        disk.write_out(to, rng, rng.randint(0, point) if rng else 0)
        yield point
