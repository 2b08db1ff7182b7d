"""Checkpoints: whole or not there, verified, never the reason something is lost."""

import errno
import io
import json
import math
import os
import pickle
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nanochat import checkpoint_files as cf
from nanochat import checkpoint_manager as cm
from nanochat.errors import InputError, ProcessLost
from nanochat.files import sha256, write_atomic
from nanochat.run_files import read_meta, step_folder, write_meta

STATE = {
    "model": {"w": torch.arange(6.0)},
    "optimizer": {"w": {"momentum": torch.ones(2), "step": torch.tensor(3.0)}, "never updated": {}},
    "allocator": {"step": 4},
}
FILES = ("__0_0.distcp", "__0_0.json")


def tensors_of(state) -> dict:
    return {".".join(path): value for path, value in cf.leaves(state) if isinstance(value, torch.Tensor)}


def assert_same_tensors(a, b):
    a = tensors_of(a)
    b = tensors_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sign(folder, **changes):
    """Make meta.json that of the files as they are now."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {name: sha256(folder / name) for name in meta.get("files", ())}
    write_meta(folder, meta | changes)


def test_saved_state_comes_back_to_the_bit(tmp_path):
    cm.save_checkpoint(tmp_path, 7, STATE, {"note": "x"})
    state, meta = cm.load_checkpoint(tmp_path, 7)
    assert meta["note"] == "x" and meta["step"] == 7
    assert_same_tensors(state, STATE)
    assert state["allocator"]["step"] == 4 and dict(state["optimizer"]["never updated"]) == {}
    assert cm.saved_steps(tmp_path) == [7]


@pytest.mark.parametrize("file", [*FILES, "meta.json"])
@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, file, capsys):
    for step in (5, 10):
        cm.save_checkpoint(tmp_path, step, STATE, {})
    path = tmp_path / "checkpoints/step_000010" / file
    content = bytearray(path.read_bytes())
    if damage == "flip a bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-100] if damage == "truncate" else content)
    if damage == "remove":
        path.unlink()
    with pytest.raises(InputError, match=r"step_000010(/meta.json)?: (damaged|not a)"):
        cm.load_checkpoint(tmp_path, 10)
    assert cm.load_newest(tmp_path)[1]["step"] == 5
    assert "step_000010" in capsys.readouterr().out


def test_a_missing_step_names_those_there_are(tmp_path):
    cm.save_checkpoint(tmp_path, 5, STATE, {})
    with pytest.raises(InputError, match=r"no checkpoint of step 6; there are: \[5\]"):
        cm.load_checkpoint(tmp_path, 6)
    assert cm.load_newest(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ],
)
def test_no_space_left_is_one_line_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch, failure):
    cm.save_checkpoint(tmp_path, 5, STATE, {})

    def full_disk(state, f):
        f.write(b"partial")
        raise failure

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="step_000010: cannot write .* --resume auto"):
        cm.save_checkpoint(tmp_path, 10, STATE, {})
    assert cm.saved_steps(tmp_path) == [5] and cm.load_newest(tmp_path)[1]["step"] == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


@pytest.mark.parametrize("listed", [False, True])
def test_a_copy_without_hidden_files_is_whole(tmp_path, listed):
    """`cp step_000005/* elsewhere` leaves torch's index behind, which nothing here reads."""
    cm.save_checkpoint(tmp_path, 5, STATE, {})
    folder = step_folder(tmp_path, 5)
    if listed:  # as an earlier version did
        meta = json.loads((folder / "meta.json").read_text())
        write_meta(folder, meta | {"files": {".metadata": "0" * 64, **meta["files"]}})
    (folder / ".metadata").unlink()
    assert_same_tensors(cm.load_checkpoint(tmp_path, 5)[0], STATE)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_loading_executes_no_code(tmp_path, capsys):
    """Neither a tensor's pickle nor torch's index does, even where every checksum is right."""
    cm.save_checkpoint(tmp_path, 5, STATE, {})
    folder = step_folder(tmp_path, 5)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    sign(folder)
    assert_same_tensors(cm.load_checkpoint(tmp_path, 5)[0], STATE)
    listed = json.loads((folder / "__0_0.json").read_text())
    with open(folder / "__0_0.distcp", "ab") as f:
        start = f.tell()
        torch.save(Evil(), f)
        for tensor in listed["tensors"]:
            tensor["boxes"] = [[0, math.prod(tensor["shape"]), start, f.tell() - start]]
    (folder / "__0_0.json").write_text(json.dumps(listed))
    sign(folder)
    with pytest.raises(InputError, match="step_000005: not a checkpoint of this program"):
        cm.load_to_resume(tmp_path, 5)
    assert "executed" not in capsys.readouterr().out


def save_as_before(run_folder, step, state, **meta):
    """As earlier versions did: one file."""
    folder = step_folder(run_folder, step)
    folder.mkdir(parents=True)
    torch.save(state, folder / "state.pt")
    write_meta(folder, {"step": step, "sha256": sha256(folder / "state.pt"), **meta})


def test_a_checkpoint_of_one_file_is_read_and_verified_too(tmp_path):
    save_as_before(tmp_path, 5, STATE)
    state, _ = cm.load_to_resume(tmp_path, 5)
    assert_same_tensors(state, STATE)
    assert state["optimizer"]["w"].part("momentum", 1, 2).tolist() == [1.0]
    file = step_folder(tmp_path, 5) / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="step_000005: damaged checkpoint"):
        cm.load_checkpoint(tmp_path, 5)
    save_as_before(tmp_path, 6, {"model": Evil()})
    with pytest.raises(InputError, match="(?i)step_000006: .*weights.only"):
        cm.load_checkpoint(tmp_path, 6)


@pytest.mark.parametrize("number, message", [(errno.EIO, "cannot be read"), (errno.ENOENT, "damaged")])
def test_a_file_that_can_be_opened_and_not_read_is_a_line(tmp_path, monkeypatch, number, message):
    class Unreadable(io.BytesIO):
        def read(self, *_):
            raise OSError(number, os.strerror(number))

    cm.save_checkpoint(tmp_path, 5, STATE, {})
    monkeypatch.setattr(cf, "open_file", lambda path: Unreadable())
    with pytest.raises(InputError, match=f"step_000005: {message}"):
        cm.load_checkpoint(tmp_path, 5)


# ---- shards


@pytest.mark.parametrize("shape", [(7,), (5, 4), (4, 1), (1, 6), (2, 3, 4)])
def test_boxes_are_the_entries_of_a_range_in_their_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, end in combinations(range(numbers.numel() + 1), 2):
        entries = []
        for offsets, sizes in cf.boxes(shape, start, end):
            place = tuple(slice(low, low + size) for low, size in zip(offsets, sizes))
            entries += numbers[place].flatten().tolist()
        assert entries == list(range(start, end)), cf.boxes(shape, start, end)


SHAPES = {"table": (11, 5), "matrix": (4, 6), "scalars": (3,), "one": (), "none": (0, 4)}


def save_shards(run_folder, ranks, state, missing=()):
    """As `ranks` processes do: tables and scalars in slices that cut rows, all else whole on one of them."""
    new = [cm.NewCheckpoint(run_folder, 5, "key", rank, ranks) for rank in range(ranks)]
    new[0].begin()
    for rank in range(ranks):
        lock = new[rank].claim()
        pieces = []
        for i, (name, value) in enumerate(state["model"].items()):
            size = -(-value.numel() // ranks)
            path = ("model", name)
            if name in ("table", "scalars"):
                part = value.view(-1)[rank * size : (rank + 1) * size]
                pieces.append(cf.Piece(path, part, rank * size, value.shape))
            elif i % ranks == rank:
                pieces.append(cf.Piece(path, value))
        if rank not in missing:
            new[rank].write(pieces)
        if lock:
            lock.close()
    new[0].commit({})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_several_processes_wrote_is_read_whole_and_in_parts_also_by_torch(tmp_path, ranks):
    state = {"model": {name: torch.randn(shape) for name, shape in SHAPES.items()}}
    save_shards(tmp_path, ranks, state)
    folder = step_folder(tmp_path, 5)
    names = {f"__{r}_0.{end}" for r in range(ranks) for end in ("distcp", "json")}
    assert {path.name for path in folder.iterdir()} == names | {".metadata", "meta.json"}
    assert set(read_meta(tmp_path, 5)["files"]) == names
    stored, _ = cm.load_checkpoint(tmp_path, 5)
    assert_same_tensors(stored, state)
    table = state["model"]["table"].flatten()
    for start, end in combinations(range(len(table)), 2):
        assert torch.equal(stored["model"].part("table", start, end), table[start:end])
    dcp_to_torch_save(folder, tmp_path / "one.pt")
    assert_same_tensors(torch.load(tmp_path / "one.pt", weights_only=True), state)
    program = "from torch.distributed.checkpoint import FileSystemReader as R; import sys; "
    program += "print(len(R(sys.argv[1]).read_metadata().storage_data))"
    boxes = sum(len(t["boxes"]) for r in range(ranks) for t in cf.read_list(folder, r)["tensors"])
    assert int(subprocess.check_output([sys.executable, "-c", program, folder])) == boxes


def test_without_all_shards_there_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(cm, "SHOWN_AFTER", 0.1)
    state = {"model": {name: torch.randn(shape) for name, shape in SHAPES.items()}}
    with pytest.raises(ProcessLost, match="step_000005: process 1 did not write its shard; .*--resume auto"):
        save_shards(tmp_path, 3, state, missing=[1])
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_process_whose_folder_is_gone_says_that_the_first_gave_up(tmp_path):
    second = cm.NewCheckpoint(tmp_path, 5, "key", 1, 2)
    cm.NewCheckpoint(tmp_path, 5, "key", 0, 2).begin()
    cm.remove_unfinished(tmp_path)
    with pytest.raises(ProcessLost, match="process 0 has given up"):
        second.write([cf.Piece(("model", "w"), torch.ones(2))])


def test_a_tensor_with_a_hole_is_damage(tmp_path):
    new = cm.NewCheckpoint(tmp_path, 5, "key")
    new.begin()
    new.write(
        [cf.Piece(("model", "w"), torch.ones(2), 0, (5,)), cf.Piece(("model", "w"), torch.ones(2), 3, (5,))]
    )
    new.commit({})
    stored, _ = cm.load_checkpoint(tmp_path, 5)
    assert stored["model"].part("w", 3, 5).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match=r"step_000005: damaged checkpoint \(a tensor is not whole\)"):
        stored["model"]["w"]


def test_a_checkpoint_that_is_removed_while_it_is_open_can_still_be_read(tmp_path):
    cm.save_checkpoint(tmp_path, 5, STATE, {})
    state, _ = cm.load_checkpoint(tmp_path, 5)
    cm.set_aside(step_folder(tmp_path, 5))
    cm.remove_unfinished(tmp_path)
    assert_same_tensors(state, STATE)


def test_weights_of_another_model_are_refused(tmp_path):
    model = torch.nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    cf.load_weights(model, weights)
    assert model.weight.sum() == 6
    for wrong in ({"weight": weights["weight"]}, weights | {"more": torch.ones(1)}):
        with pytest.raises(LookupError, match="1 tensors are missing or too many"):
            cf.load_weights(model, wrong)
    with pytest.raises(ValueError, match=r"bias has the shape \(1,\), not \(2,\)"):
        cf.load_weights(model, weights | {"bias": torch.zeros(1)})


# ---- files


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(
        "os.fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError) as e:
        write_atomic(path, "new")
    assert path.read_text() == "old" and e.value.filename == str(path) and list(tmp_path.iterdir()) == [path]
