"""The experiment file as it is written: TOML, its presets, and the names and kinds of what it holds. See nanochat/sweep/experiment.py."""

import difflib
import importlib
import sys
from argparse import Namespace
from pathlib import Path

from nanochat.common import LARGEST_INTEGER, InputError, first_line
from nanochat.errors import named
from nanochat.flags import build_parser
from nanochat.naming import check_tag
from nanochat.plan import parse_flags

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = {
    "question": str,
    "cost": str,
    "baseline": bool,
    "seeds": list,
    "processes": int,
    "flags": dict,
    "points": dict,
    "grid": dict,
    "evals": dict,
}
SCRIPTS = ("base_train", "adapter_train")
POINTS_OWN = ("seeds", "paired-with", "script", "base")  # what stands in a point and is no flag
SWEEPS_OWN = {
    "model-tag": "the sweep names the runs",
    "run-tag": "the sweep names the runs",
    "run": "give --run to scripts.sweep",
    "resume": "the sweep resumes by itself",
    "seed": "write seeds = [1, 2]",
    "dry-run": "use scripts.sweep --plan",
    "plan": "use scripts.sweep --plan",
}
# perplexities of another text or vocabulary are no points of one comparison
SHARED = ("data", "vocab-size", "tokenizer-tag")


def load_toml(path: Path) -> dict:
    try:
        with named(path):
            content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such experiment file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: invalid UTF-8 at byte {e.start}") from None
    except (ValueError, RecursionError) as e:  # also numbers of 4300 digits, lists in lists
        raise InputError(f"{path}: not TOML: {first_line(e)}") from None
    check_keys(path, content, {**KEYS, "preset": dict})
    for name, table in content.get("preset", {}).items():
        check_tag(f"{path}: preset", name)
        if not isinstance(table, dict):
            raise InputError(f"{path}: preset.{name} is not a table; write [preset.{name}]")
        check_keys(f"{path}: [preset.{name}]", table, KEYS)
    return content


def check_keys(where, table: dict, known: dict):
    for key, value in table.items():
        if key not in known:
            hint = (
                "; flags of base_train belong into [flags], [grid] or a point"
                if key in flag_names()
                else nearest(key, known)
            )
            raise InputError(f"{where}: unknown key {key}{hint}; there are {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool) != (known[key] is bool):
            words = {
                str: "text",
                bool: "true or false",
                list: "a list",
                int: "a whole number",
                dict: "a table",
            }
            raise InputError(f"{where}: {key} is to be {words[known[key]]}")


def choose_preset(content: dict, preset: str, path: Path) -> dict:
    """The file's content under a preset: flags, grid, points and evals are added to, everything else is replaced."""
    presets = content.get("preset", {})
    if presets and not preset:
        raise InputError(f"--preset is missing: {path} has {', '.join(presets)}")
    if preset and preset not in presets:
        raise InputError(
            f"--preset {preset}: {path} has {', '.join(presets) or 'no presets'}{nearest(preset, presets)}"
        )
    spec = {key: value for key, value in content.items() if key != "preset"}
    for key, value in presets.get(preset, {}).items():
        if key in ("points", "evals"):
            before = spec.get(key, {})
            value = {name: merged(before.get(name, {}), value.get(name, {})) for name in {**before, **value}}
        elif isinstance(value, dict):
            value = {**spec.get(key, {}), **value}
        spec[key] = value
    return spec


def merged(before, after):
    return {**before, **after} if isinstance(before, dict) and isinstance(after, dict) else after


# ---- checks of what is written --------------------------------------------------------------------------------------


def flag_names(script: str = "base_train") -> list[str]:
    args = (
        build_parser().parse_args([])
        if script == "base_train"
        else flags_of(script, ("--model-tag", "base", "--run-tag", "new", "--adapter", "lora"))
    )
    return [name.replace("_", "-") for name in vars(args)]


def flags_of(script: str, argv) -> Namespace:
    """argv as the script reads it: checked, and without a look at any file. InputError as the script would have it."""
    return (
        parse_flags(list(argv))
        if script == "base_train"
        else importlib.import_module(f"scripts.{script}").parse(list(argv))
    )


def nearest(word: str, words) -> str:
    """'; did you mean …?', or nothing."""
    found = difflib.get_close_matches(word.replace("_", "-"), list(words), 1)
    return f"; did you mean {found[0]}?" if found else ""


def check_flags(where: str, table: dict, shared=True, lists=True, scalars=True, script="base_train"):
    """Names and kinds of values; the flags themselves judge the values, and those of another script their names too."""
    names = flag_names() if script == "base_train" else table
    for flag, value in table.items():
        if flag in SWEEPS_OWN:
            raise InputError(f"{where}: {flag} is not to be given: {SWEEPS_OWN[flag]}")
        if flag not in names:
            raise InputError(f"{where}: {flag} is no flag of base_train{nearest(flag, names)}")
        if flag in SHARED and not shared:
            raise InputError(f"{where}: {flag} has to be the same in all runs: write it in [flags]")
        if isinstance(value, list) and not lists:
            raise InputError(
                f"{where}: {flag} has a list: what varies belongs into [grid] or a point; "
                f'a list of one flag is text, as in {flag} = "100,50"'
            )
        if not isinstance(value, list) and not scalars:
            raise InputError(f"{where}: {flag} has one value: write it in [flags], or as a list")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (int, float, str)) for v in values):
            raise InputError(f"{where}: {flag} is to be a number, text, true or false, or a list of some")
        if any("\0" in str(v) for v in values):  # which no command line and no path can hold
            raise InputError(f"{where}: {flag} has a NUL character; leave it out")


def check_point(name: str, table):
    where = f"[points.{name}]"
    if not isinstance(table, dict):
        raise InputError(f"points.{name} is not a table; write [points.{name}] and its flags below")
    if name:
        check_tag("points", name)
    for key in ("paired-with", "script", "base"):
        if not isinstance(table.get(key, ""), str):
            raise InputError(
                f"{where}: {key} is to be the name of a {'script' if key == 'script' else 'point'}"
            )
    script = table.get("script", "base_train")
    if script not in SCRIPTS:
        raise InputError(f"{where}: script {script!r}: a point is a run of {' or '.join(SCRIPTS)}")
    if (script == "adapter_train") != ("base" in table):
        raise InputError(
            f'{where}: script = "adapter_train" and base = "POINT", the run that it starts from, go together'
        )
    if isinstance(table.get("data"), list):
        raise InputError(
            f"{where}: data is to be one text; perplexities of several are no points of one comparison"
        )
    if script != "base_train" and "paired-with" in table:
        raise InputError(f"{where}: paired-with is for points of base_train, which may be low-rank")
    check_flags(
        where,
        {k: v for k, v in table.items() if k not in POINTS_OWN},
        shared=script != "base_train",
        script=script,
    )


def check_eval(name: str, table):
    where = f"[evals.{name}]"
    if (
        not isinstance(table, dict)
        or table.get("script") != "layer_map_eval"
        or not isinstance(table.get("base"), str)
    ):
        raise InputError(f'{where}: give script = "layer_map_eval", base = "POINT" and flags of that script')
    check_tag("evals", name)
    if "out" in table:
        raise InputError(f"{where}: out is not to be given: it goes into the report's folder, under its name")
    check_flags(
        where, {k: v for k, v in table.items() if k not in POINTS_OWN}, lists=False, script=table["script"]
    )


def whole_numbers(where: str, values, minimum: int, maximum: int = LARGEST_INTEGER) -> list[int]:
    good = isinstance(values, list) and all(type(v) is int and minimum <= v <= maximum for v in values)
    if not good or len(set(values)) < len(values):
        raise InputError(f"{where}: give whole numbers >= {minimum}, up to {maximum}, each once")
    return values
