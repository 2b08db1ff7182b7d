"""Print dev/FLAGS.md, the page of all flags, from the parsers of the scripts.

python dev/flags_page.py > dev/FLAGS.md
"""

import argparse
import contextlib
import importlib
import sys
import textwrap
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    ("Training", ("base_train", "adapter_train")),
    ("Text and tokenizer", ("tok_train", "tok_eval")),
    ("Using a trained model", ("base_eval", "generate", "materialize", "layer_map_eval")),
    ("Experiments", ("sweep", "report")),
    ("Measuring", ("layer_bench", "infer_bench")),
)
INTRODUCTION = """# All flags

**Which flags are there, and what is their default?**

This page is made by `python dev/flags_page.py > dev/FLAGS.md`; do not edit it.
`--help` of each script says the same.

- A flag without a default is empty, off, or not given.
- Flags are written out: `--dep` does not stand for `--depth`.
- -1 means off or automatic where the text says so; a 0 that would mean nothing is an error.

These environment variables count too:

| variable | meaning |
|---|---|
| `NANOCHAT_BASE_DIR` | folder of everything that is written; by default `~/.cache/nanochat-lowrank` |
| `NANOCHAT_DTYPE` | what `--dtype auto` means |
| `HF_ENDPOINT`, `HF_TOKEN` | host and login of downloads |
| `WANDB_*` | settings of W&B |
"""


def find_parser(script: str) -> argparse.ArgumentParser:
    """The parser whose help `python -m scripts.<script> --help` prints."""
    module = importlib.import_module(f"scripts.{script}")
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", autospec=True) as print_help,
        mock.patch.object(sys, "argv", [script, "--help"]),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    return print_help.call_args.args[0]


def groups(parser: argparse.ArgumentParser) -> list[tuple[str, str, list[argparse.Action]]]:
    """(title, description, visible flags) of every argument group that has some.

    Flags outside of the groups have the title "".
    """
    shown = []
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        ]
        title = "" if group in (parser._positionals, parser._optionals) else group.title
        if actions:
            shown.append((title, group.description or "", actions))
    return shown


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table, which shows it unchanged."""
    for character in "\\|*_<[":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def flag(action: argparse.Action) -> str:
    """The names of a flag and, if its parser has one, the form of its value: `--solve depth|rank`."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = f" {action.metavar}" if action.metavar else ""
    if action.choices:
        value = " " + "|".join(str(choice) or "''" for choice in action.choices)
    names = [f"`{name}{value}`" for name in action.option_strings]
    return " ".join(names).replace("|", "\\|")


def default(action: argparse.Action) -> str:
    if action.required and action.option_strings:
        return "required"
    if action.nargs == 0 or action.default in (None, "", []):
        return ""
    if isinstance(action.default, (list, tuple)):
        return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in action.default)
    if isinstance(action.default, float):
        return f"{action.default:g}"
    return str(action.default)


def meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    return escaped((action.help or "") % {**vars(action), "prog": parser.prog})


def section(script: str) -> str:
    """The part of the page that describes one script."""
    parser = find_parser(script)
    lines = [f"### {script}", "", (parser.description or "").strip()]
    for title, description, actions in groups(parser):
        if title:
            lines += ["", f"**{title[0].upper() + title[1:]}**"]
        if description:
            lines += ["", *textwrap.wrap(description, 110)]
        lines += ["", "| flag | default | meaning |", "|---|---|---|"]
        lines += [f"| {flag(action)} | {default(action)} | {meaning(action, parser)} |" for action in actions]
    return "\n".join(lines)


def page() -> str:
    parts = [INTRODUCTION.rstrip()]
    for heading, scripts in SCRIPTS:
        parts.append(f"## {heading}")
        parts += [section(script) for script in scripts]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(page())
