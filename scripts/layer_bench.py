"""Time, memory and FLOPs of each linear layer, dense and at several ranks, and where low rank breaks even.

    python -m scripts.layer_bench --out layer_bench
    python -m scripts.layer_bench --model-dim 1280 --head-dim 128 --tokens 16384,65536 --out layer_bench

Training is the forward and the backward pass over a batch of tokens, with activations in --dtype and weights
in float32 as in scripts.base_train. Decoding is the forward pass of one token. There copies of the layer take
turns, like the layers of a deep model: the weights come from memory, since no cache holds a whole model.
The lm_head gets its tokens in pieces of the same size as in the model. Layers of one shape are measured once
and named together. Two savings are not measured: in the model the first factors of q, k and v are one
product, and a model can be compiled.

In each repeat every variant of a layer takes its turn, and each is first in turn. Ratios to dense are taken
within a repeat; medians and quartiles are shown. The ratios also hold on a machine that does other work;
milliseconds do not.
"""

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from nanochat import arguments, common, devices, processes
from nanochat.accounting import on_meta
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.benchmark import (
    Setting,
    explain_out_of_memory,
    flags_as_json,
    machine_description,
    machine_text,
    spread,
    take_turns,
)
from nanochat.errors import InputError
from nanochat.files import check_out
from nanochat.flag_types import LONGEST, WIDEST, comma_separated, rank_flag
from nanochat.flags import add_rank_multiple
from nanochat.gpt import GPTConfig, make_linear
from nanochat.ops import rows_at_once
from nanochat.rank import resolve_rank
from nanochat.report.bench_page import write_result
from nanochat.report.layer_bench_page import case_title, draw_layers, layer_tables
from nanochat.report.page import to_markdown
from nanochat.step_metrics import tensor_bytes

# a sample is as many calls as take this long; a clock's tick and a kernel's launch are far shorter
SAMPLE_SECONDS = 0.005
# decoding: the copies of a layer have this size together, which is more than most caches hold
COLD_BYTES = 2**27
MOST_COPIES = 64  # about as many as a deep model has layers


@dataclass
class Layers:
    """Layers of one shape, and the ranks to measure beside dense."""

    names: str
    in_features: int
    out_features: int
    ranks: list[int]


def main(argv=None):
    args = flag_parser().parse_args(argv)
    all_layers = [with_ranks(args, *shape) for shape in layer_shapes(model_config(args))]
    if args.out:
        check_out("--out", args.out)
    device = processes.init_process(args.device_type, alone=True).device
    setting = Setting(device, devices.compute_dtype(args.dtype, device.type), args.repeats)
    machine = machine_description(device, setting.dtype)
    shape = f"width {args.model_dim}, vocabulary {args.vocab_size}"
    description = f"{machine_text(machine)}; {shape}; {args.repeats} repeats"
    print(description, flush=True)

    cases = []
    measured = {}
    batches = [*((tokens, "training") for tokens in args.tokens), (1, "decoding")]
    for tokens, mode in batches:
        for layers in all_layers:
            rows = tokens
            if layers.names == "lm_head":
                rows = min(tokens, rows_at_once(torch.empty(0, device=device), layers.out_features))
            key = layers.names, rows, mode  # the head may get the same piece of two batches
            if key not in measured:
                measured[key] = measure_or_explain(layers, tokens, rows, mode, setting)
            cases.append({**measured[key], "tokens": tokens})
            progress = f"measured {len(cases)} of {len(batches) * len(all_layers)}"
            print(f"{progress}: {layers.names}, {case_title(cases[-1])}", flush=True)

    result = {"machine": machine, "flags": flags_as_json(args), "cases": cases}
    blocks = layer_tables(result)
    print("\n" + to_markdown(blocks))
    if args.out:
        caption = "Time of a layer over dense, against its rank; bars: quartiles; dotted: ratio of FLOPs"
        figure = ("figure", "layer_bench.png", caption)
        heading = [("heading", "Layer bench"), ("paragraph", description), figure]
        write_result(args.out, "layer_bench", result, draw_layers(result), [*heading, *blocks])


# ---- flags -------------------------------------------------------------------------------------------------


def low_rank(text: str) -> float:
    """argparse type: a rank other than full rank."""
    rank = rank_flag(text)
    if not rank:
        message = "0: full rank is measured anyway; give ranks from 1, or fractions between 0 and 1"
        raise ArgumentTypeError(message)
    return rank


def flag_parser():
    parser = ArgumentParser("Time, memory and break-even rank of each linear layer of a model by itself.")
    add = parser.add_argument
    add("--model-dim", type=whole_number(1, WIDEST), default=256, help="width")
    add("--head-dim", type=whole_number(1, WIDEST), default=64, help="width of a head")
    add(
        "--n-kv-head",
        type=whole_number(1, off=-1),
        default=-1,
        help="key/value heads, a divisor of the heads; -1 = as many as heads",
    )
    add("--vocab-size", type=whole_number(2, LONGEST), default=4096, help="outputs of the lm_head")
    add(
        "--ranks",
        type=comma_separated(low_rank),
        default="0.125,0.25,0.33,0.5,0.75,0.95",
        help="whole numbers, or fractions of min(in, out) of each matrix",
    )
    add_rank_multiple(add)
    add(
        "--tokens",
        type=comma_separated(whole_number(1)),
        default="1024,4096",
        help="tokens in a batch; one token by itself is always measured",
    )
    arguments.device_flags(add, "of the activations; weights are float32")
    add("--repeats", type=whole_number(1), default=20, help="turns of each variant")
    add("--out", type=Path, default=None, metavar="DIR", help="folder for layer_bench.md, .json and .png")
    return parser


def model_config(args) -> GPTConfig:
    if args.model_dim % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim}: does not divide --model-dim {args.model_dim}")
    heads = args.model_dim // args.head_dim
    kv_heads = args.n_kv_head if args.n_kv_head > 0 else heads
    if heads % kv_heads:
        raise InputError(f"--n-kv-head {kv_heads}: must divide the {heads} heads")
    return GPTConfig(
        vocab_size=args.vocab_size, n_layer=1, n_head=heads, n_kv_head=kv_heads, n_embd=args.model_dim
    )


def layer_shapes(config: GPTConfig) -> list[tuple[str, int, int]]:
    """(names, in, out) of the linear layers, those of one shape together; the lm_head, last, by itself."""
    block = on_meta(config).blocks[0]
    attn = block.attn
    layers = {"q": attn.q, "k": attn.k, "v": attn.v, "o": attn.o}
    layers |= {"MLP up": block.mlp.up, "MLP down": block.mlp.down}
    names = {}
    for name, layer in layers.items():
        names.setdefault((layer.in_features, layer.out_features), []).append(name)
    shapes = [(", ".join(group), *shape) for shape, group in names.items()]
    return [*shapes, ("lm_head", config.n_embd, config.vocab_size)]


def with_ranks(args, names: str, in_features: int, out_features: int) -> Layers:
    """The layers with the ranks of --ranks as whole numbers. InputError if a rank is too large."""
    ranks = set()
    for rank in args.ranks:
        try:
            ranks.add(resolve_rank(rank, in_features, out_features, args.rank_multiple))
        except ValueError as e:
            raise InputError(f"--ranks: {names}: {e}") from None
    return Layers(names, in_features, out_features, sorted(ranks))


# ---- one layer ---------------------------------------------------------------------------------------------


def make_layer(in_features: int, out_features: int, rank: int, device):
    """Weights uniform in ±0.05: values do not change the time, and orthogonal ones take long to compute."""
    with torch.device(device):
        layer = make_linear(in_features, out_features, rank)
        for weight in layer.parameters():
            torch.nn.init.uniform_(weight, -0.05, 0.05)
    return layer


def kept_bytes(layer, x) -> int:
    """Bytes that the layer's forward pass keeps for the backward pass, without its parameters.

    These are the input and the r numbers between the factors. If the activations are not float32, there is
    also a copy of the weights in their dtype.
    """
    parameters = {p.data_ptr() for p in layer.parameters()}
    bytes_by_address = {}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            bytes_by_address[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)  # it lives until the end: no address is used twice
    del y
    return sum(bytes_by_address.values())


def training(in_features: int, out_features: int, rank: int, rows: int, setting: Setting) -> dict:
    """{"layer", "kept_bytes", "passes": {pass: function}} for one batch of `rows` tokens."""
    device = setting.device
    layer = make_layer(in_features, out_features, rank, device)
    x = torch.randn(rows, in_features, device=device).to(setting.dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    inputs = (x, *layer.parameters())
    return {
        "layer": layer,
        "kept_bytes": kept_bytes(layer, x),
        "passes": {
            "forward": lambda: layer(x),
            "backward": lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True),
        },
    }


def decoding(in_features: int, out_features: int, rank: int, setting: Setting) -> dict:
    """As `training`, for the forward pass of one token without gradients."""
    device = setting.device
    layer = make_layer(in_features, out_features, rank, device).requires_grad_(False)
    layers = [layer]
    copies = min(MOST_COPIES, math.ceil(COLD_BYTES / tensor_bytes(layer.parameters())))
    while len(layers) < copies:
        layers.append(make_layer(in_features, out_features, rank, device).requires_grad_(False))
    x = torch.randn(1, in_features, device=device).to(setting.dtype)
    turns = cycle(layers)
    return {"layer": layer, "kept_bytes": 0, "passes": {"forward": lambda: next(turns)(x)}}


def measure(layers: Layers, rows: int, mode: str, setting: Setting) -> dict:
    """The result for the layers of one shape. rows: tokens at once; mode: training or decoding."""
    shape = layers.in_features, layers.out_features
    subjects = {}
    for rank in (0, *layers.ranks):
        if mode == "decoding":
            subjects[rank] = decoding(*shape, rank, setting)
        else:
            subjects[rank] = training(*shape, rank, rows, setting)
    passes = {rank: subject["passes"] for rank, subject in subjects.items()}
    seconds = take_turns(passes, setting.repeats, setting.device, SAMPLE_SECONDS)
    flops_per_weight = 2 if mode == "decoding" else 6
    variants = summary(subjects, seconds, flops_per_weight * rows)
    ratios = [variant["ratio"]["total"] for variant in variants[1:]]
    bounds = {}
    for bound, quartile in (("median", "median"), ("low", "high"), ("high", "low")):
        # the slower quartile of the times gives the lower break-even rank
        bounds[bound] = break_even(layers.ranks, [ratio[quartile] for ratio in ratios])
    bounds["flops"] = layers.in_features * layers.out_features / (layers.in_features + layers.out_features)
    return {
        "layers": layers.names,
        "in": layers.in_features,
        "out": layers.out_features,
        "mode": mode,
        "rows": rows,
        "variants": variants,
        "break-even rank": bounds,
    }


def measure_or_explain(layers: Layers, tokens: int, rows: int, mode: str, setting: Setting) -> dict:
    """`measure`; InputError if there is too little memory."""
    shape = f"{layers.names} ({layers.in_features} → {layers.out_features})"
    remedy = "give fewer tokens, or smaller layers"
    with explain_out_of_memory(f"--tokens {tokens}: {shape} does not fit into memory; {remedy}"):
        return measure(layers, rows, mode, setting)


# ---- ratios to dense ---------------------------------------------------------------------------------------


def break_even(ranks: list[int], ratios: list[float]) -> dict:
    """{"rank", "is"}: the lowest rank at which the ratio to dense reaches 1, by linear interpolation.

    "is" is "=", or "<" for a rank below all that were measured, or ">" for a rank above them. ranks:
    ascending.
    """
    if ratios[0] >= 1:
        return {"rank": ranks[0], "is": "=" if ratios[0] == 1 else "<"}
    for r0, r1, a, b in zip(ranks, ranks[1:], ratios, ratios[1:]):
        if b >= 1:
            return {"rank": r0 + (r1 - r0) * (1 - a) / (b - a), "is": "="}
    return {"rank": ranks[-1], "is": ">"}


def summary(subjects: dict, seconds: dict, flops_per_weight: int) -> list[dict]:
    """An entry for each rank, dense (rank 0) first. "total" is the sum of the passes.

    seconds: see `take_turns`.
    """
    totals = {}
    parameters = {}
    for rank, passes in seconds.items():
        totals[rank] = passes | {"total": np.sum(list(passes.values()), axis=0).tolist()}
        parameters[rank] = sum(p.numel() for p in subjects[rank]["layer"].parameters())
    entries = []
    for rank, subject in subjects.items():
        ratio = {name: spread(np.divide(values, totals[0][name])) for name, values in totals[rank].items()}
        ratio["flops"] = parameters[rank] / parameters[0]
        ratio["total over flops"] = ratio["total"]["median"] / ratio["flops"]
        entries.append(
            {
                "rank": rank,
                "parameters": parameters[rank],
                "weights_bytes": tensor_bytes(subject["layer"].parameters()),
                "kept_bytes": subject["kept_bytes"],
                "flops": flops_per_weight * parameters[rank],
                "seconds": {name: spread(values) for name, values in totals[rank].items()},
                "ratio": ratio,
                "seconds by repeat": totals[rank],
            }
        )
    return entries


if __name__ == "__main__":
    common.run_script(main)
