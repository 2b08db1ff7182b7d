"""The tensors of a checkpoint, in the format of torch.distributed.checkpoint.

    __0_0.distcp, __1_0.distcp, …   the tensors, or the boxes of tensors, that process 0, 1, … has written
    __0_0.json, __1_0.json, …       where each of them is in that file, and the file's SHA-256
    .metadata                       the same as a pickle, for torch's own tools

Each process writes its own shard of every trained tensor. A tensor is read whole or in part, whatever the
number of processes was. What is read is the JSON and, with weights_only=True, the tensors: loading cannot
execute code. Nothing here reads .metadata.
"""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.errors import InputError, first_line, path_in_errors
from nanochat.files import Schema, open_file, open_new, read_json, sha256, sync, write_atomic

SHARD = Schema("checkpoint's list of tensors", {"sha256": str, "tensors": list, "values": list})
TORCH_INDEX = ".metadata"  # the name that torch.distributed.checkpoint gives it


def data_file(rank: int) -> str:
    return f"__{rank}_0.distcp"


def list_file(rank: int) -> str:
    return f"__{rank}_0.json"


# ---- what is written ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Entries of a flattened tensor of the training state, from `start` on. Or a value that is no tensor.

    path: the keys of the nested dicts that lead to it. shape: of the whole tensor.
    """

    path: tuple[str, ...]
    value: Any
    start: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape if self.shape is None else self.shape)

    def on_cpu(self) -> "Piece":
        """A piece whose tensor is on the CPU: the same one, or a copy from another device."""
        value = self.value.detach().cpu() if isinstance(self.value, torch.Tensor) else self.value
        return Piece(self.path, value, self.start, self.shape)


def leaves(state, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """(path, value) of all that nested dicts hold. An empty dict inside is a value."""
    if isinstance(state, Mapping) and len(state):
        for key in state:
            yield from leaves(state[key], (*path, key))
    elif path:
        yield path, state


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[tuple[tuple, tuple]]:
    """(offsets, sizes) of the boxes that entries start to end of a flattened tensor fill, in their order.

    torch's format knows boxes only. Of a matrix (5, 4), entries 2 to 13 are the end of a row, two whole rows
    and the beginning of a row: ((0, 2), (1, 2)), ((1, 0), (2, 4)), ((3, 0), (1, 1)).
    """
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    if row == 0 or start == end:
        return [((0,) * len(shape), shape)] if math.prod(shape) == 0 else []
    first = -(-start // row)  # the rows from first to last are whole
    last = end // row
    parts = [(last, start - last * row, end - last * row)]  # all within one row
    if first <= last:
        parts = [(first - 1, start - (first - 1) * row, row), (last, 0, end - last * row)]
    found = []
    for i, low, high in parts:
        inside = boxes(shape[1:], low, high) if low < high else []
        found += [((i, *offsets), (1, *sizes)) for offsets, sizes in inside]
    if first < last:
        whole_rows = ((first, *[0] * len(shape[1:])), (last - first, *shape[1:]))
        found.append(whole_rows)
    return sorted(found)


def write_shard(folder: Path, rank: int, pieces: list[Piece]):
    """Write a process's tensors and, once they are on the disk, their list. CPU tensors only."""
    tensors = []
    values = []
    with open_new(folder / data_file(rank)) as f:
        for piece in pieces:
            if isinstance(piece.value, torch.Tensor):
                tensors.append(write_piece(f, piece))
            else:
                values.append({"path": piece.path, "value": piece.value})
        sync(f)
    content = {"sha256": sha256(folder / data_file(rank)), "tensors": tensors, "values": values}
    write_atomic(folder / list_file(rank), json.dumps(content) + "\n")


def write_piece(f, piece: Piece) -> dict:
    """Write the boxes of a piece. Returns its entry in the list: a box is [start, count, offset, bytes]."""
    flat = piece.value.detach().reshape(-1)
    shape = piece.whole_shape
    rows = []
    begin = 0
    for _, sizes in boxes(shape, piece.start, piece.start + flat.numel()):
        count = math.prod(sizes)
        offset = f.tell()
        box = flat[begin : begin + count].view(sizes)
        if box.untyped_storage().nbytes() > box.nbytes:
            box = box.clone()  # torch.save writes all of the memory that a view is of
        torch.save(box, f)
        rows.append([piece.start + begin, count, offset, f.tell() - offset])
        begin += count
    dtype = str(flat.dtype).removeprefix("torch.")
    return {"path": piece.path, "dtype": dtype, "shape": shape, "boxes": rows}


# ---- torch's index -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TorchObject:
    """An object of a class in torch.distributed.checkpoint: the name of the class, and the pickled state."""

    name: str
    state: object


PythonPickler: Any = pickle._Pickler  # pickle's own, in Python: its dispatch table can be extended


class TorchPickler(PythonPickler):
    """Pickles TorchObjects as torch would, without its package: to import that takes a second and 47 MB.

    Torch promises to read what its earlier versions wrote, so these names and states are stable.
    """

    def save_torch_object(self, thing: TorchObject):
        module, _, name = f"torch.distributed.checkpoint.{thing.name}".rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        if name == "_MEM_FORMAT_ENCODING":  # an Enum: is called with its value
            self.save((thing.state,))
            self.write(pickle.REDUCE)
            return
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(thing.state)
        self.write(pickle.BUILD)

    dispatch = {**PythonPickler.dispatch, TorchObject: save_torch_object}


def write_torch_index(folder: Path, ranks: int):
    """Write .metadata from the lists of all processes, so that torch.distributed.checkpoint can read them."""
    tensors: dict[str, dict] = {}
    places = {}
    paths = {}
    for rank in range(ranks):
        for entry in read_list(folder, rank)["tensors"]:
            name = ".".join(entry["path"])
            paths[name] = tuple(entry["path"])
            chunks = tensors.setdefault(name, torch_tensor(entry))["chunks"]
            for start, count, offset, size in entry["boxes"]:
                ((offsets, sizes),) = boxes(tuple(entry["shape"]), start, start + count)
                box = {"offsets": torch.Size(offsets), "sizes": torch.Size(sizes)}
                index = {"fqn": name, "index": len(chunks), "offset": torch.Size(offsets)}
                place = {"relative_path": data_file(rank), "offset": offset, "length": size}
                chunks.append(TorchObject("metadata.ChunkStorageMetadata", box))
                index_object = TorchObject("metadata.MetadataIndex", index)
                places[index_object] = TorchObject("filesystem._StorageInfo", place)
    content = {
        "state_dict_metadata": {
            name: TorchObject("metadata.TensorStorageMetadata", state) for name, state in tensors.items()
        },
        "planner_data": paths,
        "storage_data": places,
        "storage_meta": None,
    }
    buffer = io.BytesIO()
    TorchPickler(buffer, protocol=2).dump(TorchObject("metadata.Metadata", content))
    write_atomic(folder / TORCH_INDEX, buffer.getvalue())


def torch_tensor(entry: dict) -> dict:
    """torch's description of a tensor, without its chunks so far: the state of a TensorStorageMetadata."""
    contiguous = TorchObject("metadata._MEM_FORMAT_ENCODING", 0)
    properties = (getattr(torch, entry["dtype"]), torch.strided, False, contiguous, False)
    return {
        "properties": TorchObject("metadata.TensorProperties", properties),
        "size": torch.Size(entry["shape"]),
        "chunks": [],
    }


# ---- what is read ------------------------------------------------------------------------------------------


class FileSlice(io.RawIOBase):
    """Bytes of an open file, as a file of its own."""

    def __init__(self, file, offset: int, size: int):
        self.file = file
        self.offset = offset
        self.size = size
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self.place = place + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self.place)]
        self.file.seek(self.offset + self.place)
        count = self.file.readinto(view)
        self.place += count
        return count


@dataclass
class StoredTensor:
    """A tensor in the files of a checkpoint."""

    folder: Path
    device: str | torch.device
    dtype: str
    shape: tuple[int, ...]
    boxes: list[tuple] = field(default_factory=list)  # (start, count, offset, bytes, open file)

    def read(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """The tensor or, if an end is given, its flattened entries from start to end.

        InputError if the files do not hold them.
        """
        stop = math.prod(self.shape) if end is None else end
        flat = None
        count = 0
        for begin, size, offset, length, file in self.boxes:
            low = max(start, begin)
            high = min(stop, begin + size)
            if low > high or (low == high and stop > start):
                continue
            box = self.load_box(file, offset, length)[low - begin : high - begin]
            count += high - low
            if high - low == stop - start:  # most tensors are one box: it is not copied
                flat = box
                break
            if flat is None:
                flat = torch.empty(stop - start, dtype=box.dtype, device=self.device)
            flat[low - start : high - start] = box
        if flat is None or count != stop - start:
            raise InputError(f"{self.folder}: damaged checkpoint (a tensor is not whole); use another step")
        return flat if end is not None else flat.view(self.shape)

    def load_box(self, file, offset: int, length: int) -> torch.Tensor:
        try:
            tensor = torch.load(FileSlice(file, offset, length), map_location=self.device, weights_only=True)
            if str(tensor.dtype) != f"torch.{self.dtype}":
                raise ValueError(f"{tensor.dtype} in place of {self.dtype}")
            return tensor.view(-1)
        except OSError as e:
            reason = e.strerror or first_line(e)
            raise InputError(f"{self.folder}: cannot be read ({reason}); use another step") from None
        except (RuntimeError, pickle.UnpicklingError, AttributeError, EOFError, ValueError) as e:
            raise InputError(f"{self.folder}: not a checkpoint of this program ({first_line(e)})") from None


class StoredState(Mapping):
    """The state in a checkpoint, as nested dicts. A tensor is read when it is asked for, and not kept."""

    def __init__(self, content: dict):
        """content: nested dicts of StoredTensor, tensors and other values."""
        self.content = content

    def __getitem__(self, key):
        value = self.content[key]
        if isinstance(value, dict):
            return StoredState(value)
        return value.read() if isinstance(value, StoredTensor) else value

    def __iter__(self):
        return iter(self.content)

    def __len__(self):
        return len(self.content)

    def part(self, key, start: int, end: int) -> torch.Tensor:
        """Flattened entries start to end of a tensor. A tensor without dimensions has no parts: all of it."""
        value = self.content[key]
        if len(value.shape) == 0:
            return self[key]
        return value.read(start, end) if isinstance(value, StoredTensor) else value.view(-1)[start:end]


def read_list(folder: Path, rank: int) -> dict:
    return read_json(folder / list_file(rank), SHARD)


def open_state(folder: Path, sums: dict[str, str], device) -> StoredState:
    """The state in a folder's files. They stay open: a training run may remove its older checkpoints.

    sums: {file: its SHA-256}. InputError if a file has another one.
    """
    files = {}
    for name, expected in sums.items():
        if name == TORCH_INDEX:  # in checkpoints of an earlier version
            continue
        digest = hashlib.sha256()
        with path_in_errors(folder / name):
            files[name] = open_file(folder / name)
            while block := files[name].read(2**22):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise InputError(
                f"{folder}: damaged checkpoint (the content of {name} does not match its checksum); "
                "use another step"
            )
    content: dict = {}
    for rank in range(sum(name.endswith(".distcp") for name in sums)):
        listed = read_list(folder, rank)
        for entry in listed["values"]:
            *keys, last = entry["path"]
            inner_dict(content, keys)[last] = entry["value"]
        for entry in listed["tensors"]:
            *keys, last = entry["path"]
            new = StoredTensor(folder, device, entry["dtype"], tuple(entry["shape"]))
            tensor = inner_dict(content, keys).setdefault(last, new)
            tensor.boxes += [(*box, files[data_file(rank)]) for box in entry["boxes"]]
    return StoredState(content)


def inner_dict(content: dict, keys: list) -> dict:
    """The dict that these keys lead to, which is made if it is not there."""
    for key in keys:
        content = content.setdefault(key, {})
    return content


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping):
    """model.load_state_dict, one tensor at a time: there is never a second copy of the model in memory.

    LookupError or ValueError if the weights are those of another model.
    """
    own = model.state_dict()
    if names := own.keys() ^ weights.keys():
        raise LookupError(f"{len(names)} tensors are missing or too many, {min(names)} for one")
    for name, tensor in own.items():
        weight = weights[name]
        if weight.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(weight.shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(weight)
