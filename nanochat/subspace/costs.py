"""What a subspace costs: trained numbers, bytes of the model and of a pass. Do they fit into memory?"""

import os
from pathlib import Path

import torch

from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.subspace.config import PROJECTED, SubspaceConfig, group_matrices, group_sizes, matrices
from nanochat.subspace.operators import padded


def count_trained(config: SubspaceConfig, model: GPTConfig) -> int:
    """Trained numbers beside embeddings and head."""
    targets = matrices(model)
    if not config.has_alpha:
        return sum(config.rank * (m.rows + m.columns) for m in targets)
    alphas = config.dim * len(group_matrices(config, targets))
    return alphas + len(targets) if config.scales else alphas


def state_bytes(config: SubspaceConfig, model: GPTConfig) -> int:
    """Bytes of W₀ and of the parts of P. They are beside trained numbers and matrices, in no checkpoint."""
    targets = matrices(model)
    total = 0
    if config.kind not in ("basis", "none"):  # basis has no W₀; none uses W₀ itself as its matrices
        total += 4 * sum(m.size for m in targets)
    for size in group_sizes(config, targets):
        if config.kind == "fastfood":
            total += 12 * padded(size) + 4 * config.dim
        if config.kind == "fft-fastfood":
            total += 8 * size + 4 * config.dim
    return total


def pass_bytes(config: SubspaceConfig, model: GPTConfig, itemsize: int) -> int:
    """Bytes of all matrices, of their gradients, and of the temporary tensors while they are made.

    itemsize: bytes of a number in the dtype of the pass.
    """
    targets = matrices(model)
    largest = max(group_sizes(config, targets))
    making = {"fastfood": 12 * padded(largest), "fft-fastfood": 28 * largest}
    temporary = making.get(config.kind, 8 * max(m.size for m in targets))
    return 2 * itemsize * sum(m.size for m in targets) + temporary


def account(config: SubspaceConfig, model: GPTConfig, dense: dict) -> dict:
    """The account of a model in a subspace. dense: `rank.account` of the dense model.

    params/total and its parts count the numbers of the network, however they are made. params/trained counts
    the learned ones. params/stored_bits is what must be stored: 32 bits for each of these, 64 for the seed.
    flops/per_token does not count how the matrices are made.
    """
    subspace_numbers = count_trained(config, model)
    trained = subspace_numbers
    if not config.freeze_embeddings:
        trained += dense["params/embedding"] + dense["params/lm_head"]
    changed = {
        "params/trained": trained,
        "params/stored_bits": 32 * trained + 64,
        "mem/weights_bytes": dense["mem/weights_bytes"] + 4 * subspace_numbers + state_bytes(config, model),
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 8 * trained,
    }
    # the gradients of the matrices exist at the peak as in the dense model
    if peak := dense.get("mem/predicted_peak_bytes"):
        for key in ("mem/weights_bytes", "mem/optimizer_bytes"):
            peak += changed[key] - dense[key]
        changed["mem/predicted_peak_bytes"] = peak
    return dense | changed


def available_bytes(device_type: str) -> int:
    """Free memory of the GPU or the machine. All memory of the machine if the system does not tell."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(config: SubspaceConfig, model: GPTConfig, itemsize: int, device_type: str):
    """InputError if the matrices and the tensors that make them do not fit. Activations are not counted."""
    needed = state_bytes(config, model) + pass_bytes(config, model, itemsize)
    available = available_bytes(device_type)
    if needed > available:
        smaller = "use a smaller --model-dim or --depth"
        if config.kind in PROJECTED:
            smaller += ", or a smaller --subspace-scope"
        raise InputError(
            f"--subspace {config.kind}: needs {needed / 2**30:,.1f} GiB to make its matrices, "
            f"{available / 2**30:,.1f} GiB are free; {smaller}"
        )
