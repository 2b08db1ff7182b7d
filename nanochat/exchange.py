"""What many processes exchange in a step: gradients on the way to their owners, new values on the way back.

    exchange.start()             # before the last backward pass of a step
    loss.backward()              # each bucket of gradients leaves as soon as it is full
    exchange.finish()            # `shard.master.grad` of the own shards: the mean over the processes
    …                            # the optimizers update the own masters
    exchange.share(by_muon)      # new values leave, while the next optimizer works
    exchange.wait()              # every process has the same parameters to the bit

Every process holds all parameters, updates its shards of them and keeps masters and optimizer state of these
alone (stage 2 of ZeRO, arXiv 1910.02054). What torch has for this does not fit. DistributedDataParallel
regroups its buckets after the first step it sees: a resumed run would sum in another order than an
uninterrupted one and differ in the last bits. ZeroRedundancyOptimizer deals out whole parameters, and half of
a small model is one table. FSDP2 would cut the matrices that Muon orthogonalises whole.
"""

from collections import deque
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from nanochat.gpt import GPT
from nanochat.parallel import average_gradients
from nanochat.processes import World
from nanochat.shards import Bucket, ParameterShard

LEAVING = 2  # buckets of gradients that travel at a time; then the pass waits, and their memory is freed

# their names since torch 2.13, and before
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class Exchange:
    """One process's part in it. Alone, or where all need whole gradients, it overlaps with nothing."""

    def __init__(
        self, model: GPT, buckets: list[Bucket], shards: list[ParameterShard], world: World, whole: bool
    ):
        """shards: of this process, in the order of the model's parameters. whole: every process gets the mean
        of every gradient, in `parameter.grad`.
        """
        self.buckets = buckets
        self.world = world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.own = shards
        self.is_sharded = world.size > 1 and not whole
        self.is_last_pass = False
        self.missing = [len(bucket.parameters) for bucket in buckets]  # gradients that a bucket waits for
        self.sent = 0  # buckets of this step: all processes send them in one order
        self.leaving: deque[tuple] = deque()
        self.returning: deque[tuple] = deque()
        for i, bucket in enumerate(buckets if self.is_sharded else ()):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self.arrive, i))

    # ---- gradients, to the owners

    def start(self):
        """The backward pass that comes now is the last of its step: its gradients are complete."""
        self.is_last_pass = self.is_sharded

    def arrive(self, bucket: int, parameter):
        """A gradient is complete: send the buckets whose turn it is."""
        if self.is_last_pass:
            self.missing[bucket] -= 1
            while self.sent < len(self.buckets) and self.missing[self.sent] == 0:
                self.send()

    @torch.no_grad()
    def send(self):
        """Send the next bucket, and free its gradients here. One that is missing counts as 0."""
        if len(self.leaving) == LEAVING:
            self.receive()
        bucket = self.buckets[self.sent]
        self.sent += 1
        flat = bucket.new_tensor()
        parts = []
        gradients = []
        for owner, shards in enumerate(bucket.shards):
            for shard, part in zip(shards, bucket.split(flat[owner], owner)):
                if shard.parameter.grad is None:
                    part.zero_()
                else:
                    parts.append(part)
                    gradients.append(shard.entries(shard.parameter.grad))
        if parts:
            torch._foreach_copy_(parts, gradients)
        for parameter in bucket.parameters:
            parameter.grad = None
        line = torch.empty_like(flat[0])
        work = reduce_scatter(line, flat.view(-1), async_op=True)
        self.leaving.append((bucket, flat, line, work))

    def receive(self):
        """Take over the sums of the bucket that was sent first. On a GPU this does not stop the program."""
        bucket, _, line, work = self.leaving.popleft()
        work.wait()
        mean = line.float().div_(self.world.size)
        for shard, part in zip(bucket.shards[self.world.rank], bucket.split(mean, self.world.rank)):
            shard.master.grad = part.view_as(shard.master)

    @torch.no_grad()
    def finish(self):
        """The masters of the own shards get their gradients: the mean over the processes.

        Every process must call it once a step, also one that has broken the step off.
        """
        if self.is_sharded:
            while self.sent < len(self.buckets):
                self.send()
            while self.leaving:
                self.receive()
            self.is_last_pass = False
            self.missing = [len(bucket.parameters) for bucket in self.buckets]
            self.sent = 0
            return
        if self.world.size > 1:
            average_gradients(self.parameters, self.world)
        for shard in self.own:
            shard.take_gradient()

    def gradients(self) -> list[torch.Tensor]:
        """The mean gradients that this process has: of its shards, or of all parameters."""
        holders = [shard.master for shard in self.own] if self.is_sharded else self.parameters
        return [holder.grad for holder in holders if holder.grad is not None]

    def norm(self) -> torch.Tensor:
        """The norm of all mean gradients, () float32, the same on all processes."""
        norm = torch.nn.utils.get_total_norm(self.gradients())
        if self.is_sharded:
            square = norm.to(self.world.device, torch.float64).square()
            dist.all_reduce(square)
            norm = square.sqrt().float()
        return norm

    def scale(self, factor: torch.Tensor):
        """Multiply all mean gradients by a factor, ()."""
        if gradients := self.gradients():  # a process may own nothing
            torch._foreach_mul_(gradients, factor)

    def clear(self):
        """Free all gradients."""
        for holder in chain(self.parameters, (shard.master for shard in self.own)):
            holder.grad = None

    # ---- new values, to all processes

    @torch.no_grad()
    def share(self, by_muon: bool):
        """Send the new values of the masters that Muon, or AdamW, has updated."""
        rank = self.world.rank
        for bucket in self.buckets if self.world.size > 1 else ():
            if bucket.uses_muon == by_muon:
                flat = bucket.new_tensor()
                if own := [shard.values for shard in bucket.shards[rank]]:
                    torch._foreach_copy_(bucket.split(flat[rank], rank), own)
                self.returning.append((bucket, flat, all_gather(flat.view(-1), flat[rank], async_op=True)))

    @torch.no_grad()
    def wait(self):
        """Afterwards every process has the same parameters to the bit."""
        entries = []
        values = []
        while self.returning:
            bucket, flat, work = self.returning.popleft()
            work.wait()
            entries += [shard.entries(shard.parameter.data) for shard in bucket.all_shards()]
            for owner, line in enumerate(flat):
                values += bucket.split(line, owner)
        if entries:
            torch._foreach_copy_(entries, values)
