"""The environment as launchers, schedulers, notebooks and containers leave it.

Libraries read some variables when they are imported, and fail in ways that name no variable. So each script
begins here. What cannot be used is replaced, with one line on standard error where the user had chosen it, or
refused in one line that names the variable.
"""

import getpass
import os
import pwd
import socket
import sys
import tempfile
import time

from nanochat.common import InputError, get_base_dir

MOST_THREADS = 1024
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TEMPORARY_FOLDERS = ("TMPDIR", "TEMP", "TMP")
# what programs write into a home folder, and the variable that names another place for it
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
# the place of a process on its machine, as Open MPI, Intel MPI, MVAPICH, PALS and Slurm say it
LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)


def prepare_environment():
    """Make the environment one that every script and library can work in. May be called more than once."""
    replace_unusable_variables()
    choose_temporary_folder()


def replace_unusable_variables():
    """Change variables only, nothing on the disk."""
    # of a process that is gone torch warns with a page of stack frames; agreement.py says it in a line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # a notebook's may not be installed here; our figures are files and need none
    os.environ.pop("MPLBACKEND", None)
    for name in THREAD_COUNTS:
        check_thread_count(name)
    for name in TEMPORARY_FOLDERS:
        if name in os.environ and not is_writable_folder(os.environ[name]):
            drop(name, "is no folder that can be written to")
    settle_user()
    if sys.platform == "linux" and not is_writable_folder("/dev/shm"):
        os.environ.setdefault("NCCL_SHM_DISABLE", "1")  # the GPUs of a machine then talk in another way


def drop(name: str, fault: str):
    """Take a variable away, and say so unless it was empty."""
    value = os.environ.pop(name)
    if value:
        print(f"note: {name}={value} {fault}; going on without it", file=sys.stderr, flush=True)


def check_thread_count(name: str):
    """OpenMP allows a list, one number for each level of nesting. The first is the one that counts here."""
    if name not in os.environ:
        return
    first = os.environ[name].split(",")[0].strip()
    if first.isdecimal() and 1 <= int(first) <= MOST_THREADS:
        os.environ[name] = first
    else:
        drop(name, f"is no number of threads from 1 to {MOST_THREADS}")


def is_writable_folder(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def settle_user():
    """A container may run us as a user without a name or a home folder.

    What programs want to write into a home folder, they then write below the base directory.
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
        return  # without a base directory either, get_base_dir says what is missing
    try:
        instead = get_base_dir().absolute() / "home"
    except InputError:  # whoever wants that directory says so
        return
    os.environ["HOME"] = home or str(instead)
    for name, folder in HOME_FOLDERS.items():
        os.environ.setdefault(name, str(instead / folder))


def home_of_user() -> str:
    """As the system has it; '' if it knows no such user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def choose_temporary_folder():
    """Where no usual place can be written to, Python takes the folder we are in. The base
    directory is better.
    """
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


def layout_of_processes() -> tuple[int, int, int]:
    """(rank, local rank, number of processes), as a launcher says it; (0, 0, 1) without one.

    InputError where the variables contradict each other, or some are missing.
    """
    if not os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return 0, 0, 1
    size = number_of("WORLD_SIZE", 1)
    rank = number_of("RANK", 0)
    if rank >= size:
        raise InputError(f"RANK={rank}: WORLD_SIZE={size} allows 0 to {size - 1}; {WAY_OUT}")
    return rank, local_rank(rank, size), size


def number_of(name: str, least: int, most: int | None = None) -> int:
    """A whole number from a variable that a launcher sets. InputError if it is none."""
    value = os.environ.get(name, "").strip()
    if not value:
        given = next(other for other in ("RANK", "WORLD_SIZE") if os.environ.get(other))
        raise InputError(f"{name} is not set, but {given}={os.environ[given]} is; {WAY_OUT}")
    if not value.isdecimal() or int(value) < least or (most and int(value) > most):
        right = f"from {least} to {most}" if most else f">= {least}"
        raise InputError(f"{name}={value}: is not a whole number {right}; {WAY_OUT}")
    return int(value)


def local_rank(rank: int, size: int) -> int:
    if os.environ.get("LOCAL_RANK"):
        return number_of("LOCAL_RANK", 0)
    if size == 1:
        return 0
    if os.environ.get("LOCAL_WORLD_SIZE"):
        return rank % number_of("LOCAL_WORLD_SIZE", 1)
    scheduler = next((name for name in LOCAL_RANKS if os.environ.get(name)), None)
    if scheduler is None:
        raise InputError(f"LOCAL_RANK is not set, but RANK={rank} and WORLD_SIZE={size} are; {WAY_OUT}")
    return number_of(scheduler, 0)


def check_rendezvous():
    """InputError unless the environment says where the processes of a run meet."""
    if not os.environ.get("MASTER_ADDR"):
        raise InputError(f"MASTER_ADDR is not set, but WORLD_SIZE={os.environ['WORLD_SIZE']} is; {WAY_OUT}")
    number_of("MASTER_PORT", 1, 65535)


def check_launcher(patience: float = 3):
    """InputError where torchrun, which lets its processes meet, was killed while this one started.

    torch would look for it for half an hour. `patience`: seconds in which it has to answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection(place, timeout=patience).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise InputError(
                    f"MASTER_ADDR={place[0]} MASTER_PORT={place[1]}: torchrun was there and "
                    "is gone; start again"
                ) from None
            time.sleep(0.2)
        except OSError:  # a slow network, a name that is not known yet: torch is more patient
            return None


def leave_process_group():
    """What an earlier launcher left behind is not meant for this process, which starts runs of its own."""
    for name in PROCESS_GROUP:
        os.environ.pop(name, None)
