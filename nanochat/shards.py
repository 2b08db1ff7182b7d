"""Which process owns which entries of which parameter, and the buckets in which they travel."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from nanochat.gpt import GPT

BUCKET_ENTRIES = 2**24  # at least so many travel together, where there are so many: 32 MB in bfloat16
LARGEST_PADDING = 1 / 16  # a bucket of matrices grows until its owners have nearly equal shares

# parts of the names of parameters that adapters and subspaces add: AdamW trains them with other settings
ADDED = (".adapters.", "subspace")


def uses_muon(name: str, parameter) -> bool:
    """Whether Muon trains a parameter: it does the matrices inside the blocks, full or factored.

    AdamW trains tables, the head, the per-layer scalars, and what adapters and subspaces add.
    """
    return name.startswith("blocks.") and parameter.ndim == 2 and not any(part in name for part in ADDED)


@dataclass(eq=False)
class ParameterShard:
    """Entries start to end of a flattened parameter, which one process updates and keeps the state of."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.start == self.parameter.numel()

    def entries(self, tensor):
        """These entries of a tensor of the parameter's shape: (end - start,), sharing its memory."""
        return tensor.view(-1)[self.start : self.end]

    @functools.cached_property
    def master(self) -> torch.nn.Parameter:
        """What the owner's optimizer updates, float32: the parameter itself or, of a slice, (end - start,).

        It shares the parameter's memory, unless `separate_master` was called.
        """
        return self.parameter if self.is_whole else torch.nn.Parameter(self.entries(self.parameter.data))

    def separate_master(self):
        """Give the master memory of its own, before the parameter becomes one of fewer digits."""
        data = self.parameter.data
        self.master = torch.nn.Parameter(data if self.is_whole else self.entries(data).clone())

    @property
    def has_separate_master(self) -> bool:
        return self.master.dtype != self.parameter.dtype

    def take_gradient(self):
        """Give the master the gradient of these entries, where that is not its own."""
        gradient = self.parameter.grad
        if gradient is not None and self.master is not self.parameter:
            self.master.grad = self.entries(gradient).view_as(self.master)

    @property
    def values(self) -> torch.Tensor:
        """The float32 values of these entries on their owner: (end - start,), sharing the master's memory."""
        return self.master.data.view(-1)


@dataclass(eq=False)
class Bucket:
    """Shards whose gradients travel together, and their new values likewise.

    On the way they are one tensor (processes, length), a line for each owner: first its shards, then padding.
    """

    shards: list[list[ParameterShard]]  # by owner
    uses_muon: bool

    @functools.cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Each once."""
        return list(dict.fromkeys(shard.parameter for shard in self.all_shards()))

    @functools.cached_property
    def length(self) -> int:
        return max(map(self.size, range(len(self.shards))))

    def size(self, owner: int) -> int:
        return sum(shard.end - shard.start for shard in self.shards[owner])

    def all_shards(self) -> Iterator[ParameterShard]:
        for owned in self.shards:
            yield from owned

    def new_tensor(self) -> torch.Tensor:
        """(processes, length), in the dtype of the parameters."""
        return self.parameters[0].data.new_empty(len(self.shards), self.length)

    def split(self, line, owner: int) -> list[torch.Tensor]:
        """A line of that tensor -> the part of each of its owner's shards, sharing its memory."""
        sizes = [shard.end - shard.start for shard in self.shards[owner]]
        return list(line[: sum(sizes)].split(sizes))


def make_buckets(model: GPT, processes: int) -> list[Bucket]:
    """Buckets of all parameters that require a gradient, in the order in which a backward pass fills them."""
    load = [0] * processes  # entries of matrices by owner
    growing: dict[tuple, list] = {}  # vectors apart: they keep float32 where matrices and tables do not
    last_place = {}
    buckets = {}  # by the place of the last member
    for place, (name, p) in enumerate(backward_order(model)):
        kind = uses_muon(name, p), p.ndim
        members = growing.setdefault(kind, [])
        members.append((name, p))
        last_place[kind] = place
        entries = sum(p.numel() for _, p in members)
        if entries < BUCKET_ENTRIES:
            continue
        bucket = divide(members, load)
        if bucket.length * processes <= entries * (1 + LARGEST_PADDING):
            buckets[place] = bucket
            del growing[kind]
            if bucket.uses_muon:
                load = [before + bucket.size(owner) for owner, before in enumerate(load)]
    for kind, members in growing.items():
        buckets[last_place[kind]] = divide(members, load)
    return [buckets[place] for place in sorted(buckets)]


def backward_order(model: GPT) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters to train by name, the head first, then block by block, the table of tokens last."""

    def place(item) -> float:
        part, _, rest = item[0].partition(".")
        if part in ("blocks", "value_embeds"):
            return int(rest.partition(".")[0])
        return {"lm_head": math.inf, "wte": -math.inf}.get(part, -1)

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sorted(trained, key=place)[::-1]


def divide(members: list[tuple[str, torch.nn.Parameter]], load: list[int]) -> Bucket:
    """A bucket of these parameters, all of Muon or all of AdamW. load: entries of matrices by owner so far.

    Muon needs matrices whole: each goes to the owner that has least so far, the largest first. AdamW works
    entry by entry: its parameters are cut into equal slices.
    """
    shards: list[list[ParameterShard]] = [[] for _ in load]
    load = list(load)
    by_muon = uses_muon(*members[0])
    for name, p in sorted(members, key=lambda item: -item[1].numel()):
        if by_muon:
            owner = load.index(min(load))
            shards[owner].append(ParameterShard(name, p, 0, p.numel()))
            load[owner] += p.numel()
            continue
        size = -(-p.numel() // len(load))
        for owner, start in enumerate(range(0, p.numel(), size)):
            shards[owner].append(ParameterShard(name, p, start, min(start + size, p.numel())))
    return Bucket(shards, by_muon)


def shards_by_owner(model: GPT, buckets: list[Bucket]) -> list[list[ParameterShard]]:
    """The shards of each process, in the order of the model's parameters."""
    place = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    by_owner = zip(*(bucket.shards for bucket in buckets))
    return [sorted(chain(*owned), key=lambda shard: place[shard.name]) for owned in by_owner]


def shard_parameters(model: GPT, processes: int) -> list[list[ParameterShard]]:
    """The shards of each process: together each entry of every parameter to train, exactly once."""
    return shards_by_owner(model, make_buckets(model, processes))
