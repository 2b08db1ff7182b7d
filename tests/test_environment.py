"""What launchers, schedulers, notebooks and containers leave in the environment: replaced, or refused."""

import os
import pwd
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from processes import Launched, free_port

from nanochat import agreement, common, devices, environment, processes
from nanochat.errors import InputError

GROUP = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}


# an earlier launcher's, without a group
LEFTOVERS = {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"}
# mpirun within a Slurm job
TWO_LAUNCHERS = {"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}


@pytest.fixture
def variables(monkeypatch):
    """variables(NAME=value, …): the environment has these, and nothing else that a launcher sets."""
    before = dict(os.environ)

    def replace(**given):
        for name in (*environment.PROCESS_GROUP, *environment.LOCAL_RANKS):
            os.environ.pop(name, None)
        os.environ.update(given)

    yield replace
    os.environ.clear()
    os.environ.update(before)


# ---- the processes of a run


@pytest.mark.parametrize(
    "given, layout",
    [
        ({}, (0, 0, 1)),
        (LEFTOVERS, (0, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
        # an allocation is not yet a group
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "PMI_RANK": "3"}, (0, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 1, 8)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (5, 1, 8)),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "2"}, (5, 2, 8)),
        (TWO_LAUNCHERS, (5, 3, 8)),
    ],
)
def test_the_place_of_a_process(given, layout, variables):
    variables(**given)
    assert processes.process_layout() == layout


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "0"}, "^WORLD_SIZE is not set, but RANK=0 is; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "^RANK is not set, but WORLD_SIZE=2 is"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "^WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "^WORLD_SIZE=abc: is not a whole number >= 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "^RANK=-1: is not a whole number >= 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "^RANK=2: WORLD_SIZE=2 allows 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "^LOCAL_RANK is not set, but RANK=0 and WORLD_SIZE=2 are"),
    ],
)
def test_a_place_that_cannot_be(given, message, variables):
    variables(**given)
    with pytest.raises(InputError, match=message):
        processes.process_layout()


@pytest.mark.parametrize(
    "missing, given, message",
    [
        ("MASTER_ADDR", "", "MASTER_ADDR is not set, but WORLD_SIZE=2 is"),
        ("MASTER_PORT", "", "MASTER_PORT is not set, but"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: is not a whole number from 1 to 65535"),
    ],
)
def test_a_meeting_place_that_cannot_be(missing, given, message, variables):
    variables(**GROUP)
    os.environ[missing] = given
    with pytest.raises(InputError, match=f"^{message}"):
        processes.init_process("cpu")


def join_with_little_patience():
    agreement.JOIN_PATIENCE = timedelta(seconds=1)
    processes.init_process("cpu")


def test_others_that_never_come_are_said(variables, tmp_path):
    port = str(free_port())
    variables(**GROUP | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port})
    lonely = Launched(1, tmp_path / "output", join_with_little_patience)
    assert lonely.codes() == [2]
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last.startswith(
        f"error: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: process 0 of 2 did not find the others: "
    )


# ---- what is replaced


def test_thread_counts_and_figures_windows(variables, capsys):
    variables(
        OMP_NUM_THREADS="4,2",
        MKL_NUM_THREADS="",
        OPENBLAS_NUM_THREADS="0",
        NUMEXPR_NUM_THREADS="many",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
    )
    environment.replace_unusable_variables()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "MPLBACKEND"):
        assert name not in os.environ
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    fault = "is no number of threads from 1 to 1024; going on without it"
    assert capsys.readouterr().err == (
        f"note: OPENBLAS_NUM_THREADS=0 {fault}\nnote: NUMEXPR_NUM_THREADS=many {fault}\n"
    )


@pytest.fixture
def nobody(monkeypatch):
    """We are a user whom the system does not know, as in a container that was given a number only."""

    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_name_and_a_home(variables, nobody, tmp_path):
    variables(NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", *environment.HOME_FOLDERS):
        os.environ.pop(name, None)
    environment.replace_unusable_variables()
    assert os.environ["USER"] == f"uid{os.getuid()}" and Path("~/x").expanduser() == tmp_path / "base/home/x"
    for name in environment.HOME_FOLDERS:
        assert Path(os.environ[name]).is_relative_to(tmp_path / "base/home")
    assert not (tmp_path / "base").exists()  # variables only
    for name in ("HOME", "NANOCHAT_BASE_DIR"):
        os.environ.pop(name)
    environment.replace_unusable_variables()
    message = "^NANOCHAT_BASE_DIR: not set, and there is no home folder; give it a folder"
    with pytest.raises(InputError, match=message):
        common.get_base_dir()


def test_a_home_that_cannot_be_written_to_stays_the_home(variables, tmp_path):
    (tmp_path / "file").touch()
    variables(HOME=str(tmp_path / "file"), NANOCHAT_BASE_DIR=str(tmp_path / "base"), HF_HOME="/mine")
    os.environ.pop("MPLCONFIGDIR", None)
    environment.replace_unusable_variables()
    assert os.environ["HOME"] == str(tmp_path / "file") and os.environ["HF_HOME"] == "/mine"
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "base/home/matplotlib")


def test_temporary_folders(variables, tmp_path, monkeypatch, capsys):
    variables(TMPDIR=str(tmp_path / "gone"), TEMP=str(tmp_path), NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    environment.prepare_environment()
    assert "TMPDIR" not in os.environ and os.environ["TEMP"] == str(tmp_path)
    note = f"note: TMPDIR={tmp_path / 'gone'} is no folder that can be written to; going on without it\n"
    assert capsys.readouterr().err == note
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.getcwd()])
    environment.prepare_environment()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path / "base/tmp")
    assert os.path.isdir(tempfile.gettempdir())


ODD = {
    "MPLBACKEND": "a_window",
    "LC_ALL": "xx_YY",
    "LANG": "C",
    "OMP_NUM_THREADS": "abc",
    "TMPDIR": "/nowhere",
    "COLUMNS": "1",
    "LINES": "-3",
    "LOCAL_RANK": "7",
    "MASTER_PORT": "none",
    "TORCHELASTIC_RUN_ID": "x",
    "SLURM_PROCID": "3",
    "PBS_NODEFILE": "/nowhere",
    "HOME": "",
}


def test_scripts_in_an_environment_where_all_is_odd(base_dir, corpus_dir, tmp_path):
    flags = [*TINY, "--data", str(corpus_dir), "--model-tag", "odd", "--num-iterations", "1"]
    report = ["odd", "--out", str(tmp_path / "report")]
    script = (
        f"import runpy, sys\nfor sys.argv in {[['base_train', *flags], ['report', *report]]!r}:\n"
        "    runpy.run_module(f'scripts.{sys.argv[0]}', run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ODD},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.close(0),
    )
    assert done.returncode == 0 and "finished" in done.stdout
    assert done.stderr == (
        "note: OMP_NUM_THREADS=abc is no number of threads from 1 to 1024; going on without it\n"
        "note: TMPDIR=/nowhere is no folder that can be written to; going on without it\n"
    )
    assert (tmp_path / "report/report.html").exists()


# ---- GPUs that torch cannot use


@pytest.fixture
def cuda(monkeypatch):
    """cuda(listed, error, files): torch lists so many GPUs and can use none; /dev has these files."""
    import torch

    driver = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update."
    too_old = RuntimeError(driver)

    def pretend(listed=8, error=too_old, files=()):
        def init():
            raise error

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: listed)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(devices, "device_files", lambda: list(files))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return pretend


def test_gpus_that_torch_cannot_use_are_said(cuda, command):
    cuda()
    code, _, err = command("scripts/base_train.py", "--dry-run")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: --device-type: this machine has 8 GPU(s), but torch ")
    assert "them: The NVIDIA driver on your system is too old (found version 11040); install" in err
    assert "--device-type cpu" in err
    assert command("scripts/base_train.py", "--dry-run", "--device-type", "cpu")[0] == 0
    cuda(0, AssertionError("Torch not compiled with CUDA enabled"), ["/dev/nvidia0"])
    with pytest.raises(InputError, match=r"has 1 GPU\(s\), .* Torch not compiled with CUDA enabled; install"):
        devices.pick_device_type("")
    with pytest.raises(InputError, match="Torch not compiled"):
        processes.init_process("cuda")


@pytest.mark.parametrize(
    "system, functions, given, value",
    [
        ("6.8.0-generic", ["cuMemAddressReserve"], {}, "expandable_segments:True"),
        (
            "6.8.0-generic",
            ["cuMemAddressReserve"],
            {"PYTORCH_ALLOC_CONF": "backend:native"},
            "backend:native",
        ),
        ("6.8.0-generic", ["cuMemAddressReserve"], {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("5.15.1-microsoft-standard-WSL2", ["cuMemAddressReserve"], {}, None),
        ("6.8.0-generic", [], {}, None),  # an old driver
        ("6.8.0-generic", None, {}, None),  # none
    ],
)
def test_gpu_memory_grows_where_the_driver_can_and_nobody_chose(
    system, functions, given, value, variables, monkeypatch
):
    def load(name):
        assert name == "libcuda.so.1"
        if functions is None:
            raise OSError(name)
        return SimpleNamespace(**dict.fromkeys(functions))

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    variables(**given)
    monkeypatch.setattr(environment.platform, "release", lambda: system)
    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    environment.prepare_environment()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == value


@pytest.mark.parametrize("given", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_mean_the_cpu(given, cuda, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    cuda()
    assert devices.pick_device_type("") == "cpu"


def test_no_gpus_mean_the_cpu(cuda):
    cuda(0)
    assert devices.pick_device_type("") == "cpu"


def test_a_gpu_that_does_not_compute_is_said(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = r"^--nproc_per_node: process 2 on this machine has no GPU, there are 2$"
    with pytest.raises(InputError, match=message):
        devices.take_gpu(2)

    def set_busy_device(_):
        reason = "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might …"
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "set_device", set_busy_device)
    message = "^--device-type cuda: GPU 1 cannot be used: CUDA error: all .* unavailable; choose"
    with pytest.raises(InputError, match=message):
        devices.take_gpu(1)
