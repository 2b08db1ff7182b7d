"""Data parallelism: average gradients, exchange updated parameters, gather optimizer states for a checkpoint.

Every process holds all parameters, updates its shards of them (`optim.shard_parameters`) and keeps the
optimizer state of these alone: stage 1 of ZeRO (arXiv 1910.02054). What torch has for this does not fit.
DistributedDataParallel regroups its buckets after the first step it sees: a resumed run would sum in another
order than an uninterrupted one and differ in the last bits. ZeroRedundancyOptimizer deals out whole
parameters, and half of a small model is one table. FSDP2 would cut the matrices that Muon orthogonalises
whole. Every collective here is synchronous.
"""

import contextlib
import threading
from itertools import chain

import torch
import torch.distributed as dist

from nanochat.optim import ParameterShard, optimizer_state
from nanochat.processes import World
from nanochat.signals import StopRequest


@torch.no_grad()
def average_gradients(parameters, world: World, bucket_elements: int = 2**24):
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
            flat /= world.size
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(mean.view_as(g))
            bucket = []
            size = 0


@torch.no_grad()
def share_parameters(shards: list[list[ParameterShard]], world: World):
    """After a step, every process sends its shards to the others: all have the same parameters to the bit."""
    for owner, owned in enumerate(shards):
        views = [shard.entries(shard.parameter.data) for shard in owned]
        if not views:
            continue
        sizes = [view.numel() for view in views]
        flat = torch.cat(views) if owner == world.rank else views[0].new_empty(sum(sizes))
        dist.broadcast(flat, src=owner)
        if owner != world.rank:
            torch._foreach_copy_(views, flat.split(sizes))


@torch.no_grad()
def differing_parameters(model, world: World) -> list[str]:
    """Names of the parameters that differ between processes in any bit, by their sums as integers."""
    if world.size == 1:
        return []
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])
    lowest = sums.clone()
    highest = sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differs = (lowest != highest).tolist()
    return [name for i, (name, _) in enumerate(model.named_parameters()) if differs[i]]


def gather_state(optimizers, model, world: World) -> dict:
    """On rank 0: {parameter name: {key: tensor of the whole parameter, on the CPU}}; elsewhere {}.

    It is the same for any number of processes, so a run may continue on another number.
    """
    own_state = optimizer_state(optimizers)
    for name, state in own_state.items():
        own_state[name] = {key: value.cpu() for key, value in state.items()}
    if world.size == 1:
        return own_state
    states: list[dict] = [{}] * world.size
    # CPU tensors: over gloo, also where the gradients go over NCCL
    dist.gather_object(own_state, states if world.rank == 0 else None)
    if world.rank > 0:
        return {}
    full_state = {}
    for name, parameter in model.named_parameters():
        parts = [state[name] for state in states if name in state]
        if parts:
            full_state[name] = join_shards(parts, parameter.shape)
    return full_state


def join_shards(parts: list[dict], shape: torch.Size) -> dict:
    """{key: tensor of the whole parameter} of the states of its shards, in the order of the processes."""
    if len(parts) == 1:
        return parts[0]
    joined = dict(parts[0])
    for key, value in joined.items():
        if value.ndim > 0:
            joined[key] = torch.cat([part[key] for part in parts]).view(shape)
    return joined


# ---- requests to stop --------------------------------------------------------------------------------------

STOP_KEY = "nanochat/stop"  # in the store of the process group


def any_process(world: World, *flags: bool) -> list[bool]:
    """Whether each flag is set on any process: the same answer on all."""
    if world.size == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=world.device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def names_anywhere(world: World, names: list[str]) -> list[str]:
    """The names that any process has: the same list on all."""
    if world.size == 1:
        return names
    lists: list[list[str]] = [[]] * world.size
    dist.all_gather_object(lists, names)
    return list(dict.fromkeys(chain.from_iterable(lists)))


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
                store.set(STOP_KEY, str(int(request.number)))
                return
            if store.check([STOP_KEY]):
                request.hear(int(store.get(STOP_KEY)))
                return
