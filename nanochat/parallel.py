"""What processes do together outside of a step's exchange: compare, and agree to stop.

The exchange of gradients and parameters is in exchange.py. Every collective here is synchronous.
"""

import contextlib
import threading
from itertools import chain

import torch
import torch.distributed as dist

from nanochat.processes import World
from nanochat.signals import StopRequest


@torch.no_grad()
def average_gradients(parameters, world: World, bucket_elements: int = 2**24):
    """Replace every gradient by its mean over the processes, in buckets of about 64 MB.

    For the few parameters of what needs whole gradients; `exchange.Exchange` is for all else.
    """
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
def differing_parameters(model, world: World) -> list[str]:
    """Names of the parameters that differ between processes in any bit, by their sums as integers."""
    if world.size == 1:
        return []
    integers = {2: torch.int16, 4: torch.int32}  # by the bytes of a number
    bits = [p.detach().view(integers[p.element_size()]) for p in model.parameters()]
    sums = torch.stack([values.sum(dtype=torch.int64) for values in bits])
    lowest = sums.clone()
    highest = sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    differs = (lowest != highest).tolist()
    return [name for i, (name, _) in enumerate(model.named_parameters()) if differs[i]]


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
