"""The TOML of an experiment file: its presets, and checks of keys, names and types of values.

nanochat/sweep/experiment.py describes the format.
"""

import difflib
import importlib
import sys
from argparse import Namespace
from pathlib import Path

from nanochat.arguments import LARGEST_INTEGER
from nanochat.errors import InputError, first_line, path_in_errors
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
KIND_WORDS = {
    str: "text",
    bool: "true or false",
    list: "a list",
    int: "a whole number",
    dict: "a table",
}
SCRIPTS = ("base_train", "adapter_train")
MOST_PROCESSES = 1024  # of one run, on one machine
POINT_KEYS = ("seeds", "paired-with", "script", "base")  # keys of a point that are not flags
# flags that the sweep sets itself -> what to do instead
RESERVED_FLAGS = {
    "model-tag": "the sweep names the runs",
    "run-tag": "the sweep names the runs",
    "run": "give --run to scripts.sweep",
    "resume": "the sweep resumes by itself",
    "seed": "write seeds = [1, 2]",
    "dry-run": "use scripts.sweep --plan",
    "plan": "use scripts.sweep --plan",
}
# perplexities under another text or vocabulary cannot be compared
SHARED_FLAGS = ("data", "vocab-size", "tokenizer-tag")
# flags that adapter_train requires: with them its parser gives all flags
REQUIRED_BY_ADAPTERS = ("--model-tag", "base", "--run-tag", "new", "--adapter", "lora")


def load_toml(path: Path) -> dict:
    """The file's content, with the names and kinds of its top-level keys checked. InputError in one line."""
    try:
        with path_in_errors(path):
            content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such experiment file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: invalid UTF-8 at byte {e.start}") from None
    except (ValueError, RecursionError) as e:  # also a number of 4300 digits, or lists nested too deeply
        raise InputError(f"{path}: not TOML: {first_line(e)}") from None
    check_keys(path, content, {**KEYS, "preset": dict})
    for name, table in content.get("preset", {}).items():
        check_tag(f"{path}: preset", name)
        if not isinstance(table, dict):
            raise InputError(f"{path}: preset.{name} is not a table; write [preset.{name}]")
        check_keys(f"{path}: [preset.{name}]", table, KEYS)
    return content


def check_keys(where, table: dict, kinds: dict):
    """InputError unless every key is one of `kinds`, {key: type}, and its value is of that type."""
    for key, value in table.items():
        if key not in kinds:
            hint = nearest(key, kinds)
            if key in flag_names():
                hint = "; flags of base_train belong in [flags], [grid] or a point"
            raise InputError(f"{where}: unknown key {key}{hint}; the keys are {', '.join(kinds)}")
        is_bool = isinstance(value, bool)  # to Python a boolean is an integer
        if not isinstance(value, kinds[key]) or is_bool != (kinds[key] is bool):
            raise InputError(f"{where}: {key} must be {KIND_WORDS[kinds[key]]}")


def choose_preset(content: dict, preset: str, path: Path) -> dict:
    """The file's content under a preset, which adds to the tables and replaces the other values."""
    presets = content.get("preset", {})
    if presets and not preset:
        raise InputError(f"--preset is missing: {path} has {', '.join(presets)}")
    if preset and preset not in presets:
        choices = ", ".join(presets) or "no presets"
        raise InputError(f"--preset {preset}: {path} has {choices}{nearest(preset, presets)}")
    spec = {key: value for key, value in content.items() if key != "preset"}
    for key, value in presets.get(preset, {}).items():
        if key in ("points", "evals"):
            tables = spec.get(key, {})
            value = {name: merge(tables.get(name, {}), value.get(name, {})) for name in {**tables, **value}}
        elif isinstance(value, dict):
            value = {**spec.get(key, {}), **value}
        spec[key] = value
    return spec


def merge(table, changes):
    """The table with the changes. A value that is no table is replaced: check_spec refuses it."""
    return {**table, **changes} if isinstance(table, dict) and isinstance(changes, dict) else changes


# ---- the flags of the scripts ------------------------------------------------------------------------------


def parse_script_flags(script: str, argv) -> Namespace:
    """argv as the script parses it; no file is read. InputError: the script's own message."""
    if script == "base_train":
        return parse_flags(list(argv))
    return importlib.import_module(f"scripts.{script}").parse(list(argv))


def flag_names(script: str = "base_train") -> list[str]:
    """All flags of a script, as they are written in an experiment file: "model-dim"."""
    if script == "base_train":
        args = build_parser().parse_args([])
    else:
        args = parse_script_flags(script, REQUIRED_BY_ADAPTERS)
    return [name.replace("_", "-") for name in vars(args)]


# ---- checks ------------------------------------------------------------------------------------------------


def check_spec(content: dict) -> dict:
    """The content, checked, with defaults for missing keys. InputError names the table and the key."""
    spec = {"flags": {}, "grid": {}, "evals": {}, "seeds": [], "processes": 1, **content}
    spec["points"] = spec.get("points") or {"": {}}
    check_flags("[flags]", spec["flags"], lists=False)
    check_flags("[grid]", spec["grid"], shared=False, scalars=False)
    for name, table in spec["points"].items():
        check_point(name, table)
    check_whole_numbers("seeds", spec["seeds"], 0)
    check_whole_numbers("processes", [spec["processes"]], 1, MOST_PROCESSES)
    if "vocab-size" not in spec["flags"]:
        raise InputError(
            "[flags]: vocab-size is missing; "
            "the tokenizer of the sweep is trained with it, for example vocab-size = 4096"
        )
    return spec


def check_flags(where: str, table: dict, shared=True, lists=True, scalars=True, script="base_train"):
    """InputError unless the table's keys are flags and its values are of a kind that a flag can take.

    shared: whether SHARED_FLAGS are allowed. lists, scalars: whether a flag may have a list, or one value.
    The script's parser checks the values later; for other scripts than base_train, it also checks the names.
    """
    names = flag_names() if script == "base_train" else table
    for flag, value in table.items():
        if flag in RESERVED_FLAGS:
            raise InputError(f"{where}: {flag} cannot be set here: {RESERVED_FLAGS[flag]}")
        if flag not in names:
            raise InputError(f"{where}: {flag} is no flag of base_train{nearest(flag, names)}")
        if flag in SHARED_FLAGS and not shared:
            raise InputError(f"{where}: {flag} has to be the same in all runs: write it in [flags]")
        if isinstance(value, list) and not lists:
            raise InputError(
                f"{where}: {flag} has a list: what varies belongs in [grid] or a point; "
                f'a flag that takes a list takes it as text, as in {flag} = "100,50"'
            )
        if not isinstance(value, list) and not scalars:
            raise InputError(f"{where}: {flag} has one value: write it in [flags], or as a list")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (int, float, str)) for v in values):
            raise InputError(f"{where}: {flag} must be a number, text, true or false, or a list of these")
        if any("\0" in str(v) for v in values):  # no command line and no path can hold it
            raise InputError(f"{where}: {flag} has a NUL character; leave it out")


def check_point(name: str, table):
    """InputError unless [points.NAME] is a table of flags and POINT_KEYS that fit together."""
    where = f"[points.{name}]"
    if not isinstance(table, dict):
        raise InputError(f"points.{name} is not a table; write [points.{name}] and its flags below")
    if name:
        check_tag("points", name)
    for key in ("paired-with", "script", "base"):
        if not isinstance(table.get(key, ""), str):
            kind = "script" if key == "script" else "point"
            raise InputError(f"{where}: {key} must be the name of a {kind}")
    script = table.get("script", "base_train")
    if script not in SCRIPTS:
        raise InputError(f"{where}: script {script!r}: a point is a run of {' or '.join(SCRIPTS)}")
    if (script == "adapter_train") != ("base" in table):
        raise InputError(
            f'{where}: script = "adapter_train" and base = "POINT", the run that it starts from, go together'
        )
    if isinstance(table.get("data"), list):
        raise InputError(f"{where}: data must be one text: perplexities of several cannot be compared")
    if script != "base_train" and "paired-with" in table:
        raise InputError(f"{where}: paired-with is for points of base_train, which may be low-rank")
    check_flags(where, without_point_keys(table), shared=script != "base_train", script=script)


def check_eval(name: str, table):
    """InputError unless [evals.NAME] is a table with a script that can measure a run, its base, and flags."""
    where = f"[evals.{name}]"
    is_eval = isinstance(table, dict) and table.get("script") == "layer_map_eval"
    if not is_eval or not isinstance(table.get("base"), str):
        raise InputError(f'{where}: give script = "layer_map_eval", base = "POINT" and flags of that script')
    check_tag("evals", name)
    if "out" in table:
        raise InputError(f"{where}: out cannot be set here: the result goes beside the report, as {name}")
    check_flags(where, without_point_keys(table), lists=False, script=table["script"])


def without_point_keys(table: dict) -> dict:
    """The flags of a point's table."""
    return {key: value for key, value in table.items() if key not in POINT_KEYS}


def check_whole_numbers(where: str, values, minimum: int, maximum: int = LARGEST_INTEGER) -> list[int]:
    """The values, if they are a list of different whole numbers in this range; else InputError."""
    good = isinstance(values, list) and all(type(v) is int and minimum <= v <= maximum for v in values)
    if not good or len(set(values)) < len(values):
        raise InputError(f"{where}: give whole numbers >= {minimum}, up to {maximum}, each once")
    return values


def nearest(word: str, words) -> str:
    """'; did you mean …?' with the most similar of `words`, or ''."""
    matches = difflib.get_close_matches(word.replace("_", "-"), list(words), 1)
    return f"; did you mean {matches[0]}?" if matches else ""
