"""From flags to a plan: the model that the flags of base_train describe, how long it trains, and all checks.

`model_config` makes the model's GPTConfig, `training_plan` the batch, the steps and the learning rate. Both
raise InputError, which names the flag at fault, before any file is touched. Where --budget-params decides
the depth or the ranks, `budget.choose_model` makes the config.
"""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nanochat.accounting import account, matrix_parameters, on_meta
from nanochat.arguments import as_whole_number
from nanochat.errors import InputError
from nanochat.flags import OLD_DEFAULTS, SHAPE_FLAGS, build_parser
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import parse_map, takes_two_runs
from nanochat.layer_ranks import check_ranks, layer_ranks, named_ranks, rank_lines
from nanochat.naming import method_with_size, run_folder
from nanochat.optim import default_matrix_lr
from nanochat.processes import print0
from nanochat.run_files import read_config, saved_steps

MAX_PARAMETERS = 10**15


def parse_flags(argv=None) -> Namespace:
    """The flags of base_train. With --init-from, shape and ranks are its run's, and the step is filled in.

    InputError if a flag of shape or rank is given beside --init-from, or if there is no such checkpoint.
    """
    args = build_parser().parse_args(argv)
    if args.init_from is None:
        return args
    folder, step = starting_point(args.init_from)
    refused = [f"--{name.replace('_', '-')}" for name in SHAPE_FLAGS if name in args.given]
    if refused:
        pronoun = "it" if len(refused) == 1 else "them"
        raise InputError(
            f"{', '.join(refused)}: not with --init-from, whose checkpoint has its shape and ranks; "
            f"leave {pronoun} out"
        )
    flags = {**OLD_DEFAULTS, **read_config(folder)["flags"]}
    args.take({name: flags[name] for name in SHAPE_FLAGS if name in flags}, folder / "config.json")
    args.init_from = f"{folder.name}:{step}"
    return args


def starting_point(init_from: str) -> tuple[Path, int]:
    """(run folder, step) of TAG[:STEP]."""
    tag, _, step = init_from.partition(":")
    folder = run_folder("--init-from", tag)
    steps = saved_steps(folder)
    if not steps:
        raise InputError(
            f"--init-from {init_from}: the run {tag} has no checkpoint in {folder / 'checkpoints'} yet"
        )
    if step and as_whole_number(step) not in steps:
        raise InputError(f"--init-from {init_from}: no checkpoint of step {step}; there are: {steps}")
    return folder, int(step or steps[-1])


# ---- from flags to a model ---------------------------------------------------------------------------------


def model_config(args, vocab_size: int, depth: int | None = None) -> GPTConfig:
    """The model that the flags describe. depth: in place of --depth. InputError names the flag at fault."""
    depth = depth or args.depth
    width, heads, kv_heads = width_and_heads(args, depth)
    if not args.window_pattern or set(args.window_pattern) - set("SL"):
        raise InputError(f"--window-pattern {args.window_pattern!r}: use the letters S and L only")
    if args.tie_embeddings and args.lm_head_rank:
        raise InputError("--lm-head-rank: a tied head (--tie-embeddings) has no matrix of its own to factor")
    config = GPTConfig(
        sequence_len=args.max_seq_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=width,
        mlp_ratio=args.mlp_ratio,
        window_pattern=args.window_pattern,
        lm_head_rank=args.lm_head_rank,
        tie_embeddings=args.tie_embeddings,
        value_embeddings=args.value_embeddings,
        factor_act=args.factor_act,
        recompute=args.recompute,
        rank_multiple=args.rank_multiple,
    )
    if not config.n_hidden:
        raise InputError(
            f"--mlp-ratio {args.mlp_ratio:g}: leaves the MLP no hidden layer at width {width}; "
            "give more, e.g. 4"
        )
    check_size(config)  # before anything is made that has as many entries as there are layers
    config = replace(
        config,
        layer_map=tied_map(args.layer_map, depth),
        attn_ranks=layer_ranks(args, "attn", depth),
        mlp_ranks=layer_ranks(args, "mlp", depth),
        matrix_ranks=named_ranks(args.matrix_ranks, depth),
    )
    check_ranks(config)
    return config


def width_and_heads(args, depth: int) -> tuple[int, int, int]:
    """(width, query heads, key/value heads)"""
    width = args.model_dim
    if width < 1:
        width = math.ceil(depth * args.aspect_ratio / args.head_dim) * args.head_dim
    if args.head_dim % 2:  # rotary embeddings turn pairs of channels
        raise InputError(f"--head-dim {args.head_dim}: must be even; e.g. --head-dim {args.head_dim + 1}")
    if width % args.head_dim:
        heads = {max(1, width // args.head_dim), width // args.head_dim + 1}
        near = " or ".join(str(count * args.head_dim) for count in sorted(heads))
        raise InputError(
            f"--head-dim {args.head_dim}: must divide the width {width}; e.g. --model-dim {near}"
        )
    heads = width // args.head_dim
    kv_heads = args.n_kv_head if args.n_kv_head > 0 else heads
    if heads % kv_heads:
        raise InputError(f"--n-kv-head {kv_heads}: must divide the {heads} heads")
    return width, heads, kv_heads


def check_size(config: GPTConfig):
    """InputError for a model so large that sizes overflow in torch before any memory is asked for."""
    C = config.n_embd
    N = config.n_hidden
    entries = 2 * config.vocab_size * C + config.n_layer * (4 * C * C + 2 * C * N)  # at full rank
    if entries > MAX_PARAMETERS:
        raise InputError(
            "--depth, --aspect-ratio, --model-dim, --mlp-ratio, --vocab-size: "
            f"{config.n_layer} layers of width {C:,}, with MLPs of {N:,} and a vocabulary of "
            f"{config.vocab_size:,}, are more than {MAX_PARAMETERS:.0e} parameters; "
            "give less of one of them"
        )


def tied_map(text: str, depth: int) -> tuple[int, ...]:
    """--layer-map for a model of so many layers; () without it."""
    if not text:
        return ()
    if takes_two_runs(text):
        raise InputError(
            f"--layer-map {text}: takes copies from two trained checkpoints, and here one model is trained; "
            "give the numbers of its layers, solar or mobilellm"
        )
    layer_map = parse_map(text, depth)
    unused = set(range(depth)) - set(layer_map)
    if unused:
        raise InputError(
            f"--layer-map {text}: leaves out layer {min(unused)} of --depth {depth}, which would never learn"
        )
    return layer_map


def full_rank(config: GPTConfig) -> GPTConfig:
    """The full-rank model of the same shape."""
    return replace(config, attn_ranks=(), mlp_ranks=(), matrix_ranks={}, lm_head_rank=0, factor_act="none")


# ---- how long to train -------------------------------------------------------------------------------------


def training_plan(args, config: GPTConfig, world_size: int) -> dict:
    """`batch_and_horizon`, checked, and the learning rate of the matrices."""
    plan = batch_and_horizon(args, on_meta(config), world_size)
    steps = plan["num_iterations"]
    check_schedule(args, steps)
    return plan | {"matrix_lr": args.matrix_lr if args.matrix_lr >= 0 else default_matrix_lr(steps)}


def batch_and_horizon(args, model: GPT, world_size: int, shape: GPTConfig | None = None) -> dict:
    """{num_iterations, total_batch_size, grad_accum_steps, device_batch_size, tokens}

    What is not given follows from the full-rank model of the shape (--horizon-from full), so that runs of all
    ranks take the same batch and steps. But --target-flops are the model's own: then the steps differ.

    shape: the model's shape, where that is not its config. InputError where the batch does not divide.
    """
    sized = model if args.horizon_from == "own" else on_meta(full_rank(shape or model.config))
    parameters = matrix_parameters(sized)
    total = args.total_batch_size
    if total < 1:
        total = default_batch(args, parameters, world_size)
    rows = device_batch(args, total, world_size)
    if args.num_iterations > 0:
        steps = args.num_iterations
    elif args.target_flops > 0:
        steps = max(1, round(args.target_flops / (account(model)["flops/per_token"] * total)))
    elif args.target_param_data_ratio > 0:
        steps = max(1, round(args.target_param_data_ratio * parameters / total))
    else:
        raise InputError(
            "--num-iterations, --target-flops, --target-param-data-ratio: give one of them above 0"
        )
    return {
        "num_iterations": steps,
        "total_batch_size": total,
        "grad_accum_steps": total // (rows * args.max_seq_len * world_size),
        "device_batch_size": rows,
        "tokens": steps * total,
    }


def default_batch(args, parameters: int, world_size: int) -> int:
    """Tokens of a step where --total-batch-size is not given: whole passes of all processes.

    The critical batch size grows as tokens^0.383 (Power Lines, arXiv 2505.13738). Here the curve goes through
    2^19 tokens a step for 1.3e9 training tokens.
    """
    horizon = max(1, args.target_param_data_ratio) * parameters
    total = 2 ** round(math.log2(2**19 * (horizon / 1.3e9) ** 0.383))
    one_pass = args.device_batch_size * args.max_seq_len * world_size
    return one_pass * max(1, round(total / one_pass))


def device_batch(args, total: int, world_size: int) -> int:
    """Rows of one process in one pass: the most, up to --device-batch-size, that divide its rows of a step.

    InputError where the tokens of a step are no whole number of rows for each process.
    """
    smallest = args.max_seq_len * world_size  # tokens of one row in each process
    if total % smallest:
        lower = total // smallest * smallest
        near = [tokens for tokens in (lower, lower + smallest) if tokens]
        raise InputError(
            f"--total-batch-size {total}: not a multiple of --max-seq-len {args.max_seq_len} × "
            f"{world_size} process(es) = {smallest}; nearest: {' or '.join(map(str, near))}"
        )
    rows = total // smallest
    largest = min(args.device_batch_size, rows)
    return next(count for count in range(largest, 0, -1) if rows % count == 0)


def take_device_batch(args, plan: dict, world_size: int):
    """Set --device-batch-size to the plan's, and say so where it is less than was given."""
    rows = plan["device_batch_size"]
    if rows < args.device_batch_size:
        print0(
            f"--device-batch-size {args.device_batch_size}: taking {rows}, the largest that divides "
            f"{plan['total_batch_size']:,} tokens a step of {args.max_seq_len} × {world_size} process(es)"
        )
    args.device_batch_size = rows


def check_schedule(args, steps: int):
    if args.warmup_steps > steps:
        raise InputError(
            f"--warmup-steps {args.warmup_steps}: more than the {steps:,} steps of the run, "
            f"which would never reach its learning rates; give at most {steps}"
        )


# ---- printing ----------------------------------------------------------------------------------------------


def print_plan(config: GPTConfig, plan: dict, accounting: dict, args):
    """What --dry-run shows: model, ranks, training, horizon, and a line for each cost."""
    windows = [config.window(layer) for layer in config.positions]
    print0(
        f"model: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads "
        f"({config.n_kv_head} key/value), MLP {config.n_hidden}, vocabulary {config.vocab_size}, "
        f"context {config.sequence_len}, windows {windows}"
    )
    if config.layer_map:
        print0(f"layer at each of {len(config.layer_map)} positions: {', '.join(map(str, config.layer_map))}")
    for line in rank_lines(config):
        print0(line)
    rate = f"matrix lr {plan['matrix_lr']:.4g}" if "matrix_lr" in plan else f"lr {plan['lr']:.4g}"
    print0(
        f"training: {plan['num_iterations']:,} steps × {plan['total_batch_size']:,} tokens = "
        f"{plan['tokens']:,} tokens, {plan['grad_accum_steps']} micro-step(s), {rate}, "
        f"{plan['tokens'] * accounting['flops/per_token']:.3g} FLOPs"
    )
    if words := horizon_words(args):
        print0(f"horizon: {words}")
    subspace = plan.get("subspace")
    if subspace:
        flags = {f"subspace_{key}": subspace[key] for key in ("dim", "scope", "rank", "scales")}
        print0(f"subspace: {method_with_size({'subspace': subspace['kind'], **flags, **subspace})}")
    if accounting["params/trained"] < accounting["params/total"]:
        rest = ", the rest follows from them and a seed" if subspace else ""
        print0(f"trained: {accounting['params/trained']:,} of its numbers{rest}")
    for key, value in accounting.items():
        print0(cost_line(key, value, accounting["params/total"]))


def cost_line(key: str, value: int, parameters: int) -> str:
    """'  params/mlp   2,097,152   33.1%': a cost, and its share of all parameters, or its size in MiB."""
    line = f"  {key:26}{value:>18,}"
    if key.startswith("mem/"):
        return f"{line}{value / 2**20:10,.1f} MiB"
    if key.startswith("params/") and key != "params/stored_bits":
        return f"{line}{value / parameters:8.1%}"
    return line


def horizon_words(args) -> str:
    """Where batch and steps come from, as far as the flags do not give them; '' if they give both."""
    from_flops = args.num_iterations < 1 and args.target_flops > 0
    derived = []
    if args.num_iterations < 1 and not from_flops:
        derived.append("steps")
    if args.total_batch_size < 1:
        derived.append("tokens a step")
    words = []
    if from_flops:
        words.append(f"steps from --target-flops {args.target_flops:g} at this model's FLOPs")
    if derived:
        model = "the full-rank model of this shape" if args.horizon_from == "full" else "this model"
        ratio = f"{args.target_param_data_ratio:g} tokens a matrix parameter of {model}"
        words.append(f"{' and '.join(derived)} from {ratio} (--horizon-from {args.horizon_from})")
    return ", ".join(words)
