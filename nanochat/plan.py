"""From flags to a plan: the model that the flags of base_train describe, how long it trains, and all checks.

`solve_budget` makes the model's GPTConfig, `training_plan` the batch, the steps and the learning rate. Both
raise InputError, which names the flag at fault, before any file is touched.
"""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nanochat import metrics
from nanochat.arguments import LARGEST_INTEGER, as_whole_number, quoted
from nanochat.common import memory_bytes
from nanochat.errors import InputError, first_line, shortened
from nanochat.flag_types import DEEPEST
from nanochat.flags import DEFAULTS_BEFORE, SHAPE_FLAGS, build_parser
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import of_two, parse_map
from nanochat.layer_ranks import (
    check_ranks,
    layer_ranks,
    list_that_fixes_depth,
    named_in_short,
    named_ranks,
    rank_lines,
    ranks_in_short,
)
from nanochat.model_flags import RANK_GROUP
from nanochat.naming import is_tag, no_such_run, run_folder, with_size
from nanochat.optim import default_matrix_lr
from nanochat.processes import print0
from nanochat.rank import (
    account,
    count_parameters,
    matrix_parameters,
    on_meta,
    predict_peak,
    solve_depth,
    solve_rank,
)
from nanochat.run_files import read_config, saved_steps

MOST_PARAMETERS = 10**15


def parse_flags(argv=None) -> Namespace:
    """The flags of base_train. With --init-from, shape and ranks are its run's, and the step is filled in.

    InputError if a flag of shape or rank is given beside --init-from, or if there is no such checkpoint.
    """
    args = build_parser().parse_args(argv)
    if args.init_from is None:
        return args
    folder, step = starting_point(args.init_from)
    given = [f"--{name.replace('_', '-')}" for name in SHAPE_FLAGS if name in args.given]
    if given:
        pronoun = "it" if len(given) == 1 else "them"
        raise InputError(
            f"{', '.join(given)}: not with --init-from, whose checkpoint has its shape and ranks; "
            f"leave {pronoun} out"
        )
    flags = {**DEFAULTS_BEFORE, **read_config(folder)["flags"]}
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
    if width % args.head_dim or args.head_dim % 2:
        heads = {max(1, width // args.head_dim), width // args.head_dim + 1}
        near = " or ".join(str(count * args.head_dim) for count in sorted(heads))
        raise InputError(
            f"--head-dim {args.head_dim}: must be even and divide the width {width}; e.g. --model-dim {near}"
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
    if entries > MOST_PARAMETERS:
        raise InputError(
            "--depth, --aspect-ratio, --model-dim, --mlp-ratio, --vocab-size: "
            f"{config.n_layer} layers of width {C:,}, with MLPs of {N:,} and a vocabulary of "
            f"{config.vocab_size:,}, are more than {MOST_PARAMETERS:.0e} parameters; "
            "give less of one of them"
        )


def check_memory(args, accounting: dict, device_type: str):
    """InputError if this machine's memory can never hold the training.

    Half of the activations count: compiled code keeps fewer than the accounting says.
    """
    needed = accounting["mem/weights_bytes"] + accounting["mem/grads_bytes"]
    needed += accounting.get("mem/activations_bytes", 0) // 2
    available = memory_bytes(device_type)
    if needed > available:
        flags = "--depth, --model-dim, --vocab-size, --max-seq-len, --device-batch-size"
        if args.subspace:
            flags += ", --subspace-dim"
        raise InputError(
            f"{flags}: weights, gradients and activations need at least {needed / 2**30:,.1f} "
            f"GiB, and there are {available / 2**30:,.1f} GiB; give less of one of them"
        )


def tied_map(text: str, depth: int) -> tuple[int, ...]:
    """--layer-map for a model of so many layers; () without it."""
    if not text:
        return ()
    if of_two(text):
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


def recorded_model(folder: Path) -> GPTConfig:
    """The model of a run, from its config.json."""
    try:
        return GPTConfig(**read_config(folder)["derived"]["model"])
    except (TypeError, ValueError) as e:
        message = f"{folder / 'config.json'}: derived.model is no model of this program ({first_line(e)})"
        raise InputError(f"{message}; restore it") from None


# ---- under a budget of parameters --------------------------------------------------------------------------


def solve_budget(args, vocab_size: int) -> GPTConfig:
    """The model of --init-from, or of the flags, with the depth or the ranks that --budget-params allows."""
    if args.init_from is not None:
        return model_of_checkpoint(args, vocab_size)
    if not args.budget_params and not args.solve:
        return model_config(args, vocab_size)
    if not (args.budget_params and args.solve):
        raise InputError(
            "--budget-params and --solve go together: e.g. --budget-params 10_000_000 --solve rank"
        )
    budget = parameter_budget(args)
    try:
        if args.solve == "rank":
            return solve_rank(model_config(args, vocab_size), budget)
        check_depth_is_free(args, "--solve depth")
        return solve_depth(lambda depth: nearest_config(args, vocab_size, depth), budget)
    except ValueError as e:
        raise InputError(f"--budget-params {args.budget_params}: {e}") from None


def model_of_checkpoint(args, vocab_size: int) -> GPTConfig:
    """The model of --init-from."""
    folder, _ = starting_point(args.init_from)
    config = recorded_model(folder)
    if config.vocab_size != vocab_size:
        raise InputError(
            f"--init-from {args.init_from}: has a vocabulary of {config.vocab_size} tokens, "
            f"here it is {vocab_size}; put {folder / 'tokenizer.json'} in its place"
        )
    return replace(config, recompute=args.recompute)


def parameter_budget(args) -> int:
    """--budget-params as a number; where it names a run, that run's number of parameters."""
    budget = as_whole_number(args.budget_params)
    if budget is not None:
        if not 0 < budget <= LARGEST_INTEGER:
            raise InputError(
                f"--budget-params {quoted(args.budget_params)}: "
                "give a number of parameters such as 10_000_000, or the tag of a run"
            )
        return budget
    folder = metrics.runs_dir() / args.budget_params
    if not is_tag(args.budget_params) or not (folder / "config.json").is_file():
        raise InputError(
            f"--budget-params {shortened(args.budget_params)}: neither a whole number such as "
            f"10_000_000 nor a run's tag: {no_such_run(args.budget_params)}"
        )
    budget = metrics.load_run(folder).summary.get("params/total")
    if budget is None:
        raise InputError(
            f"--budget-params {args.budget_params}: that run has no parameter count in its summary.json yet"
        )
    return budget


def nearest_config(args, vocab_size: int, depth: int) -> GPTConfig:
    """The model of the flags with `depth` layers, or with the nearest depth at which the flags fit together.

    Where the width follows the depth, they may not fit at this one. Smaller depths are tried first, then up
    to 128 larger ones. InputError if none will do, or if the depth is beyond DEEPEST.
    """
    if depth > DEEPEST:
        raise InputError(
            f"--budget-params {args.budget_params}: "
            f"leaves room for more than {DEEPEST:,} layers; give less, or a larger --model-dim"
        )
    errors = []
    for nearby in (*range(depth, 0, -1), *range(depth + 1, depth + 129)):
        try:
            return model_config(args, vocab_size, nearby)
        except InputError as e:
            errors.append(e)
    raise errors[0]


def check_depth_is_free(args, flag: str):
    """InputError, beginning with `flag`, if another flag has one value for each layer."""
    if args.layer_map[:1].isdigit():
        raise InputError(
            f"{flag}: --layer-map {args.layer_map} names the layers and so fixes the depth; "
            "use --solve rank, or --layer-map mobilellm"
        )
    if given := list_that_fixes_depth(args):
        raise InputError(
            f"{flag}: {given} has one rank a layer and so fixes the depth; "
            "use --solve rank, or a named schedule"
        )


def budget_frontier(args, vocab_size: int) -> list[GPTConfig]:
    """The models with the largest ranks within --budget-params: one a depth, from 1 to 4 × --depth layers.

    It ends before the first depth at which even rank 1 is too much.
    """
    if not args.budget_params or args.solve:
        raise InputError(
            "--plan: needs --budget-params, without --solve: it shows what --solve would find, depth by depth"
        )
    check_depth_is_free(args, "--plan")
    if args.depth > 256:
        raise InputError(
            f"--depth {args.depth}: --plan goes through every depth up to 4 times that; give at most 256"
        )
    budget = parameter_budget(args)
    configs = []
    for depth in range(1, 4 * args.depth + 1):
        config = nearest_config(args, vocab_size, depth)
        if config.n_layer != depth:
            continue  # the flags do not fit together at this depth
        try:
            configs.append(solve_rank(config, budget))
        except ValueError as e:
            if not configs:
                raise InputError(f"--budget-params {args.budget_params}: at depth {depth} {e}") from None
            break
    return configs


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
    ranks take the same batch and the same steps. --target-flops are the model's own: then the steps differ.

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
        below = total // smallest * smallest
        near = [tokens for tokens in (below, below + smallest) if tokens]
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


# ---- printed -----------------------------------------------------------------------------------------------


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
        print0(f"subspace: {with_size({'subspace': subspace['kind'], **flags, **subspace})}")
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
    """What the batch and the steps follow from, as far as they are not given; '' if both are."""
    by_flops = args.num_iterations < 1 and args.target_flops > 0
    derived = []
    if args.num_iterations < 1 and not by_flops:
        derived.append("steps")
    if args.total_batch_size < 1:
        derived.append("tokens a step")
    words = []
    if by_flops:
        words.append(f"steps from --target-flops {args.target_flops:g} at this model's FLOPs")
    if derived:
        model = "the full-rank model of this shape" if args.horizon_from == "full" else "this model"
        ratio = f"{args.target_param_data_ratio:g} tokens a matrix parameter of {model}"
        words.append(f"{' and '.join(derived)} from {ratio} (--horizon-from {args.horizon_from})")
    return ", ".join(words)


def print_frontier(args, vocab_size: int, world_size: int, dtype_bytes: int):
    """What --plan shows: at each depth the largest ranks within the budget, and their costs beside full rank.

    The first row is the full-rank model of the flags. dtype_bytes: of one number of an activation.
    """
    flags_at_full_rank = Namespace(**{**vars(args), **RANK_GROUP.defaults()})
    full = model_config(flags_at_full_rank, vocab_size)
    configs = budget_frontier(args, vocab_size)
    costs_of_full = frontier_costs(args, full, world_size, dtype_bytes)
    budget = parameter_budget(args)
    print0(
        f"the largest ranks within {budget:,} parameters at each depth; "
        "beside each figure its ratio to the full-rank model:"
    )
    print0(
        f"{'depth':>5}{'width':>7}{'attention rank':>16}{'MLP rank':>16}"
        f"{'parameters':>15}{'':6}{'MFLOP/token':>15}{'':6}{'peak MiB':>15}"
    )
    print0(frontier_row(full, costs_of_full, costs_of_full))
    for config in configs:
        row = frontier_row(config, frontier_costs(args, config, world_size, dtype_bytes), costs_of_full)
        if count_parameters(full_rank(config)) <= budget:
            row += "  full rank fits too"
        print0(row)
    if configs[-1].n_layer == 4 * args.depth:
        print0(f"deeper models may fit too: shown up to 4 × --depth {args.depth}")


def frontier_costs(args, config: GPTConfig, world_size: int, dtype_bytes: int) -> tuple[float, float, float]:
    """(parameters, MFLOP a token, peak MiB)"""
    plan = training_plan(args, config, world_size)
    memory = predict_peak(config, plan["device_batch_size"], dtype_bytes, plan["grad_accum_steps"] > 1)
    costs = account(config)
    return (
        costs["params/total"],
        costs["flops/per_token"] / 1e6,
        memory["mem/predicted_peak_bytes"] / 2**20,
    )


def frontier_row(config: GPTConfig, costs: tuple, costs_of_full: tuple) -> str:
    """One depth: its ranks, and each cost beside its ratio to the full-rank model's."""
    row = f"{config.n_layer:5}{config.n_embd:7}"
    row += f"{ranks_in_short(config.attn_ranks):>16}{ranks_in_short(config.mlp_ranks):>16}"
    for cost, of_full, digits in zip(costs, costs_of_full, (0, 1, 0)):
        row += f"{cost:15,.{digits}f}{cost / of_full:6.2f}"
    if config.matrix_ranks:
        row += f"  ({named_in_short(config)})"
    return row
