"""The flags of the training scripts, in groups, and how their values are read. What they mean together is nanochat/plan.py's."""

from argparse import ArgumentTypeError

from nanochat.common import (
    LARGEST_INTEGER,
    ArgumentParser,
    as_whole_number,
    device_flags,
    number,
    quoted,
    shortened,
    whole_number,
)
from nanochat.gpt import MATRICES
from nanochat.layer_maps import FORM, well_formed
from nanochat.naming import optional_tag, run_name
from nanochat.rank import SCHEDULES
from nanochat.subspace.model import KINDS, SCOPES
from nanochat.whole_ranks import AUTOMATIC, matrix_ranks_text

# what no model reaches: beyond it even counting takes minutes, and sizes overflow
DEEPEST = 4096  # layers
WIDEST = 2**20  # width, and that of a head
LONGEST = 2**31 - 1  # tokens of a context or a vocabulary, rows of a batch

# The record of a run lacks the flags that came later. Here is, for each of them, the value that makes the
# program of then: with it such a run goes on, and is reported. Add a line for each new flag of base_train or
# adapter_train, unless the flag is in metrics.FREE. The value may differ from today's default.
DEFAULTS_BEFORE = {
    "matrix_ranks": "",
    "factor_act": "none",
    "layer_map": "",
    "init_from": None,
    "subspace": "",
    "subspace_dim": 0,
    "subspace_scope": "",
    "subspace_rank": 0,
    "subspace_scales": False,
    "subspace_lr": 0.03,
    "freeze_embeddings": False,
    "mlp_ratio": 4.0,
    "rank_multiple": 1,
    "horizon_from": "own",
    "attn_rank_schedule": "",
    "attn_rank_end": 0,
    "mlp_rank_schedule": "",
    "mlp_rank_end": 0,
}

# ---- values ---------------------------------------------------------------------------------------------------------


def rank_flag(text: str) -> float:
    value: float | None = as_whole_number(text)
    if value is None:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not 0 < value < 1:
            value = -1
    if not 0 <= value <= LARGEST_INTEGER:
        raise ArgumentTypeError(
            f"{quoted(text)}: give 0 (full rank), a whole number, or a fraction between 0 and 1"
        )
    return value


def matrix_ranks(text: str) -> dict[str, tuple[float, ...]]:
    """'v=128,down=0.5/0' -> {'v': (128,), 'down': (0.5, 0)}: one rank for all layers, or one a layer."""
    pairs = [part.strip().partition("=")[::2] for part in text.split(",") if part.strip()]
    names = [name.strip() for name, _ in pairs]
    if unknown := sorted(set(names) - set(MATRICES)):
        raise ArgumentTypeError(
            f"{quoted(text)}: no matrix is called {shortened(', '.join(unknown))}; "
            f"write e.g. v=128,down=0.5, of {', '.join(MATRICES)}; "
            "one rank a layer as v=64/64/128"
        )
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ArgumentTypeError(
            f"{quoted(text)}: gives {twice[0]} more than once; "
            f"one rank a layer is written {twice[0]}=64/64/128"
        )
    return {name: tuple(map(rank_flag, ranks.split("/"))) for name, (_, ranks) in zip(names, pairs)}


def matrix_ranks_flag(text: str) -> str:
    return matrix_ranks_text(matrix_ranks(text))


def rank_multiple_flag(text: str) -> int:
    value = whole_number(-1)(text)
    if value == 0:
        raise ArgumentTypeError(
            f"{text!r}: give -1 (automatic), 1 (fractions as given), "
            "or what their ranks are to be multiples of, such as 64"
        )
    return value


def layer_map_flag(text: str) -> str:
    if text.count(",") >= DEEPEST:
        raise ArgumentTypeError(f"{quoted(text)}: more than {DEEPEST:,} positions")
    if text and not well_formed(text):
        raise ArgumentTypeError(f"{quoted(text)}: {FORM}")
    return text


def positive_floats(text: str) -> list[float]:
    try:
        return [number(above=0)(part) for part in text.split(",") if part.strip()]
    except ArgumentTypeError:
        raise ArgumentTypeError(
            f"{quoted(text)} is not a list of positive numbers such as 100,50,30"
        ) from None


# ---- flags, in groups -----------------------------------------------------------------------------------------------
# add: ArgumentParser.add_argument


def add_machine_flags(add):
    """Where and how a run computes, and what it is called on the dashboard."""
    add(
        "--run",
        type=run_name,
        default="dummy",
        help="wandb run name; 'dummy' turns wandb off, the local record is always written",
    )
    device_flags(
        add,
        "compute dtype; master weights are float32; auto = bfloat16 on a GPU, and on a CPU that has instructions for it",
    )
    add(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="auto = on for cuda; on a cpu from 4e13 training FLOPs on",
    )
    add(
        "--recompute",
        choices=["none", "bottleneck"],
        default="none",
        help="bottleneck: keep of a factored layer what is as wide as its rank, and compute the rest again for the backward pass",
    )


def add_shape_flags(add):
    """The model but for its ranks."""
    add("--depth", type=whole_number(1, DEEPEST), default=20, help="layers")
    add(
        "--aspect-ratio",
        type=whole_number(1, WIDEST),
        default=64,
        help="width = depth × this, rounded up to a multiple of --head-dim",
    )
    add(
        "--model-dim",
        type=whole_number(1, WIDEST, off=-1),
        default=-1,
        help="width, overriding depth × aspect-ratio",
    )
    add("--head-dim", type=whole_number(1, WIDEST), default=128)
    add(
        "--n-kv-head",
        type=whole_number(1, off=-1),
        default=-1,
        help="key/value heads, a divisor of the heads; -1 = as many as heads",
    )
    add("--mlp-ratio", type=number(above=0), default=4.0, help="hidden width of the MLP / width")
    add("--max-seq-len", type=whole_number(2, LONGEST), default=2048)
    add(
        "--window-pattern",
        default="SSSL",
        help="attention per layer, tiled: L = whole context, S = half; the last layer is L",
    )
    add("--tie-embeddings", action="store_true", help="the output head is the token embedding")
    add(
        "--value-embeddings",
        action="store_true",
        help="a table of values in every other layer (adds vocabulary × width parameters each)",
    )
    add(
        "--layer-map",
        type=layer_map_flag,
        default="",
        help="the layer that each position of the stack executes, weights tied: 0,0,1,2,2; mobilellm = "
        "each layer twice in a row; solar = all but the last quarter, then all but the first; '' = each once",
    )


def add_rank_multiple(add):
    add(
        "--rank-multiple",
        type=rank_multiple_flag,
        default=AUTOMATIC,
        help="ranks given as fractions become multiples of this; -1 = of 8 in matrices of at least 256 rows "
        "and columns, of 64 from 1024 on (ranks that --solve finds: of 8); 1 = as given",
    )


def add_rank_flags(add):
    """Ranks, and the budget that chooses them."""
    add(
        "--attn-rank",
        type=rank_flag,
        default=0,
        help="0 = full; N = that rank; a fraction of min(in, out) of each matrix",
    )
    add("--mlp-rank", type=rank_flag, default=0)
    add("--lm-head-rank", type=rank_flag, default=0)
    add(
        "--matrix-ranks",
        type=matrix_ranks_flag,
        default="",
        help="of single matrices, whatever their group's: e.g. v=128,down=0.5 (of q, k, v, o, up, down), "
        "or one rank a layer: v=64/64/128; 0 = full",
    )
    add_rank_multiple(add)
    add(
        "--factor-act",
        choices=["none", "silu"],
        default="none",
        help="between the factors in the blocks; silu: B silu(A x), which merges into no matrix",
    )
    add(
        "--rank-schedule",
        default="constant",
        help=f"of attention and MLP: {', '.join(SCHEDULES)}, or one rank a layer in place of --attn-rank and "
        "--mlp-rank: r0,r1,…",
    )
    add(
        "--rank-end",
        type=rank_flag,
        default=0,
        help="rank of the last layer (quadratic: of the first and last)",
    )
    for group, words in (("attn", "attention"), ("mlp", "the MLP")):
        add(f"--{group}-rank-schedule", default="", help=f"of {words} alone; '' = --rank-schedule")
        add(f"--{group}-rank-end", type=rank_flag, default=0, help=f"of {words} alone; 0 = --rank-end")
    add(
        "--budget-params",
        default="",
        help="total parameters to come near from below: a number, or the tag of a run to match",
    )
    add(
        "--solve",
        choices=["depth", "rank"],
        default=None,
        help="what --budget-params may choose; ranks keep their ratios, and 0 in --matrix-ranks stays full",
    )
    add(
        "--plan",
        action="store_true",
        help="print the largest rank at each depth under --budget-params, up to 4 × --depth, and exit",
    )


def add_subspace_flags(add):
    """Matrices made of a few trained numbers and a seed."""
    add(
        "--subspace",
        choices=["", *KINDS],
        default="",
        help="how the matrices in the blocks follow from a few trained numbers and --seed; none = they stay as "
        "drawn, which leaves embeddings and head to train; '' = they are trained themselves",
    )
    add(
        "--subspace-dim",
        type=whole_number(1),
        default=0,
        help="trained numbers of basis, fastfood and fft-fastfood, in each part of the scope",
    )
    add(
        "--subspace-scope",
        choices=["", *SCOPES],
        default="",
        help="what shares them: all matrices, those of a layer, or each has its own; '' = global",
    )
    add(
        "--subspace-rank",
        type=whole_number(1),
        default=0,
        help="of the trained factors that lora-random adds to frozen noise",
    )
    add(
        "--subspace-scales",
        action="store_true",
        help="one more trained number for each matrix: its share of fastfood or fft-fastfood",
    )
    add(
        "--subspace-lr",
        type=number(0),
        default=0.03,
        help="of these numbers, divided by the root of their dimension or rank",
    )
    add("--freeze-embeddings", action="store_true", help="in a subspace: tables and head stay as drawn too")


def add_horizon_flags(add):
    """The batch, and how long to train: of the horizons the first that is given counts."""
    add("--num-iterations", type=whole_number(1, off=-1), default=-1, help="optimization steps")
    add(
        "--target-flops",
        type=number(above=0, off=-1),
        default=-1,
        help="total training FLOPs, always of this model itself",
    )
    add(
        "--target-param-data-ratio",
        type=number(above=0, high=1e9, off=-1),
        default=12,
        help="tokens per parameter of the matrices, head included",
    )
    add(
        "--horizon-from",
        choices=["full", "own"],
        default="full",
        help="whose parameters the steps and the batch follow from where they are not given: those of the "
        "full-rank model of the same shape, so that runs of other ranks take the same; or the model's own",
    )
    add(
        "--device-batch-size",
        type=whole_number(1, LONGEST),
        default=32,
        help="the most rows in one forward pass of one process: what its memory allows",
    )
    add(
        "--total-batch-size",
        type=whole_number(1, off=-1),
        default=-1,
        help="tokens in one step; -1 = from the training tokens",
    )


def add_rate_flags(add):
    """Learning rates of everything that is trained from scratch."""
    add("--embedding-lr", type=number(0), default=0.3, help="of the embedding tables")
    add(
        "--unembedding-lr",
        type=number(0),
        default=0.004,
        help="of the head at width 768; scaled by 768 / width",
    )
    add(
        "--matrix-lr",
        type=number(0, off=-1),
        default=-1,
        help="of Muon for the matrices in the blocks; -1 = from the number of steps",
    )
    add("--scalar-lr", type=number(0), default=0.1, help="of the per-layer and per-channel scalars")
    add("--weight-decay", type=number(0), default=0.0, help="of the matrices in the blocks")


def add_schedule_flags(add):
    """What the learning rates do over the steps."""
    add(
        "--grad-clip",
        type=number(above=0, off=-1),
        default=-1,
        help="largest norm of the gradient; -1 = no clipping",
    )
    add("--warmup-steps", type=whole_number(0), default=0)
    add(
        "--warmdown-ratio",
        type=number(0, 1),
        default=0.5,
        help="share of the steps over which the learning rates fall linearly",
    )
    add("--final-lr-frac", type=number(0, 1), default=0.0, help="where they end, as a fraction")


def add_evaluation_flags(add):
    """What is measured on the way."""
    add(
        "--eval-every",
        type=whole_number(1, off=-1),
        default=250,
        help="steps between evaluations; -1 = only at the end",
    )
    add(
        "--eval-tokens",
        type=whole_number(1),
        default=2**19,
        help="validation tokens, taken from the start of the validation text",
    )
    add("--ppl-thresholds", type=positive_floats, default=[100.0, 50.0, 30.0], help="perplexities to time")
    add(
        "--stop-at-ppl",
        type=number(1, off=-1),
        default=-1,
        help="stop at the first evaluation at or below this perplexity",
    )
    add(
        "--sample-every",
        type=whole_number(1, off=-1),
        default=2000,
        help="steps between text samples (and at the end); -1 = none",
    )


def add_checkpoint_flags(add):
    """What is saved, and gone on from."""
    add(
        "--save-every",
        type=whole_number(1, off=-1),
        default=-1,
        help="steps between checkpoints; -1 = only at the end",
    )
    add("--keep", type=whole_number(1, off=-1), default=2, help="newest checkpoints to keep; -1 = all")
    add(
        "--max-bad-steps",
        type=whole_number(0),
        default=5,
        help="steps in a row whose loss or gradient may be not finite (they are not applied) before the run stops",
    )
    add(
        "--resume",
        "--resume-from-step",
        default="-1",
        help="auto = from the newest intact checkpoint, or start; N = from that step",
    )


def add_verify(add):
    add(
        "--verify",
        action="store_true",
        help="before training read the token caches whole, and build those again that differ from their sums",
    )


def add_core_flags(add):
    """The CORE metric on the way."""
    add(
        "--core-metric-every",
        type=whole_number(1, off=-1),
        default=-1,
        help="steps between measurements of CORE (and at the end); -1 = none",
    )
    add(
        "--core-metric-max-per-task",
        type=whole_number(1, off=-1),
        default=500,
        help="examples asked in each task of CORE; -1 = all",
    )
    add("--core-dir", default="", help="folder of the evaluation bundle; '' = downloaded once")


def group_defaults(add_flags) -> dict:
    """{name: default} of the flags that one of the functions above adds."""
    parser = ArgumentParser("")
    add_flags(parser.add_argument)
    return vars(parser.parse_args([]))


def build_parser():
    """The flags of scripts.base_train."""
    parser = ArgumentParser("Pretrain a GPT, full rank or low rank.")
    add = parser.add_argument
    add(
        "--model-tag", type=optional_tag, default="", help="name of the run folder ('' = made from the shape)"
    )
    add_machine_flags(add)
    add("--seed", type=whole_number(0), default=42, help="model initialisation and data order")
    add(
        "--data",
        default="stdlib",
        help="stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder of parquet / jsonl / txt files",
    )
    add(
        "--tokenizer-tag",
        type=optional_tag,
        default="",
        help="name of the tokenizer, as scripts.tok_train was given it; '' = the one without a name",
    )
    add(
        "--vocab-size",
        type=whole_number(1, LONGEST, off=-1),
        default=-1,
        help="-1 = the tokenizer's; otherwise it must match (with --dry-run none is needed)",
    )
    add(
        "--init-from",
        default=None,
        metavar="TAG[:STEP]",
        help="begin with the weights of that run's checkpoint (the newest if no step is given) and a fresh optimizer; the shape is then its own: no flag of "
        "shape or rank may be given beside it. The checkpoint has to stay until this run is finished",
    )
    add_shape_flags(add)  # these two groups are answered by --init-from
    add_rank_flags(add)
    add_subspace_flags(add)
    add_horizon_flags(add)
    add_rate_flags(add)
    add_schedule_flags(add)
    add_evaluation_flags(add)
    add_core_flags(add)
    add_checkpoint_flags(add)
    add_verify(add)
    add("--dry-run", action="store_true", help="print the resolved configuration and what it costs, and exit")
    return parser
