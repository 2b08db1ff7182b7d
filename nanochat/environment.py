"""The environment variables that launchers, schedulers, notebooks and containers leave.

Libraries read some of them when they are imported, and their errors do not name the variable. So each script
begins here. A value that cannot be used is replaced, with one line on standard error if the user had chosen
it, or it is refused in one line that names the variable.
"""

import contextlib
import ctypes
import getpass
import os
import platform
import pwd
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.errors import InputError

MAX_THREADS = 1024
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TEMPORARY_FOLDERS = ("TMPDIR", "TEMP", "TMP")
# variables that name a place outside the home folder, and a folder for each
HOME_FOLDERS = {
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "HF_HOME": "huggingface",
    "WANDB_CONFIG_DIR": "wandb/config",
    "WANDB_CACHE_DIR": "wandb/cache",
    "WANDB_DATA_DIR": "wandb/data",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
}
# set by a launcher for the processes of one run
PROCESS_GROUP = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
)
# the rank of a process on its machine, as Open MPI, Intel MPI, MVAPICH, PALS and Slurm give it
LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)


def prepare_environment():
    """Make the environment one in which all scripts and libraries work. It may be called more than once."""
    replace_unusable_variables()
    choose_temporary_folder()


def replace_unusable_variables():
    """Change variables only, no files."""
    # when a process is gone, torch prints a page of stack frames; agreement.py says it in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # a notebook's backend may not be installed here; figures in files need none
    os.environ.pop("MPLBACKEND", None)
    for name in THREAD_COUNTS:
        check_thread_count(name)
    for name in TEMPORARY_FOLDERS:
        if name in os.environ and not is_writable_folder(os.environ[name]):
            drop_variable(name, "is no folder that can be written to")
    name_user_and_home()
    let_gpu_memory_grow()
    if sys.platform == "linux" and not is_writable_folder("/dev/shm"):
        os.environ.setdefault("NCCL_SHM_DISABLE", "1")  # its GPUs then communicate in another way


def drop_variable(name: str, fault: str):
    """Remove a variable, and say so unless it was empty."""
    value = os.environ.pop(name)
    if value:
        print(f"note: {name}={value} {fault}; going on without it", file=sys.stderr, flush=True)


def check_thread_count(name: str):
    """Keep the first number of an OpenMP list, which has one for each level of nesting; drop what is none."""
    if name not in os.environ:
        return
    first = os.environ[name].split(",")[0].strip()
    if first.isdecimal() and 1 <= int(first) <= MAX_THREADS:
        os.environ[name] = first
    else:
        drop_variable(name, f"is no number of threads from 1 to {MAX_THREADS}")


def is_writable_folder(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def name_user_and_home():
    """A container may run this process as a user without a name or a home folder.

    Programs that write into the home folder then write below the base directory.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
        os.environ["LOGNAME"] = os.environ["USER"]
    home = os.environ.get("HOME") or home_of_user()
    if home:
        os.environ["HOME"] = home
    if is_writable_folder(home) or not os.environ.get("NANOCHAT_BASE_DIR"):
        return  # if there is no base directory either, get_base_dir says what is missing
    try:
        instead = get_base_dir().absolute() / "home"
    except InputError:  # a script that needs that directory says so
        return
    os.environ["HOME"] = home or str(instead)
    for name, folder in HOME_FOLDERS.items():
        os.environ.setdefault(name, str(instead / folder))


def let_gpu_memory_grow():
    """Let torch enlarge a block of GPU memory, rather than lose the gaps between blocks of many sizes.

    Not under WSL, where the first tensor then fails (pytorch/pytorch issue 192330), nor where the driver
    lacks the functions for it. torch reads the variable when CUDA starts.
    """
    chosen = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    if chosen or "microsoft" in platform.release().lower():
        return
    with contextlib.suppress(OSError):  # there is no driver
        if hasattr(ctypes.CDLL("libcuda.so.1"), "cuMemAddressReserve"):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def home_of_user() -> str:
    """The home folder in the system's list of users; '' if this user is not in it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def choose_temporary_folder():
    """Use the base directory for temporary files if Python would use the current folder."""
    try:
        usable = tempfile.gettempdir() != os.getcwd()
    except OSError:
        usable = False
    if not usable:
        instead = get_base_dir().absolute() / "tmp"
        instead.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = str(instead)
        tempfile.tempdir = str(instead)


# ---- the processes of a run --------------------------------------------------------------------------------

WAY_OUT = "start with torchrun, which sets all of them, or unset RANK and WORLD_SIZE for a run of one process"


def launcher_layout() -> tuple[int, int, int]:
    """(rank, local rank, number of processes), as a launcher sets them; (0, 0, 1) without one.

    InputError where the variables contradict each other, or some are missing.
    """
    if not os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return 0, 0, 1
    size = launcher_integer("WORLD_SIZE", 1)
    rank = launcher_integer("RANK", 0)
    if rank >= size:
        raise InputError(f"RANK={rank}: WORLD_SIZE={size} allows 0 to {size - 1}; {WAY_OUT}")
    return rank, local_rank(rank, size), size


def launcher_integer(name: str, minimum: int, maximum: int | None = None) -> int:
    """The value of a variable that a launcher sets. InputError unless it is an integer in this range."""
    value = os.environ.get(name, "").strip()
    if not value:
        present = next(other for other in ("RANK", "WORLD_SIZE") if os.environ.get(other))
        raise InputError(f"{name} is not set, but {present}={os.environ[present]} is; {WAY_OUT}")
    if not value.isdecimal() or int(value) < minimum or (maximum and int(value) > maximum):
        right = f"from {minimum} to {maximum}" if maximum else f">= {minimum}"
        raise InputError(f"{name}={value}: is not a whole number {right}; {WAY_OUT}")
    return int(value)


def local_rank(rank: int, size: int) -> int:
    if os.environ.get("LOCAL_RANK"):
        return launcher_integer("LOCAL_RANK", 0)
    if size == 1:
        return 0
    if os.environ.get("LOCAL_WORLD_SIZE"):
        return rank % launcher_integer("LOCAL_WORLD_SIZE", 1)
    scheduler = next((name for name in LOCAL_RANKS if os.environ.get(name)), None)
    if scheduler is None:
        raise InputError(f"LOCAL_RANK is not set, but RANK={rank} and WORLD_SIZE={size} are; {WAY_OUT}")
    return launcher_integer(scheduler, 0)


def local_world_size(size: int) -> int:
    """How many of a run's processes are on this machine. 1 where no launcher says it. size: of the run."""
    if size > 1 and os.environ.get("LOCAL_WORLD_SIZE"):
        return launcher_integer("LOCAL_WORLD_SIZE", 1)
    return 1


def python_path(variables: Mapping[str, str]) -> str:
    """PYTHONPATH of a process that has to find this package, whatever its current folder is."""
    package = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, [package, variables.get("PYTHONPATH")]))


def check_rendezvous():
    """InputError unless the environment says where the processes of a run meet."""
    if not os.environ.get("MASTER_ADDR"):
        raise InputError(f"MASTER_ADDR is not set, but WORLD_SIZE={os.environ['WORLD_SIZE']} is; {WAY_OUT}")
    launcher_integer("MASTER_PORT", 1, 65535)


def check_launcher(patience: float = 3):
    """InputError where torchrun, at whose port its processes meet, was killed while this one started.

    torch would try to reach it for half an hour. patience: seconds in which it has to answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(place, timeout=patience).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise InputError(
                    f"MASTER_ADDR={place[0]} MASTER_PORT={place[1]}: torchrun was there and "
                    "is gone; start again"
                ) from None
            time.sleep(0.2)
        except OSError:  # a slow network, or a host name that is not known yet: torch has more patience
            return


def leave_process_group():
    """Forget the variables of the launcher of this process, which starts runs of its own."""
    for name in PROCESS_GROUP:
        os.environ.pop(name, None)
