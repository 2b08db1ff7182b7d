"""From flags to a plan: the flags of base_train, the model they describe, the steps to train it, and every check of both."""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from nanochat import metrics
from nanochat.common import (
    LARGEST_INTEGER,
    InputError,
    as_whole_number,
    first_line,
    memory_bytes,
    print0,
    quoted,
    shortened,
)
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
    """The flags of base_train. With --init-from, those of shape and rank are as its run has them, and the checkpoint's step is filled in.

    InputError if one of them is given too, or there is no such checkpoint.
    """
    args = build_parser().parse_args(argv)
    if args.init_from is not None:
        folder, step = starting_point(args.init_from)
        if both := [f"--{name.replace('_', '-')}" for name in SHAPE_FLAGS if name in args.given]:
            raise InputError(
                f"{', '.join(both)}: not with --init-from, whose checkpoint has its shape and ranks; leave {'it' if len(both) == 1 else 'them'} out"
            )
        flags = {**DEFAULTS_BEFORE, **read_config(folder)["flags"]}
        args.take({name: flags[name] for name in SHAPE_FLAGS if name in flags}, folder / "config.json")
        args.init_from = f"{folder.name}:{step}"
    return args


def starting_point(init_from: str) -> tuple[Path, int]:
    """(run folder, step) of TAG[:STEP]."""
    tag, _, step = init_from.partition(":")
    folder = run_folder("--init-from", tag)
    if not (steps := saved_steps(folder)):
        raise InputError(
            f"--init-from {init_from}: the run {tag} has no checkpoint in {folder / 'checkpoints'} yet"
        )
    if step and as_whole_number(step) not in steps:
        raise InputError(f"--init-from {init_from}: no checkpoint of step {step}; there are: {steps}")
    return folder, int(step or steps[-1])


# ---- from flags to a model ------------------------------------------------------------------------------------------


def model_config(args, vocab_size: int, depth: int | None = None) -> GPTConfig:
    """The shape that the flags describe (at another depth, for --solve depth). InputError names the flag at fault."""
    depth = depth or args.depth
    width = (
        args.model_dim
        if args.model_dim > 0
        else math.ceil(depth * args.aspect_ratio / args.head_dim) * args.head_dim
    )
    if width % args.head_dim or args.head_dim % 2:
        heads = {max(1, width // args.head_dim), width // args.head_dim + 1}
        near = " or ".join(str(number * args.head_dim) for number in sorted(heads))
        raise InputError(
            f"--head-dim {args.head_dim}: must be even and divide the width {width}; e.g. --model-dim {near}"
        )
    heads = width // args.head_dim
    kv_heads = args.n_kv_head if args.n_kv_head > 0 else heads
    if heads % kv_heads:
        raise InputError(f"--n-kv-head {kv_heads}: must divide the {heads} heads")
    if not args.window_pattern or set(args.window_pattern) - set("SL"):
        raise InputError(f"--window-pattern {args.window_pattern!r}: use the letters S and L only")
    if args.tie_embeddings and args.lm_head_rank:
        raise InputError("--lm-head-rank: a tied head (--tie-embeddings) has no matrix of its own to factor")
    config = GPTConfig(
        args.max_seq_len,
        vocab_size,
        depth,
        heads,
        kv_heads,
        width,
        args.mlp_ratio,
        args.window_pattern,
        lm_head_rank=args.lm_head_rank,
        tie_embeddings=args.tie_embeddings,
        value_embeddings=args.value_embeddings,
        factor_act=args.factor_act,
        recompute=args.recompute,
        rank_multiple=args.rank_multiple,
    )
    if not config.n_hidden:
        raise InputError(
            f"--mlp-ratio {args.mlp_ratio:g}: leaves the MLP no hidden layer at width {width}; give more, e.g. 4"
        )
    check_size(config)
    config = replace(
        config,
        layer_map=tied_map(args.layer_map, depth),
        attn_ranks=layer_ranks(args, "attn", depth),
        mlp_ranks=layer_ranks(args, "mlp", depth),
        matrix_ranks=named_ranks(args.matrix_ranks, depth),
    )
    check_ranks(config)
    return config


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
    """InputError if this machine's memory can never hold the training. Activations count half:
    compilation saves some.
    """
    needed = accounting["mem/weights_bytes"] + accounting["mem/grads_bytes"]
    needed += accounting.get("mem/activations_bytes", 0) // 2
    there = memory_bytes(device_type)
    if needed > there:
        flags = "--depth, --model-dim, --vocab-size, --max-seq-len, --device-batch-size"
        flags += ", --subspace-dim" if args.subspace else ""
        raise InputError(
            f"{flags}: weights, gradients and activations need at least {needed / 2**30:,.1f} "
            f"GiB, and there are {there / 2**30:,.1f} GiB; give less of one of them"
        )


def tied_map(text: str, depth: int) -> tuple[int, ...]:
    """--layer-map for a model of so many layers; () without it."""
    if of_two(text):
        raise InputError(
            f"--layer-map {text}: takes copies from two trained checkpoints, and here one model is trained; "
            "give the numbers of its layers, solar or mobilellm"
        )
    layers = parse_map(text, depth) if text else ()
    if layers and (left_out := set(range(depth)) - set(layers)):
        raise InputError(
            f"--layer-map {text}: leaves out layer {min(left_out)} of --depth {depth}, which would never learn"
        )
    return layers


def full_rank(config: GPTConfig) -> GPTConfig:
    """The full-rank model of the same shape."""
    return replace(config, attn_ranks=(), mlp_ranks=(), matrix_ranks={}, lm_head_rank=0, factor_act="none")


# ---- under a budget -------------------------------------------------------------------------------------------------


def parameter_budget(args) -> int:
    """--budget-params as a number; of a run, what it has."""
    if (budget := as_whole_number(args.budget_params)) is not None:
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
    found = metrics.load_run(folder).summary.get("params/total")
    if found is None:
        raise InputError(
            f"--budget-params {args.budget_params}: that run has no parameter count in its summary.json yet"
        )
    return found


def nearest_config(args, vocab_size: int, depth: int) -> GPTConfig:
    """The flags' model of `depth` layers. Where the width follows the depth, the flags may not fit together there: then the next fewer
    layers at which they do or, with none, the next more. InputError if there is no such depth nearby.
    """
    refused = []
    for nearby in (*range(depth, 0, -1), *range(depth + 1, depth + 129)):
        try:
            return model_config(args, vocab_size, nearby)
        except InputError as e:
            refused.append(e)
    raise refused[0]


def checked_depth(args, depth: int) -> int:
    if depth > DEEPEST:
        raise InputError(
            f"--budget-params {args.budget_params}: "
            f"leaves room for more than {DEEPEST:,} layers; give less, or a larger --model-dim"
        )
    return depth


def check_depth_is_free(args, flag: str):
    if args.layer_map[:1].isdigit():
        raise InputError(
            f"{flag}: --layer-map {args.layer_map} names the layers and so fixes the depth; use --solve rank, or --layer-map mobilellm"
        )
    if given := list_that_fixes_depth(args):
        raise InputError(
            f"{flag}: {given} has one rank a layer and so fixes the depth; "
            "use --solve rank, or a named schedule"
        )


def recorded_model(folder: Path) -> GPTConfig:
    """The model of a run, from its config.json."""
    try:
        return GPTConfig(**read_config(folder)["derived"]["model"])
    except (TypeError, ValueError) as e:
        message = f"{folder / 'config.json'}: derived.model is no model of this program ({first_line(e)})"
        raise InputError(f"{message}; restore it") from None


def solve_budget(args, vocab_size: int) -> GPTConfig:
    """The config of the flags, with depth or rank chosen by --budget-params and --solve where they are given; or that of --init-from."""
    if args.init_from is not None:
        folder, _ = starting_point(args.init_from)
        config = recorded_model(folder)
        if config.vocab_size != vocab_size:
            raise InputError(
                f"--init-from {args.init_from}: has a vocabulary of {config.vocab_size} tokens, here it is {vocab_size}; put {folder / 'tokenizer.json'} in its place"
            )
        return replace(config, recompute=args.recompute)
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
        return solve_depth(lambda depth: nearest_config(args, vocab_size, checked_depth(args, depth)), budget)
    except ValueError as e:
        raise InputError(f"--budget-params {args.budget_params}: {e}") from None


def budget_frontier(args, vocab_size: int) -> list[GPTConfig]:
    """For each depth from 1 to 4 × --depth, as far as rank 1 fits: the model of the largest ranks within --budget-params."""
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
    found = []
    for depth in range(1, 4 * args.depth + 1):
        config = nearest_config(args, vocab_size, depth)
        if config.n_layer != depth:
            continue  # the flags do not fit together at this depth
        try:
            found.append(solve_rank(config, budget))
        except ValueError as e:
            if not found:
                raise InputError(f"--budget-params {args.budget_params}: at depth {depth} {e}") from None
            break
    return found


def print_frontier(args, vocab_size: int, world_size: int, dtype_bytes: int):
    """What --plan shows: depth by depth the largest ranks within the budget, and what they cost beside the full-rank model of the flags."""

    def costs(config):  # parameters, MFLOP, MiB
        plan = training_plan(args, config, world_size)
        memory = predict_peak(config, plan["device_batch_size"], dtype_bytes, plan["grad_accum_steps"] > 1)
        cost = account(config)
        return cost["params/total"], cost["flops/per_token"] / 1e6, memory["mem/predicted_peak_bytes"] / 2**20

    def line(config, note=""):
        cells = [
            f"{value:15,.{digits}f}{value / whole:6.2f}"
            for value, whole, digits in zip(costs(config), of_full, (0, 1, 0))
        ]
        ranks = f"{ranks_in_short(config.attn_ranks):>16}{ranks_in_short(config.mlp_ranks):>16}"
        own = f"  ({named_in_short(config)})" if config.matrix_ranks else ""
        print0(f"{config.n_layer:5}{config.n_embd:7}{ranks}{''.join(cells)}{own}{note}")

    full = model_config(Namespace(**{**vars(args), **RANK_GROUP.defaults()}), vocab_size)
    configs = budget_frontier(args, vocab_size)
    of_full = costs(full)
    budget = parameter_budget(args)
    print0(
        f"the largest ranks within {budget:,} parameters at each depth; beside each figure its ratio to the full-rank model:"
    )
    print0(
        f"{'depth':>5}{'width':>7}{'attention rank':>16}{'MLP rank':>16}{'parameters':>15}{'':6}{'MFLOP/token':>15}{'':6}{'peak MiB':>15}"
    )
    line(full)
    for config in configs:
        fits = count_parameters(full_rank(config)) <= budget
        line(config, "  full rank fits too" if fits else "")
    if configs[-1].n_layer == 4 * args.depth:
        print0(f"deeper models may fit too: shown up to 4 × --depth {args.depth}")


def training_plan(args, config: GPTConfig, world_size: int) -> dict:
    """Tokens a step, steps, gradient accumulation, matrix learning rate. InputError where they do not divide."""
    plan = batch_and_horizon(args, on_meta(config), world_size)
    check_schedule(args, plan["num_iterations"])
    return plan | {
        "matrix_lr": args.matrix_lr if args.matrix_lr >= 0 else default_matrix_lr(plan["num_iterations"])
    }


def batch_and_horizon(args, model: GPT, world_size: int, shape: GPTConfig | None = None) -> dict:
    """Tokens a step, steps, gradient accumulation. shape: of the model, if that is not its config.

    What is not given follows from the full-rank model of the shape (--horizon-from), so that runs of other
    ranks take the same batch and steps. FLOPs that are given are the model's own: then the steps differ.
    """
    sized = model if args.horizon_from == "own" else on_meta(full_rank(shape or model.config))
    cost = account(model)["flops/per_token"]
    counted = matrix_parameters(sized)
    micro = args.device_batch_size * args.max_seq_len * world_size  # tokens in one pass of all processes
    total = args.total_batch_size
    if total < 1:
        # the critical batch grows as tokens^0.383 (Power Lines, arXiv 2505.13738), through 2^19 at 1.3e9 tokens
        horizon = max(1, args.target_param_data_ratio) * counted
        total = 2 ** round(math.log2(2**19 * (horizon / 1.3e9) ** 0.383))
        total = micro * max(1, round(total / micro))
    rows = device_batch(args, total, world_size)
    if args.num_iterations > 0:
        steps = args.num_iterations
    elif args.target_flops > 0:
        steps = max(1, round(args.target_flops / (cost * total)))
    elif args.target_param_data_ratio > 0:
        steps = max(1, round(args.target_param_data_ratio * counted / total))
    else:
        raise InputError(
            "--num-iterations, --target-flops, --target-param-data-ratio: give one of them above 0"
        )
    micro_steps = total // (rows * args.max_seq_len * world_size)
    return {
        "num_iterations": steps,
        "total_batch_size": total,
        "grad_accum_steps": micro_steps,
        "device_batch_size": rows,
        "tokens": steps * total,
    }


def device_batch(args, total: int, world_size: int) -> int:
    """Rows of one process in one pass. --device-batch-size says how many its memory allows; of these, as many
    as divide its rows of a step.

    InputError where the tokens of a step are no whole number of rows for each process.
    """
    smallest = args.max_seq_len * world_size  # tokens of one row in each process
    if total % smallest:
        near = [n for n in (total // smallest * smallest, (total // smallest + 1) * smallest) if n]
        raise InputError(
            f"--total-batch-size {total}: not a multiple of --max-seq-len {args.max_seq_len} × "
            f"{world_size} process(es) = {smallest}; nearest: {' or '.join(map(str, near))}"
        )
    rows = total // smallest
    return next(n for n in range(min(args.device_batch_size, rows), 0, -1) if rows % n == 0)


def take_device_batch(args, plan: dict, world_size: int):
    """Go on with the plan's device batch; said where it is less than was given."""
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


def horizon_words(args) -> str:
    """Where the batch and the steps come from, as far as they are not given; '' if both are."""
    of_model = "the full-rank model of this shape" if args.horizon_from == "full" else "this model"
    by_flops = args.num_iterations < 1 and args.target_flops > 0
    derived = [] if args.num_iterations > 0 or by_flops else ["steps"]
    derived += ["tokens a step"] if args.total_batch_size < 1 else []
    words = [f"steps from --target-flops {args.target_flops:g} at this model's FLOPs"] if by_flops else []
    if derived:
        ratio = f"{args.target_param_data_ratio:g} tokens a matrix parameter of {of_model}"
        words.append(f"{' and '.join(derived)} from {ratio} (--horizon-from {args.horizon_from})")
    return ", ".join(words)


def print_plan(config: GPTConfig, plan: dict, accounting: dict, args):
    """What --dry-run shows."""
    print0(
        f"model: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads ({config.n_kv_head} key/value), MLP {config.n_hidden}, "
        f"vocabulary {config.vocab_size}, context {config.sequence_len}, windows {[config.window(i) for i in config.positions]}"
    )
    if config.layer_map:
        print0(f"layer at each of {len(config.layer_map)} positions: {', '.join(map(str, config.layer_map))}")
    for line in rank_lines(config):
        print0(line)
    rate = f"matrix lr {plan['matrix_lr']:.4g}" if "matrix_lr" in plan else f"lr {plan['lr']:.4g}"
    print0(
        f"training: {plan['num_iterations']:,} steps × {plan['total_batch_size']:,} tokens = {plan['tokens']:,} tokens, "
        f"{plan['grad_accum_steps']} micro-step(s), {rate}, {plan['tokens'] * accounting['flops/per_token']:.3g} FLOPs"
    )
    if words := horizon_words(args):
        print0(f"horizon: {words}")
    if within := plan.get("subspace"):
        flags = {
            "subspace": within["kind"],
            **{f"subspace_{key}": within[key] for key in ("dim", "scope", "rank", "scales")},
            **within,
        }
        print0(f"subspace: {with_size(flags)}")
    if accounting["params/trained"] < accounting["params/total"]:
        print0(
            f"trained: {accounting['params/trained']:,} of its numbers"
            + (", the rest follows from them and a seed" if within else "")
        )
    for key, value in accounting.items():
        share = (
            f"{value / accounting['params/total']:8.1%}"
            if key.startswith("params/") and key != "params/stored_bits"
            else ""
        )
        unit = f"{value / 2**20:10,.1f} MiB" if key.startswith("mem/") else ""
        print0(f"  {key:26}{value:>18,}{share}{unit}")
