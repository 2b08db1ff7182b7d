"""The parts of a training step: time and memory of full rank against low rank, in turn in one process.

    python dev/bench/train_step.py --depth 4 --model-dim 256 --attn-rank 0.25 --mlp-rank 0.25 --out step.json
    python dev/bench/train_step.py --reference     # the task of the speed targets, with these targets

A round is a matrix product, which gives the machine's ceiling, and then one step of each model. So other work
of the machine slows all of them alike. Figures are medians over the rounds (quartiles in brackets); ratios
are taken within a round.

Time. data: the wait for the next batch of `training_batches`, from a memory map of random tokens. forward:
the loss. backward: with reading the loss. optimizer: gradient norm, update and zero_grad. All as in
scripts.base_train, with one batch for each step. On CUDA the parts are measured between events, so they
include the gaps between launches. The whole step is measured by the host's clock, which waits for the device
at both ends. Ceiling: the rate of a square matrix product in the dtype of the activations, in the same round.
If oneDNN multiplies float32 (see `cpu.multiply_by_onednn`), torch's usual rate is measured too: it scales
published rates.

Memory, by torch's own allocators: the model's weights and optimizer state, plus the most bytes that one step
allocates beside them. CUDA: max_memory_allocated. CPU: a further step, in which the profiler records
allocations and frees. That is exact and repeatable, but it does not see Python, scratch space of libraries,
and freed memory that malloc does not return. For these, --reference adds the peak resident set of a process
that does nothing else. activations + temporaries: the peak without weights, gradients and optimizer state.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # works without an installation
# no messages when the profiler starts and stops, or about batches from before its start
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch

from nanochat import common, cpu, devices, processes, recompute
from nanochat.accounting import account
from nanochat.arguments import ArgumentParser, real_number, whole_number
from nanochat.benchmark import flags_as_json, machine_description, spread, synchronize
from nanochat.compiler import compile_blocks
from nanochat.dataloader import Rows, training_batches
from nanochat.errors import InputError
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import DEEPEST, LONGEST, WIDEST, matrix_ranks_flag, rank_flag
from nanochat.flags import add_rank_multiple
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_ranks import named_ranks
from nanochat.optim import Rates, build_optimizers
from nanochat.peak import Execution, predict_peak
from nanochat.plan import check_size
from nanochat.processes import World
from nanochat.step_metrics import tensor_bytes

PARTS = ("data", "forward", "backward", "optimizer")
MEMORY = ("weights", "gradients", "optimizer state", "activations + temporaries", "peak")
# learning rates do not change the time
RATES = Rates(embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02, scalar_lr=0.1, weight_decay=0.0)
MATMUL_WIDTHS = {"cuda": 8192, "cpu": 1536}  # of the square matrices whose product's rate is the ceiling
WARMUP = 3  # steps of each model before the first round: compilation, optimizer state, allocator
# published for this task, compiled, on a 2-core Zen 4. factor: the target over the published rate
NANOCHAT = {
    "float32": dict(tok_per_sec=4.2e3, ceiling=193e9, factor=1.3),
    "bfloat16": dict(tok_per_sec=6.4e3, ceiling=413e9, factor=1.5),
}
NANOCHAT_PEAK = 1.12e9  # bytes


# ---- data --------------------------------------------------------------------------------------------------


class Noise:
    """Random tokens, with the attributes that `Rows` needs of a shard and of a tokenizer."""

    name = "noise"
    fingerprint = "noise"
    bos_id = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.hash = f"noise{vocab_size}"

    def read(self):
        return ((f"document {i}", str(i)) for i in range(2000))

    def encode_to_array(self, text):
        rng = np.random.default_rng(int(text))
        return rng.integers(1, self.vocab_size, 500)


def noise_rows(vocab_size: int, T: int) -> Rows:
    """A million random tokens from the real token cache. Its folder is removed after they are mapped."""
    base_dir = os.environ.get("NANOCHAT_BASE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        try:
            return Rows([Noise(vocab_size)], Noise(vocab_size), T)
        finally:
            os.environ.pop("NANOCHAT_BASE_DIR")
            if base_dir is not None:
                os.environ["NANOCHAT_BASE_DIR"] = base_dir


# ---- one step ----------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model whose steps are measured."""

    name: str
    model: GPT
    optimizers: list
    batches: Iterator
    dtype: torch.dtype

    def step(self, boundary):
        """One update. It calls boundary(part) before each part, and boundary("end") after the last."""
        boundary("data")
        x, y = next(self.batches)
        boundary("forward")
        loss = self.model(x, y, self.dtype)
        boundary("backward")
        loss.backward()
        loss.item()
        boundary("optimizer")
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        boundary("end")


def make_subject(
    name: str, config: GPTConfig, rows: Rows, batch_size: int, device, dtype, compiled: bool
) -> Subject:
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
        model.init_weights()
    recompute.apply(model)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # the default of 8 is for one model
        compile_blocks(model)
    return Subject(
        name,
        model,
        build_optimizers(model, RATES, dtype=dtype),
        training_batches(rows, 0, batch_size, World(device)),
        dtype,
    )


def timed_step(subject: Subject, device) -> dict:
    """{part: seconds} of one step, and 'step' for the whole."""
    marks = []

    def boundary(part):
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    synchronize(device)
    started = time.perf_counter()
    subject.step(boundary)
    synchronize(device)
    seconds = {"step": time.perf_counter() - started}
    for part, a, b in zip(PARTS, marks, marks[1:]):
        seconds[part] = a.elapsed_time(b) / 1000 if device.type == "cuda" else b - a
    return seconds


def matmul_rate(device, dtype) -> float:
    """FLOP/s of a square matrix product of random numbers: the best of a few."""
    n = MATMUL_WIDTHS[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):  # the first product may still choose its kernel
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def usual_matmul_rate(device, dtype) -> float:
    """`matmul_rate` with the library that torch itself chooses for float32."""
    matmul = torch.backends.mkldnn.matmul
    if matmul.fp32_precision != "bf16":
        return matmul_rate(device, dtype)
    matmul.fp32_precision = "ieee"
    try:
        return matmul_rate(device, dtype)
    finally:
        matmul.fp32_precision = "bf16"


# ---- memory ------------------------------------------------------------------------------------------------


def allocated(run, device) -> dict:
    """{part: the most bytes at one time during it, without those from before} of run(boundary)."""
    return (allocated_cuda if device.type == "cuda" else allocated_cpu)(run)


def allocated_cuda(run) -> dict:
    torch.cuda.synchronize()
    base_bytes = torch.cuda.memory_allocated()
    highest = {}
    previous = []

    def boundary(part):
        if previous:
            highest[previous[-1]] = torch.cuda.max_memory_allocated() - base_bytes
        torch.cuda.reset_peak_memory_stats()
        previous.append(part)

    run(boundary)
    return highest


def allocated_cpu(run) -> dict:
    """From the profiler's record of allocations and frees, in which the boundaries are marks."""

    def boundary(part):
        with torch.profiler.record_function("boundary " + part):
            pass

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(boundary)
    bytes_held = 0
    part = None
    highest = {}
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("boundary "):
            part = event.name().removeprefix("boundary ")
        elif event.name() == "[memory]":
            bytes_held += event.nbytes()
        if part:
            highest[part] = max(highest.get(part, bytes_held), bytes_held)
    highest.pop("end")
    return highest


def measure_memory(subject: Subject, device) -> dict:
    """Bytes by part, and the peak in each part of a step. The subject must have made a step before."""
    parameters = list(subject.model.parameters())
    states = [state for optimizer in subject.optimizers for state in optimizer.state.values()]
    memory = {
        "weights": tensor_bytes(parameters),
        "optimizer state": sum(tensor_bytes(state.values()) for state in states),
    }

    def run(boundary):
        def with_gradients(part):
            if part == "optimizer":
                memory["gradients"] = tensor_bytes(p.grad for p in parameters)
            boundary(part)

        subject.step(with_gradients)

    state_bytes = memory["weights"] + memory["optimizer state"]
    memory["peak by part"] = {part: state_bytes + extra for part, extra in allocated(run, device).items()}
    memory["peak"] = max(memory["peak by part"].values())
    memory["activations + temporaries"] = memory["peak"] - state_bytes - memory["gradients"]
    return memory


def resident_peak(config: GPTConfig, batch_size: int, dtype_name: str, compiled: bool) -> dict:
    """{"peak", "before the model"}: resident set of a process that trains the model for a few steps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train_a_little, config, batch_size, dtype_name, compiled).result()


def train_a_little(config: GPTConfig, batch_size: int, dtype_name: str, compiled: bool) -> dict:
    cpu.keep_freed_memory()  # as in training
    device = torch.device("cpu")
    rows = noise_rows(config.vocab_size, config.sequence_len)
    base_peak = devices.peak_memory_bytes(device)  # Python, torch and the data
    subject = make_subject("", config, rows, batch_size, device, getattr(torch, dtype_name), compiled)
    for _ in range(5):
        subject.step(lambda part: None)
    return {"peak": devices.peak_memory_bytes(device), "before the model": base_peak}


# ---- the comparison ----------------------------------------------------------------------------------------


def measure(subjects: list[Subject], device, repeats: int) -> dict:
    """Figures round by round: {"ceiling", "usual ceiling": FLOP/s, "seconds": {name: {part}}, "memory"}."""
    for subject in subjects:
        for _ in range(WARMUP):
            timed_step(subject, device)
    matmul_rate(device, subjects[0].dtype)
    ceiling = []
    usual = []
    seconds = {}
    for subject in subjects:
        seconds[subject.name] = {part: [] for part in (*PARTS, "step")}
    for turn in range(repeats):
        ceiling.append(matmul_rate(device, subjects[0].dtype))
        usual.append(usual_matmul_rate(device, subjects[0].dtype))
        first = turn % len(subjects)  # each is first in turn
        for subject in subjects[first:] + subjects[:first]:
            for part, value in timed_step(subject, device).items():
                seconds[subject.name][part].append(value)
    return {
        "ceiling": ceiling,
        "usual ceiling": usual,
        "seconds": seconds,
        "memory": {s.name: measure_memory(s, device) for s in subjects},
    }


def summary(subject: Subject, raw: dict, batch_size: int) -> dict:
    """The JSON's entry of one model."""
    config = subject.model.config
    cost = account(subject.model)
    seconds = {part: np.array(values) for part, values in raw["seconds"][subject.name].items()}
    tokens = batch_size * config.sequence_len
    rate = tokens * cost["flops/per_token"] / seconds["step"]
    execution = Execution(
        batch_size,
        subject.dtype.itemsize,
        device_type=next(subject.model.parameters()).device.type,
        compiled=subject.model.blocks[0]._compiled_call_impl is not None,
    )
    return {
        "config": asdict(config),
        "tokens per step": tokens,
        "accounting": cost,
        "seconds": {part: spread(values) for part, values in seconds.items()},
        "share of step": {part: spread(seconds[part] / seconds["step"]) for part in PARTS},
        "tokens per second": spread(tokens / seconds["step"]),
        "flops per second": spread(rate),
        "share of ceiling": spread(rate / np.array(raw["ceiling"])),
        "memory": raw["memory"][subject.name],
        "predicted peak": predict_peak(config, execution)["mem/predicted_peak_bytes"],
    }


def ratios(low: str, dense: str, raw: dict, models: dict) -> dict:
    """low / dense of each figure; times round by round."""
    a = models[low]
    b = models[dense]
    time_ratio = {
        part: spread(np.array(raw["seconds"][low][part]) / raw["seconds"][dense][part])
        for part in (*PARTS, "step")
    }
    flops = a["accounting"]["flops/per_token"] / b["accounting"]["flops/per_token"]
    return {
        "seconds": time_ratio,
        "flops": flops,
        "step over flops": time_ratio["step"]["median"] / flops,
        "tokens per second": spread(np.array(raw["seconds"][dense]["step"]) / raw["seconds"][low]["step"]),
        "parameters": a["accounting"]["params/total"] / b["accounting"]["params/total"],
        "memory": {part: a["memory"][part] / b["memory"][part] for part in MEMORY},
    }


def compare(subjects: list[Subject], controls: dict, batch_size: int, device, repeats: int) -> dict:
    """The JSON's part on all models. controls: {low-rank name: name of its dense control}."""
    raw = measure(subjects, device, repeats)
    models = {s.name: summary(s, raw, batch_size) for s in subjects}
    return {
        "ceiling flops per second": spread(raw["ceiling"]),
        "usual ceiling": spread(raw["usual ceiling"]),
        "models": models,
        "ratios": {low: {"to": dense, **ratios(low, dense, raw, models)} for low, dense in controls.items()},
        "seconds by round": raw["seconds"],
    }


# ---- the table ---------------------------------------------------------------------------------------------


def shown(value, scale=1.0, digits=4) -> str:
    """'12.3 (12.1-12.9)' of a spread, or a plain number."""

    def one(x):
        return f"{x * scale:,.{digits}g}" if abs(x * scale) < 10**digits else f"{x * scale:,.0f}"

    if isinstance(value, dict):
        return f"{one(value['median'])} ({one(value['low'])}-{one(value['high'])})"
    return one(value)


def table_rows(model: dict) -> list[tuple[str, str]]:
    """(label, cell) for one model; the labels are the same for all."""
    rows = [
        ("parameters, M", shown(model["accounting"]["params/total"], 1e-6)),
        ("tokens/s", shown(model["tokens per second"])),
    ]
    rows += [(f"{part}, ms", shown(model["seconds"][part], 1e3, 3)) for part in PARTS]
    rows += [
        ("whole step, ms", shown(model["seconds"]["step"], 1e3)),
        (
            "counted GFLOP a step",
            shown(model["accounting"]["flops/per_token"] * model["tokens per step"], 1e-9),
        ),
        ("GFLOP/s reached", shown(model["flops per second"], 1e-9)),
        ("share of matmul ceiling, %", shown(model["share of ceiling"], 100, 3)),
        ("step ratio / GFLOP ratio", ""),
    ]
    rows += [(f"{part}, MB", shown(model["memory"][part], 1e-6)) for part in MEMORY]
    return rows + [("peak as predicted, MB", shown(model["predicted peak"], 1e-6))]


def ratio_rows(ratio: dict) -> list[str]:
    """The cells of a ratio column, one for each of `table_rows`."""
    cells = [shown(ratio["parameters"], 1, 3), shown(ratio["tokens per second"], 1, 3)]
    cells += [shown(ratio["seconds"][part], 1, 3) for part in (*PARTS, "step")]
    cells += [shown(ratio["flops"], 1, 3), "", "", shown(ratio["step over flops"], 1, 3)]
    return cells + [shown(ratio["memory"][part], 1, 3) for part in MEMORY] + [""]


def table(result: dict) -> str:
    """Markdown: a column for each model and, after a low-rank one, its ratio to the control."""
    columns = {"": [label for label, _ in table_rows(next(iter(result["models"].values())))]}
    for name, model in result["models"].items():
        columns[name] = [cell for _, cell in table_rows(model)]
        if name in result["ratios"]:
            columns[f"/ {result['ratios'][name]['to']}"] = ratio_rows(result["ratios"][name])
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values())]
    return "\n".join(lines)


# ---- the reference task ------------------------------------------------------------------------------------


def targets(result: dict, dtype_name: str) -> list[dict]:
    """[{"what", "target", "reached", "ok"}] of the reference task.

    result: of `compare`, with "resident peak" of each model.
    """
    dense = result["models"]["dense 256"]
    low = result["ratios"]["low-rank 512"]
    published = NANOCHAT[dtype_name]
    ceiling = result["usual ceiling"]["median"]
    target_speed = published["factor"] * published["tok_per_sec"] * ceiling / published["ceiling"]
    speed = dense["tokens per second"]["median"]
    peak = result["resident peak"]["dense 256"]["peak"]
    share = dense["share of step"]["optimizer"]["median"]
    data = max(model["share of step"]["data"]["median"] for model in result["models"].values())
    error = {
        name: model["predicted peak"] / model["memory"]["peak"] - 1
        for name, model in result["models"].items()
    }
    return [
        dict(
            what=f"full rank, tokens/s: {published['factor']} x nanochat's {published['tok_per_sec']:,.0f}, "
            f"scaled from its machine's matmul ceiling ({published['ceiling'] / 1e9:.0f} GFLOP/s) to this "
            f"one's ({ceiling / 1e9:.0f}); it is another machine",
            target=f">= {target_speed:,.0f}",
            ok=speed >= target_speed,
            reached=f"{speed:,.0f}, {100 * dense['share of ceiling']['median']:.0f}% of the ceiling",
        ),
        dict(
            what=f"full rank, peak resident set: 0.7 x nanochat's {NANOCHAT_PEAK / 1e9:.2f} GB",
            target=f"<= {0.7 * NANOCHAT_PEAK / 1e9:.3f} GB",
            reached=f"{peak / 1e9:.3f} GB",
            ok=peak <= 0.7 * NANOCHAT_PEAK,
        ),
        dict(
            what="low rank, width 512: step time ratio / counted FLOP ratio",
            target="<= 1.25",
            ok=low["step over flops"] <= 1.25,
            reached=f"{low['step over flops']:.2f} = "
            f"{low['seconds']['step']['median']:.3f} / {low['flops']:.3f}",
        ),
        dict(
            what="full rank, optimizer's share of the step",
            target="<= 10%",
            reached=f"{100 * share:.1f}%",
            ok=share <= 0.10,
        ),
        dict(
            what="data's share of the step, largest of the models",
            target="<= 2%",
            reached=f"{100 * data:.2f}%",
            ok=data <= 0.02,
        ),
        dict(
            what="predicted peak against the measured one",
            target="within 10%",
            ok=max(map(abs, error.values())) <= 0.10,
            reached=", ".join(f"{name} {100 * e:+.1f}%" for name, e in error.items()),
        ),
    ]


def target_table(entries: list[dict]) -> str:
    lines = ["| target of the reference task | wanted | figure | |", "|---|---|---|---|"]
    for entry in entries:
        verdict = "reached" if entry["ok"] else "not reached"
        lines.append(f"| {entry['what']} | {entry['target']} | {entry['reached']} | {verdict} |")
    return "\n".join(lines)


def print_targets(result: dict):
    peaks = []
    for name, memory in result["resident peak"].items():
        peaks.append(f"{name} {memory['peak'] / 1e9:.3f} GB, {memory['before the model'] / 1e9:.3f} GB")
    print("\npeak resident set, and of it before the model: " + "; ".join(peaks))
    print(f"\n{target_table(result['targets'])}")


# ---- the command -------------------------------------------------------------------------------------------

SHAPE = (
    "depth",
    "model_dim",
    "head_dim",
    "max_seq_len",
    "device_batch_size",
    "vocab_size",
    "window_pattern",
    "attn_rank",
    "mlp_rank",
    "matrix_ranks",
    "factor_act",
    "rank_multiple",
    "mlp_ratio",
    "recompute",
)


def build_parser():
    parser = ArgumentParser("Time and memory of a training step, full rank against low rank.")
    add = parser.add_argument
    add(
        "--reference",
        action="store_true",
        help="the task of the speed targets and a low-rank pair at width 512; leave out the shape flags",
    )
    add("--depth", type=whole_number(1, DEEPEST), default=4)
    add("--model-dim", type=whole_number(1, WIDEST), default=256)
    add("--head-dim", type=whole_number(1, WIDEST), default=64)
    add("--max-seq-len", type=whole_number(2, LONGEST), default=256)
    add("--device-batch-size", type=whole_number(1, LONGEST), default=16, help="rows a step")
    add("--vocab-size", type=whole_number(2, LONGEST), default=4096)
    add("--window-pattern", default="SSSL", help="as in scripts.base_train")
    add(
        "--attn-rank",
        type=rank_flag,
        default=0.25,
        help="a whole number, or a fraction of min(in, out) of each matrix",
    )
    add("--mlp-rank", type=rank_flag, default=0.25, help="without any rank there is only the dense model")
    add(
        "--matrix-ranks",
        type=matrix_ranks_flag,
        default="",
        help="of q, k, v, o, up or down alone, as in scripts.base_train",
    )
    add_rank_multiple(add)
    add("--factor-act", choices=["none", "silu"], default="none", help="between the factors")
    add(
        "--mlp-ratio",
        type=real_number(above=0),
        default=4.0,
        help="of the low-rank model: hidden width of the MLP / width",
    )
    add(
        "--recompute",
        choices=recompute.MODES,
        default="none",
        help="of the low-rank model, as in scripts.base_train",
    )
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the activations")
    add("--device-type", choices=["", "cuda", "cpu"], default="", help="'' = cuda where there is one")
    add("--compile", choices=["on", "off"], default="off")
    add("--repeats", type=whole_number(1), default=10, help="rounds")
    add("--out", type=Path, default=None, help="JSON file")
    return parser


def model_config(args, width: int, attn_rank: float = 0, mlp_rank: float = 0, **more) -> GPTConfig:
    if width % args.head_dim or args.head_dim % 2:
        raise InputError(
            f"--model-dim {width}: not a multiple of --head-dim {args.head_dim}, which has to be even"
        )
    if args.window_pattern.strip("SL") or not args.window_pattern:
        raise InputError(f"--window-pattern {args.window_pattern}: use the letters S and L")
    heads = width // args.head_dim
    config = GPTConfig(
        sequence_len=args.max_seq_len,
        vocab_size=args.vocab_size,
        n_layer=args.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        window_pattern=args.window_pattern,
        rank_multiple=args.rank_multiple,
        attn_ranks=(attn_rank,) * args.depth,
        mlp_ranks=(mlp_rank,) * args.depth,
        **more,
    )
    check_size(config)
    if not config.n_hidden:
        raise InputError(
            f"--mlp-ratio {args.mlp_ratio:g}: leaves the MLP no hidden layer at width {width}; "
            "give more, e.g. 4"
        )
    return config


def models_from_flags(args) -> tuple[dict, dict]:
    """({name: config}, {low-rank name: control}) that the flags ask for."""
    if args.reference:
        configs = {
            "dense 256": model_config(args, 256),
            "dense 512": model_config(args, 512),
            "low-rank 512": model_config(args, 512, 0.25, 0.25),
        }
        return configs, {"low-rank 512": "dense 512"}
    configs = {"dense": model_config(args, args.model_dim)}
    if not (args.attn_rank or args.mlp_rank or args.matrix_ranks):
        return configs, {}
    configs["low-rank"] = model_config(
        args,
        args.model_dim,
        args.attn_rank,
        args.mlp_rank,
        matrix_ranks=named_ranks(args.matrix_ranks, args.depth),
        factor_act=args.factor_act,
        mlp_ratio=args.mlp_ratio,
        recompute=args.recompute,
    )
    return configs, {"low-rank": "dense"}


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in SHAPE:
        if args.reference and getattr(args, name) != parser.get_default(name):
            raise InputError(
                f"--{name.replace('_', '-')}: --reference fixes the task; leave out one of the two"
            )
    if args.out:
        check_out("--out", args.out, is_file=True)
    configs, controls = models_from_flags(args)
    device = processes.init_process(args.device_type).device
    dtype = getattr(torch, args.dtype)
    compiled = args.compile == "on"
    rows = noise_rows(args.vocab_size, args.max_seq_len)
    if not rows.count:
        raise InputError(f"--max-seq-len {args.max_seq_len}: longer than the million tokens there are")
    try:
        subjects = [
            make_subject(name, config, rows, args.device_batch_size, device, dtype, compiled)
            for name, config in configs.items()
        ]
    except ValueError as e:  # a rank that does not fit
        raise InputError(f"--attn-rank, --mlp-rank, --matrix-ranks: {e}") from None

    result = {
        "machine": machine_description(device, dtype) | {"compiled": compiled},
        "flags": flags_as_json(args),
        **compare(subjects, controls, args.device_batch_size, device, args.repeats),
    }
    ceiling = shown(result["ceiling flops per second"], 1e-9)
    print(
        f"{result['machine']['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.dtype}, {'compiled' if compiled else 'eager'}; batch {args.device_batch_size} x "
        f"{args.max_seq_len}, {args.repeats} rounds; matmul ceiling {ceiling} GFLOP/s\n\n{table(result)}"
    )
    if args.reference:
        for name, config in configs.items():
            if device.type == "cuda":
                peak = {"peak": result["models"][name]["memory"]["peak"], "before the model": 0}
            else:
                peak = resident_peak(config, args.device_batch_size, args.dtype, compiled)
            result.setdefault("resident peak", {})[name] = peak
        result["targets"] = targets(result, args.dtype)
        print_targets(result)
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    common.run_script(main)
