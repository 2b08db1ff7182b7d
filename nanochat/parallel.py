"""Many processes: gradients averaged, updated parameters exchanged, optimizer states brought together for a checkpoint.

Every process holds all parameters, updates its share of them (`optim.split_parameters`) and keeps the optimizer state of that share
alone: stage 1 of ZeRO (arXiv 1910.02054). What torch has for this does not fit: DistributedDataParallel regroups its buckets
after the first step it sees, so a resumed run would sum in another order than an uninterrupted one and differ in the last bits;
ZeroRedundancyOptimizer deals out whole parameters, and half of a small model is one table; FSDP2 would cut the matrices that
Muon orthogonalises whole. All collectives here are waited for.
"""

import contextlib
import threading
from itertools import chain

import torch
import torch.distributed as dist

from nanochat.optim import Piece, optimizer_state
from nanochat.signals import StopRequest


@torch.no_grad()
def average_gradients(parameters, world_size: int, bucket_elements: int = 2**24):
    """Replace every gradient by its mean over the processes, in buckets of about 64 MB, once a step."""
    bucket = []
    size = 0
    grads = [p.grad for p in parameters if p.grad is not None]
    for i, grad in enumerate(grads):
        bucket.append(grad)
        size += grad.numel()
        if size >= bucket_elements or i == len(grads) - 1:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= world_size
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket = []
            size = 0


@torch.no_grad()
def share_parameters(pieces: list[list[Piece]], rank: int):
    """After a step: every process sends what it updated to all others, so that all hold the same parameters to the bit."""
    for owner, owned in enumerate(pieces):
        views = [piece.of(piece.parameter.data) for piece in owned]
        if not views:
            continue
        flat = torch.cat(views) if owner == rank else views[0].new_empty(sum(v.numel() for v in views))
        dist.broadcast(flat, src=owner)
        if owner != rank:
            torch._foreach_copy_(views, flat.split([v.numel() for v in views]))


@torch.no_grad()
def differing_parameters(model) -> list[str]:
    """Names of the parameters that are not the same to the bit on all processes, found by their sums as integers."""
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])
    lowest = sums.clone()
    highest = sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return [
        name for (name, _), differs in zip(model.named_parameters(), (lowest != highest).tolist()) if differs
    ]


def gather_state(optimizers, model, rank: int, world_size: int) -> dict:
    """On rank 0: {parameter name: {key: tensor of the whole parameter, on the CPU}}; elsewhere {}. The same for any number of
    processes, so a run may continue on another.
    """
    mine = {
        name: {key: value.cpu() for key, value in state.items()}
        for name, state in optimizer_state(optimizers).items()
    }
    if world_size == 1:
        return mine
    everyone: list[dict] = [{}] * world_size
    # CPU tensors: over gloo, also where the gradients go over NCCL
    dist.gather_object(mine, everyone if rank == 0 else None)
    if rank > 0:
        return {}
    whole = {}
    for name, parameter in model.named_parameters():
        parts = [states[name] for states in everyone if name in states]
        if len(parts) == 1:
            whole[name] = parts[0]
        elif parts:  # slices, in the order of the processes
            whole[name] = {
                key: value
                if value.ndim == 0
                else torch.cat([part[key] for part in parts]).view(parameter.shape)
                for key, value in parts[0].items()
            }
    return whole


# ---- requests to stop --------------------------------------------------------------------------------------

ASKED = "nanochat/stop"  # the key in the store of the process group


def any_process(place, *flags: bool) -> list[bool]:
    """Whether each flag is set on any process: the same answer on all."""
    device, _, world_size = place
    if world_size == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def names_anywhere(place, names: list[str]) -> list[str]:
    """The names that any process has: the same list on all."""
    if place[2] == 1:
        return names
    everyone: list[list[str]] = [[]] * place[2]
    dist.all_gather_object(everyone, names)
    return list(dict.fromkeys(chain.from_iterable(everyone)))


@contextlib.contextmanager
def share_requests(request: StopRequest):
    """While this lasts, a request to stop that one process hears reaches the others within about a second."""
    if not dist.is_initialized():
        yield
        return
    over = threading.Event()
    store = dist.distributed_c10d._get_default_store()
    if hasattr(store, "clone"):  # a connection of its own: one that waits for a key lets nobody else through
        store = store.clone()
    thread = threading.Thread(target=relay, args=(request, store, over), daemon=True, name="stop requests")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)  # Python aborts where it ends while a thread waits for the store


def relay(request: StopRequest, store, over: threading.Event):
    with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
        while not over.wait(0.3):
            if request.is_set():
                return store.set(ASKED, str(int(request.number)))
            if store.check([ASKED]):
                return request.hear(int(store.get(ASKED)))
