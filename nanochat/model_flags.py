"""The flags that describe the model: its shape, its ranks, and the subspace in which it may be trained."""

from nanochat.arguments import real_number, whole_number
from nanochat.flag_types import (
    DEEPEST,
    LONGEST,
    SCHEDULES,
    WIDEST,
    Flag,
    FlagGroup,
    Role,
    layer_map_flag,
    matrix_ranks_flag,
    rank_flag,
    rank_multiple_flag,
)
from nanochat.rank import AUTOMATIC

SUBSPACE_KINDS = ("none", "basis", "fastfood", "fft-fastfood", "lora-random")
SUBSPACE_SCOPES = ("global", "layer", "matrix")

SHAPE_GROUP = FlagGroup(
    "Model shape",
    "Layers and widths. The ranks are in a group of their own.",
    (
        Flag(
            "--depth",
            "number of layers",
            default=20,
            type=whole_number(1, DEEPEST),
            role=Role.SHAPE,
            short="d",
        ),
        Flag(
            "--aspect-ratio",
            "width of the model per layer: width = --depth × this, rounded up to a multiple of --head-dim",
            default=64,
            type=whole_number(1, WIDEST),
            role=Role.REQUEST,
        ),
        Flag(
            "--model-dim",
            "width of the model, a multiple of --head-dim; -1 = from --aspect-ratio",
            default=-1,
            type=whole_number(1, WIDEST, off=-1),
            role=Role.SHAPE,
            short="w",
        ),
        Flag(
            "--head-dim",
            "width of one attention head, an even number; the model has width / this heads",
            default=128,
            type=whole_number(1, WIDEST),
            role=Role.SHAPE,
        ),
        Flag(
            "--n-kv-head",
            "number of key/value heads, each shared by a group of query heads; it must divide the number of "
            "heads. -1 = as many as heads",
            default=-1,
            type=whole_number(1, off=-1),
            role=Role.SHAPE,
        ),
        Flag(
            "--mlp-ratio",
            "width of the MLP's hidden layer / width of the model",
            default=4.0,
            type=real_number(above=0),
            role=Role.SHAPE,
            old_default=4.0,
            short="ratio",
        ),
        Flag(
            "--max-seq-len",
            "context: tokens in one training sequence",
            default=2048,
            type=whole_number(2, LONGEST),
            role=Role.CONTEXT,
            short="t",
        ),
        Flag(
            "--window-pattern",
            "how far attention looks back, one letter a layer, repeated over the layers: L = the whole "
            "context, S = half of it. The last layer is always L",
            default="SSSL",
            role=Role.FAMILY,
        ),
        Flag(
            "--tie-embeddings",
            "the output head is the token embedding, not a matrix of its own",
            default=False,
            role=Role.FAMILY,
        ),
        Flag(
            "--value-embeddings",
            "add a table of learned values to attention in every other layer; each table has vocabulary × "
            "width parameters",
            default=False,
            role=Role.FAMILY,
        ),
        Flag(
            "--layer-map",
            "which layer runs at each position, so that positions share weights: 0,0,1,2,2; or mobilellm = "
            "each layer twice in a row; or solar = all but the last quarter of the layers, then all but the "
            "first quarter. '' = each layer once",
            type=layer_map_flag,
            role=Role.SHAPE,
            old_default="",
            short="map",
        ),
    ),
)

RANK_MULTIPLE = Flag(
    "--rank-multiple",
    "a rank given as a fraction becomes a multiple of this. -1 = of 64 in matrices of at least 1024 rows and "
    "columns, of 8 from 256 on (of 8 in both where --solve chooses the ranks), else as given; 1 = as given",
    default=AUTOMATIC,
    type=rank_multiple_flag,
    role=Role.RANK,
    old_default=1,
    short="multiple",
)

RANK_GROUP = FlagGroup(
    "Ranks",
    "A rank is 0 (full rank), a whole number, or a fraction below 1 of the matrix's smaller side.",
    (
        Flag(
            "--attn-rank",
            "rank of the attention matrices q, k, v and o in every layer",
            default=0,
            type=rank_flag,
            role=Role.GROUP_RANK,
            short="attn",
        ),
        Flag(
            "--mlp-rank",
            "rank of the MLP matrices up and down in every layer",
            default=0,
            type=rank_flag,
            role=Role.GROUP_RANK,
            short="mlp",
        ),
        Flag(
            "--lm-head-rank",
            "rank of the output head",
            default=0,
            type=rank_flag,
            role=Role.GROUP_RANK,
            short="head",
        ),
        Flag(
            "--matrix-ranks",
            "ranks of single matrices (q, k, v, o, up, down), in place of --attn-rank and --mlp-rank: "
            "v=128,down=0.5, or one rank a layer: v=64/64/128. '' = no matrix has a rank of its own",
            type=matrix_ranks_flag,
            role=Role.RANK,
            old_default="",
        ),
        RANK_MULTIPLE,
        Flag(
            "--factor-act",
            "function between the two factors of the blocks' matrices; silu: y = B silu(A x). Such a pair of "
            "factors cannot be merged into one matrix",
            default="none",
            choices=("none", "silu"),
            role=Role.RANK,
            old_default="none",
        ),
        Flag(
            "--rank-schedule",
            "how the ranks of attention and MLP change from the first to the last layer: "
            f"{', '.join(SCHEDULES)}; or a list r0,r1,… with one rank a layer, in place of --attn-rank and "
            "--mlp-rank",
            default="constant",
            role=Role.RANK,
            short="",
        ),
        Flag(
            "--rank-end",
            "rank of the last layer under --rank-schedule (quadratic: of the first and the last layer); "
            "0 = not set",
            default=0,
            type=rank_flag,
            role=Role.REQUEST,
            short="end",
        ),
        Flag(
            "--attn-rank-schedule",
            "--rank-schedule for attention alone; '' = as --rank-schedule says",
            role=Role.RANK,
            old_default="",
            short="attn-",
        ),
        Flag(
            "--attn-rank-end",
            "--rank-end for attention alone; 0 = as --rank-end says",
            default=0,
            type=rank_flag,
            role=Role.REQUEST,
            old_default=0,
            short="attn-end",
        ),
        Flag(
            "--mlp-rank-schedule",
            "--rank-schedule for the MLP alone; '' = as --rank-schedule says",
            role=Role.RANK,
            old_default="",
            short="mlp-",
        ),
        Flag(
            "--mlp-rank-end",
            "--rank-end for the MLP alone; 0 = as --rank-end says",
            default=0,
            type=rank_flag,
            role=Role.REQUEST,
            old_default=0,
            short="mlp-end",
        ),
        Flag(
            "--budget-params",
            "largest number of parameters that --solve or --plan may use: a number such as 10_000_000, or "
            "the tag of a run whose number is taken. '' = no budget",
            role=Role.REQUEST,
            short="budget",
        ),
        Flag(
            "--solve",
            "what to enlarge until --budget-params is used up. rank: all ranks by one factor (0 in "
            "--matrix-ranks stays full); depth: the number of layers",
            default=None,
            choices=("depth", "rank"),
            role=Role.REQUEST,
        ),
        Flag(
            "--plan",
            "print the largest ranks within --budget-params for each depth up to 4 × --depth, and exit",
            default=False,
            role=Role.NEUTRAL,
            free=True,
        ),
    ),
)

SUBSPACE_GROUP = FlagGroup(
    "Subspace",
    "Matrices that are not trained themselves: they are made of a few trained numbers and of --seed.",
    (
        Flag(
            "--subspace",
            "how the matrices are made. none = they stay as --seed drew them, and only the embeddings and "
            "the head are trained; '' = no subspace",
            choices=("", *SUBSPACE_KINDS),
            role=Role.METHOD,
            old_default="",
        ),
        Flag(
            "--subspace-dim",
            "how many numbers are trained for each part of --subspace-scope (basis, fastfood, fft-fastfood); "
            "0 stands for not given",
            default=0,
            type=whole_number(1),
            role=Role.METHOD,
            old_default=0,
            short="dim",
        ),
        Flag(
            "--subspace-scope",
            "which matrices share these numbers: all (global), those of one layer (layer), or none (matrix). "
            "'' = global",
            choices=("", *SUBSPACE_SCOPES),
            role=Role.METHOD,
            old_default="",
            short="",
        ),
        Flag(
            "--subspace-rank",
            "rank of the trained factors that lora-random adds to frozen random matrices; "
            "0 stands for not given",
            default=0,
            type=whole_number(1),
            role=Role.METHOD,
            old_default=0,
            short="rank",
        ),
        Flag(
            "--subspace-scales",
            "train one more number for each matrix: how much of fastfood or fft-fastfood it takes",
            default=False,
            role=Role.METHOD,
            old_default=False,
        ),
        Flag(
            "--subspace-lr",
            "learning rate of the numbers (AdamW); it is divided by the square root of --subspace-dim or "
            "--subspace-rank",
            default=0.03,
            type=real_number(0),
            role=Role.RATE,
            old_default=0.03,
        ),
        Flag(
            "--freeze-embeddings",
            "the embeddings and the head stay as --seed drew them, too",
            default=False,
            role=Role.METHOD,
            old_default=False,
        ),
    ),
)
