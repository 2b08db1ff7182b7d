"""The flags that describe a training: names and machine, text, length, learning rates, evaluation, saving."""

from nanochat.arguments import real_number, whole_number
from nanochat.flag_types import LONGEST, Flag, FlagGroup, Role, positive_floats
from nanochat.naming import optional_tag, run_name, tag

# ---- where a run goes, where it computes, what it begins with ----------------------------------------------

MODEL_TAG = Flag(
    "--model-tag",
    "name of the run folder; '' = a name made from the shape and the ranks, such as d4_w256",
    type=optional_tag,
    role=Role.NAME,
)
RUN_TAG = Flag(
    "--run-tag", "name of the new run folder", default=None, type=tag, required=True, role=Role.NAME
)
WANDB_RUN = Flag(
    "--run",
    "name of the run on W&B; 'dummy' = W&B is off. The record in the run folder is always written",
    default="dummy",
    type=run_name,
    role=Role.NEUTRAL,
    free=True,
)

RUN_GROUP = FlagGroup("Run", "Names of the run.", (MODEL_TAG, WANDB_RUN))

MACHINE_GROUP = FlagGroup(
    "Machine",
    "Where and how the run computes.",
    (
        Flag(
            "--device-type",
            "'' = cuda if the machine has a GPU, else cpu",
            choices=("", "cuda", "cpu"),
            role=Role.REQUEST,
        ),
        Flag(
            "--dtype",
            "number format of activations and matrix products; the trained weights are always float32. "
            "auto = bfloat16 on a GPU and on a CPU that has instructions for it, else float32",
            default="auto",
            choices=("auto", "float32", "bfloat16"),
            role=Role.REQUEST,
        ),
        Flag(
            "--compile",
            "compile the model's blocks before training. auto = on for a GPU, and for a CPU if the training "
            "takes 4e13 FLOPs or more",
            default="auto",
            choices=("auto", "on", "off"),
            role=Role.COST,
            free=True,
        ),
        Flag(
            "--attn-kernel",
            "kernel of attention on a GPU, for the layers that it can serve (dev/SCALE.md says which); the "
            "others take that of auto. auto = by published figures the fastest that the GPU and torch have",
            default="auto",
            choices=("auto", "mask", "flash", "cudnn", "flex", "varlen"),
            role=Role.COST,
            free=True,
        ),
        Flag(
            "--recompute",
            "save memory: compute activations again in the backward pass. none = keep them all; "
            "bottleneck = of each block with low-rank matrices keep its input and what is r wide; "
            "block = of every block keep only its input",
            default="none",
            choices=("none", "bottleneck", "block"),
            role=Role.COST,
            free=True,
        ),
        Flag(
            "--mlp-kernel",
            "what computes low-rank MLPs on a GPU. library = a product at a time; fused = kernels that never "
            "keep the hidden layer, for ranks that are multiples of 16 up to 512; auto = library",
            default="auto",
            choices=("auto", "library", "fused"),
            role=Role.COST,
            free=True,
        ),
        Flag(
            "--activation-budget",
            "save memory in compiled blocks: the share of their activations that is kept. The backward pass "
            "computes the rest again, what is cheap first: at 0.7 (without --fp8) no matrix product. 1 = all "
            "are kept",
            default=1.0,
            type=real_number(above=0, high=1),
            role=Role.COST,
            free=True,
        ),
    ),
)

FLOAT8_GROUP = FlagGroup(
    "Float8",
    "Products of 8-bit numbers, for new GPUs.",
    (
        Flag(
            "--fp8",
            "in training, multiply by the matrices of the blocks in float8; for NVIDIA GPUs such as L4, "
            "RTX 4090, H100 and newer. A matrix with a side or a rank below 128, or no multiple of 16, stays "
            "as it is",
            default=False,
            role=Role.CONTEXT,
            old_default=False,
        ),
    ),
)

START_GROUP = FlagGroup(
    "Text and start",
    "What the model reads, and the weights it begins with.",
    (
        Flag(
            "--seed",
            "seed of the first weights and of the order of the text",
            default=42,
            type=whole_number(0),
            role=Role.NEUTRAL,
        ),
        Flag(
            "--data",
            "text to train on: stdlib, tinystories, climbmix, fineweb-edu, c4, or a folder of parquet, jsonl "
            "or txt files",
            default="stdlib",
            role=Role.PLACE,
        ),
        Flag(
            "--tokenizer-tag",
            "name of the tokenizer, the --tokenizer-tag of scripts.tok_train; '' = the one without a name",
            type=optional_tag,
            role=Role.PLACE,
        ),
        Flag(
            "--vocab-size",
            "tokens of the vocabulary; -1 = those of the tokenizer. Another number is an error, but with "
            "--dry-run or --plan no tokenizer is needed",
            default=-1,
            type=whole_number(1, LONGEST, off=-1),
            role=Role.OTHER,
        ),
        Flag(
            "--init-from",
            "begin with the weights of this run's checkpoint (the newest if no step is given) and a new "
            "optimizer. Shape and ranks are the checkpoint's, so no flag of them may be given. Keep the "
            "checkpoint until this run is finished",
            default=None,
            metavar="TAG[:STEP]",
            role=Role.CONTEXT,
            old_default=None,
        ),
    ),
)


# ---- training ----------------------------------------------------------------------------------------------

LENGTH_GROUP = FlagGroup(
    "Batch and length",
    "How much text a step reads, and how many steps there are. The number of steps comes from the first of "
    "--num-iterations, --target-flops and --target-param-data-ratio that is above 0.",
    (
        Flag(
            "--num-iterations",
            "number of optimizer steps; -1 = from the next two flags",
            default=-1,
            type=whole_number(1, off=-1),
            role=Role.CONTEXT,
            short="steps",
        ),
        Flag(
            "--target-flops",
            "FLOPs of the whole training, forward and backward, of this model itself; -1 = not set",
            default=-1,
            type=real_number(above=0, off=-1),
            role=Role.REQUEST,
        ),
        Flag(
            "--target-param-data-ratio",
            "training tokens for each parameter of the matrices, head included (embedding tables do not "
            "count); -1 = not set",
            default=12,
            type=real_number(above=0, high=1e9, off=-1),
            role=Role.REQUEST,
        ),
        Flag(
            "--horizon-from",
            "whose parameters set the steps and the batch, where they are not given. full = those of the "
            "full-rank model of this shape, so that runs of all ranks train alike; own = this model's",
            default="full",
            choices=("full", "own"),
            role=Role.REQUEST,
            old_default="own",
            short="horizon-",
        ),
        Flag(
            "--device-batch-size",
            "most sequences that one process computes at a time: as many as its memory holds. It does not "
            "change what a step learns",
            default=32,
            type=whole_number(1, LONGEST),
            role=Role.COST,
            free=True,
        ),
        Flag(
            "--total-batch-size",
            "tokens in one step, over all processes; -1 = chosen from the number of training tokens",
            default=-1,
            type=whole_number(1, off=-1),
            role=Role.CONTEXT,
            short="batch",
        ),
    ),
)

RATE_GROUP = FlagGroup(
    "Learning rates",
    "Their highest values; the next group says how they change over the steps.",
    (
        Flag(
            "--embedding-lr",
            "learning rate of the embedding tables (AdamW)",
            default=0.3,
            type=real_number(0),
            role=Role.RATE,
        ),
        Flag(
            "--unembedding-lr",
            "learning rate of the output head (AdamW) at width 768; it is multiplied by 768 / width",
            default=0.004,
            type=real_number(0),
            role=Role.RATE,
        ),
        Flag(
            "--matrix-lr",
            "learning rate of the matrices in the blocks (Muon); -1 = chosen from the number of steps",
            default=-1,
            type=real_number(0, off=-1),
            role=Role.RATE,
            short="lr",
        ),
        Flag(
            "--scalar-lr",
            "learning rate of the single numbers per layer or per channel (AdamW)",
            default=0.1,
            type=real_number(0),
            role=Role.RATE,
        ),
        Flag(
            "--weight-decay",
            "weight decay of the matrices in the blocks; 0 = none",
            default=0.0,
            type=real_number(0),
            role=Role.RATE,
        ),
    ),
)

SCHEDULE_GROUP = FlagGroup(
    "Learning rate schedule",
    "Learning rates rise linearly (warmup), stay at their highest value, and fall linearly (warmdown).",
    (
        Flag(
            "--grad-clip",
            "largest norm of the gradient; a larger one is scaled down to it. -1 = no limit",
            default=-1,
            type=real_number(above=0, off=-1),
            role=Role.RATE,
        ),
        Flag(
            "--warmup-steps",
            "number of steps in which the learning rates rise from near 0",
            default=0,
            type=whole_number(0),
            role=Role.CONTEXT,
        ),
        Flag(
            "--warmdown-ratio",
            "share of all steps, at the end, in which the learning rates fall",
            default=0.5,
            type=real_number(0, 1),
            role=Role.CONTEXT,
        ),
        Flag(
            "--final-lr-frac",
            "learning rate at the last step / highest learning rate",
            default=0.0,
            type=real_number(0, 1),
            role=Role.CONTEXT,
        ),
    ),
)


# ---- beside training ---------------------------------------------------------------------------------------

EVALUATION_GROUP = FlagGroup(
    "Evaluation",
    "What is measured and printed during the training.",
    (
        Flag(
            "--eval-every",
            "steps between evaluations on the validation text; -1 = only after the last step",
            default=250,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
        ),
        Flag(
            "--eval-tokens",
            "number of validation tokens, from the start of the validation text",
            default=2**19,
            type=whole_number(1),
            role=Role.REQUEST,
        ),
        Flag(
            "--ppl-thresholds",
            "perplexities; the run records when it first reaches each of them",
            default=[100.0, 50.0, 30.0],
            type=positive_floats,
            role=Role.NEUTRAL,
        ),
        Flag(
            "--stop-at-ppl",
            "end the run at the first evaluation whose perplexity is not above this; -1 = train to the end",
            default=-1,
            type=real_number(1, off=-1),
            role=Role.OTHER,
            free=True,
        ),
        Flag(
            "--sample-every",
            "steps between samples of generated text, which also follow the last step; -1 = no samples",
            default=2000,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
            free=True,
        ),
    ),
)

CORE_GROUP = FlagGroup(
    "CORE metric",
    "How well the model answers the questions of many tasks (CORE of DCLM, arXiv 2406.11794).",
    (
        Flag(
            "--core-metric-every",
            "steps between measurements, of which one also follows the last step; -1 = none",
            default=-1,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--core-metric-max-per-task",
            "number of examples of each task; -1 = all",
            default=500,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--core-dir",
            "folder of the evaluation bundle; '' = it is downloaded once",
            role=Role.NEUTRAL,
            free=True,
        ),
    ),
)

SAVING_GROUP = FlagGroup(
    "Saving and resuming",
    "When checkpoints are written, and how a run goes on from one.",
    (
        Flag(
            "--save-every",
            "steps between checkpoints, of which one also follows the last step; -1 = only that one",
            default=-1,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--keep",
            "number of checkpoints to keep, the newest ones; -1 = all",
            default=2,
            type=whole_number(1, off=-1),
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--max-bad-steps",
            "a step whose loss or gradient is not finite changes nothing; the run stops after more than this "
            "many such steps in a row",
            default=5,
            type=whole_number(0),
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--resume",
            "auto = go on from the newest intact checkpoint, or begin if there is none; N = go on from the "
            "checkpoint of step N; -1 = begin",
            default="-1",
            alias="--resume-from-step",
            role=Role.NEUTRAL,
            free=True,
        ),
    ),
)

CHECK_GROUP = FlagGroup(
    "Checks before training",
    "What is looked at before the first step.",
    (
        Flag(
            "--verify",
            "read the whole token caches, and build those again whose checksum is wrong",
            default=False,
            role=Role.NEUTRAL,
            free=True,
        ),
        Flag(
            "--dry-run",
            "print the model, the steps and what they cost, and exit",
            default=False,
            role=Role.NEUTRAL,
            free=True,
        ),
    ),
)
