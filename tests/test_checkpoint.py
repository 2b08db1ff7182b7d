"""Checkpoints: whole or not there, verified, never the reason something is lost."""

import errno

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.errors import InputError
from nanochat.files import write_atomic

STATE = {
    "model": {"w": torch.arange(6.0)},
    "optimizers": [{"state": {0: {"momentum": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
}


def test_saved_state_comes_back_to_the_bit(tmp_path):
    cm.save_checkpoint(tmp_path, 7, STATE, {"note": "x"})
    state, meta = cm.load_checkpoint(tmp_path, 7)
    assert torch.equal(state["model"]["w"], STATE["model"]["w"]) and meta["note"] == "x" and meta["step"] == 7
    assert torch.equal(state["optimizers"][0]["state"][0]["momentum"], torch.ones(2))
    assert cm.saved_steps(tmp_path) == [7]


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, capsys):
    for step in (5, 10):
        cm.save_checkpoint(tmp_path, step, STATE, {})
    file = tmp_path / "checkpoints/step_000010/state.pt"
    content = bytearray(file.read_bytes())
    if damage == "flip a bit":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[:-100] if damage == "truncate" else content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(InputError, match="step_000010: damaged"):
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


def test_loading_executes_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    cm.save_checkpoint(tmp_path, 5, {"model": Evil()}, {})
    with pytest.raises(Exception, match="(?i)weights.only"):
        cm.load_checkpoint(tmp_path, 5)


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(
        "os.fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError) as e:
        write_atomic(path, "new")
    assert path.read_text() == "old" and e.value.filename == str(path) and list(tmp_path.iterdir()) == [path]
