"""Names of runs: which texts can be one, errors for names that no run has, and names made from flags.

Runs, tokenizers, sweeps, their presets, points and evaluations have names of one kind, the tag, also where a
file of another run names them. A tag becomes the name of a folder, of locks and other files, a part of a W&B
name, a word of TAG[:STEP], and a word of batch scripts.
"""

import difflib
import os
import re
import shlex
import unicodedata
from argparse import ArgumentTypeError
from pathlib import Path

from nanochat.arguments import quoted
from nanochat.common import get_base_dir
from nanochat.errors import InputError
from nanochat.metrics import runs_dir
from nanochat.rank import AUTOMATIC

MARKS = " ._-+=,@()"  # what a tag may hold besides letters and digits of any script
LONGEST_TAG = 150  # bytes: file systems take 255, and names of locks are longer than the tag
LONGEST_RUN_NAME = 128  # characters that W&B takes
RULE = (
    f"use letters, digits, spaces and {' '.join(MARKS.strip())}, not beginning with . or -, "
    f"at most {LONGEST_TAG} bytes"
)


# ---- what can be a name ------------------------------------------------------------------------------------


def is_tag(text) -> bool:
    """Whether a value can name a run: a text that is one part of a path, and no flag to any command."""
    if not isinstance(text, str) or not text or text[0] in ".-" or text != text.strip():
        return False
    if len(text.encode("utf-8", "replace")) > LONGEST_TAG:
        return False
    return all(c in MARKS or unicodedata.category(c)[0] in "LMN" for c in text)


def check_tag(flag: str, text) -> str:
    """The tag itself. InputError, beginning with the flag or the file and key, if it cannot be one."""
    if not is_tag(text):
        raise InputError(f"{flag} {quoted(str(text))}: becomes the name of a folder; {RULE}")
    return text


def tag(text: str) -> str:
    """argparse type: a tag."""
    if not is_tag(text):
        raise ArgumentTypeError(f"{quoted(text)} becomes the name of a folder; {RULE}")
    return text


def optional_tag(text: str) -> str:
    """argparse type: a tag, or ''."""
    return tag(text) if text else ""


def run_name(text: str) -> str:
    """argparse type: a name on W&B's dashboard."""
    if not text.strip() or not text.isprintable() or len(text) > LONGEST_RUN_NAME:
        raise ArgumentTypeError(
            f"{quoted(text)}: give W&B a name of 1 to {LONGEST_RUN_NAME} printable "
            "characters, or 'dummy' to turn it off"
        )
    return text


def part_of_tag(text: str) -> str:
    """Any text, such as a file's name or a value, with - for what a tag cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def lock_path(name: str, kind: str = "") -> Path:
    """The lock of a run, or of a thing of another kind: it begins with a dot, as no tag does."""
    name = name if is_tag(name) else part_of_tag(name)
    return get_base_dir() / "locks" / (f".{kind}.{name}.lock" if kind else f"{name}.lock")


# ---- words of commands -------------------------------------------------------------------------------------


def option(flag: str, value: str) -> tuple[str, ...]:
    """A flag and its value as words of a command.

    They are one word, --flag=value, where the value begins with - and is no number: alone it would be a flag.
    """
    if not value.startswith("-") or re.fullmatch(r"-\d+|-\d*\.\d+", value):
        return (flag, value)
    return (f"{flag}={value}",)


def path_word(path: Path) -> str:
    """A path as a word of a command, which does not take it for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def shell_command(*words) -> str:
    """A command for the user to copy."""
    return shlex.join(map(str, words))


# ---- runs by their names -----------------------------------------------------------------------------------


def run_folder(flag: str, text: str) -> Path:
    """The folder of the run that a flag names. InputError, beginning with the flag, if there is none."""
    folder = runs_dir() / check_tag(flag, text)
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {text}: {no_such_run(text)}")
    return folder


def no_such_run(text: str) -> str:
    """Words for an error: where runs were looked for, and which names there come near."""
    tags = sorted(path.parent.name for path in runs_dir().glob("*/config.json"))
    near = difflib.get_close_matches(text, tags, 3)
    if near:
        return f"no such run in {runs_dir()}; did you mean {' or '.join(near)}?"
    if not tags:
        return f"no such run in {runs_dir()}; it holds no runs"
    more = f" and {len(tags) - 20} more" if len(tags) > 20 else ""
    return f"no such run in {runs_dir()}; there are: {', '.join(tags[:20])}{more}"


# ---- names made from flags ---------------------------------------------------------------------------------

ADAPTERS = {"lora": "LoRA", "adalora": "AdaLoRA", "ia3": "IA3", "none": "full fine-tuning"}
SUBSPACES = {
    "none": "embeddings only",
    "basis": "basis",
    "fastfood": "Fastfood",
    "fft-fastfood": "FFT-Fastfood",
    "lora-random": "LoRA on noise",
}
SCOPE_WORDS = {"global": "in all", "layer": "a layer", "matrix": "a matrix"}


def method(settings: dict) -> str:
    """'LoRA', 'Fastfood', …, from the flags; '' for a run that trains all of its model from scratch."""
    if adapter := settings.get("adapter"):
        return ADAPTERS.get(adapter, adapter)
    subspace = settings.get("subspace")
    if not subspace:
        return ""
    words = SUBSPACES.get(subspace, subspace)
    if settings.get("subspace_scales"):
        words = f"structure-aware {words}"
    if settings.get("freeze_embeddings"):
        words += ", no embeddings"
    return words


def scope_words(settings: dict) -> str:
    """What shares the numbers of a subspace: 'in all', 'a layer' or 'a matrix'."""
    return SCOPE_WORDS.get(settings.get("subspace_scope") or "global", "")


def method_with_size(settings: dict) -> str:
    """'LoRA 8', 'basis 5 a layer', 'IA3'; '' for an ordinary run."""
    name = method(settings)
    subspace = settings.get("subspace")
    if settings.get("adapter") in ("lora", "adalora"):
        return f"{name} {settings.get('rank', 0):g}"
    if settings.get("adapter") or subspace in (None, "", "none"):
        return name
    if subspace == "lora-random":
        size = f"{settings.get('subspace_rank') or 0:g}"
    else:
        size = f"{settings.get('subspace_dim') or 0:g} {scope_words(settings)}".rstrip()
    first, *rest = name.split(", ")
    return ", ".join([f"{first} {size}", *rest])


def line_name(settings: dict) -> str:
    """The name of a line in a figure: its runs differ in the dimension of their subspace alone."""
    return " ".join(filter(None, [method(settings), scope_words(settings)]))


def base_name(flags: dict) -> str:
    """The run that an adapter's run starts from, without its seed and without the name of their sweep.

    The sweep's name is what the tags of both begin with, up to the last _.
    """
    base = flags.get("model_tag") or ""
    shared = os.path.commonprefix([base, flags.get("run_tag") or ""])
    return re.sub(r"_s\d+$", "", base[shared.rfind("_") + 1 :])


def default_tag(args, config) -> str:
    """The tag of a run that was given none, from its flags and its GPTConfig: d4_w256_attn0.25_mlp0.25."""
    parts = [f"d{config.n_layer}"]
    if args.model_dim > 0:
        parts.append(f"w{config.n_embd}")
    if config.mlp_ratio != type(config).mlp_ratio:
        parts.append(f"ratio{config.mlp_ratio:g}")
    groups = {"attn": config.attn_ranks, "mlp": config.mlp_ranks, "head": (config.lm_head_rank,)}
    for name, ranks in (groups | config.matrix_ranks).items():
        if any(ranks) or name in config.matrix_ranks:
            last = f"-{ranks[-1]:g}" if len(set(ranks)) > 1 else ""
            parts.append(f"{name}{ranks[0]:g}{last}")
    if args.rank_multiple != AUTOMATIC and "rank_multiple" in getattr(args, "given", ()):
        parts.append(f"multiple{args.rank_multiple}")
    if config.factor_act != "none":
        parts.append(config.factor_act)
    if args.layer_map:
        parts.append(f"map{args.layer_map.replace(',', '-')}")
    if args.subspace:
        parts.append(method_with_size(vars(args)).replace(",", "").replace(" ", "-"))
    if args.init_from:
        parts.append(f"from_{args.init_from.replace(':', '_')}")
    return "_".join(parts)
