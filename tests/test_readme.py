"""The README speaks of flags, defaults and files that exist."""

import re
from pathlib import Path

from nanochat.flags import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OF_SLURM = {"--nodes", "--ntasks-per-node", "--signal", "--partition", "--time"}
OF_TORCHRUN = {
    "--standalone",
    "--nproc_per_node",
    "--nnodes",
    "--node_rank",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
}


def test_every_flag_of_the_readme_exists():
    known = (
        {flag for action in build_parser()._actions for flag in action.option_strings}
        | OF_TORCHRUN
        | OF_SLURM
    )
    for script in [
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "dev/bench").glob("*.py"),
        ROOT / "nanochat/dataset.py",
    ]:
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", README)) - known == set()


def test_defaults_in_the_flags_table_are_the_parsers():
    defaults = {flag: action.default for action in build_parser()._actions for flag in action.option_strings}
    checked = 0
    for line in README.splitlines():
        cells = line.split(" | ")
        flags = re.findall(r"`(--[\w-]+)", cells[0])
        values = [v.strip() for v in cells[1].split(", ")] if len(cells) > 2 else []
        if (
            line.startswith("| `--")
            and all(re.fullmatch(r"-?[\d.]+", v) for v in values)
            and len(values) in (1, len(flags))
        ):
            for flag, value in zip(flags, values * len(flags) if len(values) == 1 else values):
                assert float(defaults[flag]) == float(value), (flag, value, defaults[flag])
                checked += 1
    assert checked > 15


def test_every_file_of_the_layout_exists():
    layout = README.split("## Layout")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.(?:py|md)", layout):
        assert (ROOT / name).exists() or (ROOT / "nanochat" / name).exists(), name
    for name in re.search(r"scripts/ +(.*)", layout)[1].split():
        assert (ROOT / "scripts" / f"{name}.py").exists(), name


def test_speedrun_variables_of_the_readme_exist():
    script = (ROOT / "speedrun.sh").read_text()
    for name in re.findall(r"`([A-Z_]{4,})`", README.split("## What comes out")[0]):
        assert re.search(rf"\${{{name}:?=", script), name
