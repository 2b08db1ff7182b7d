"""README and guides are short, and speak of flags, files and figures that exist."""

import re

import pytest
from conftest import ROOT
from test_commands import PAGES

ALL_PAGES = [*PAGES, "dev/FLAGS.md"]
RESULTS = ROOT / "dev/results"
OTHER_PROGRAMS = {  # flags of torchrun, Slurm and sbatch
    "--standalone",
    "--nproc_per_node",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--signal",
    "--partition",
    "--time",
    "--run-path",
}


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def links(page: str) -> list[str]:
    """What the page links to, or shows, in this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL))
    return [target for target in targets if not target.startswith("http")]


def anchors(file) -> set[str]:
    """The places of a page that a link may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", ALL_PAGES)
def test_prose_fits_120_columns(page):
    prose = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and line[:1] not in "|!"] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_page_exists(page):
    known = set(re.findall(r"`(--[\w-]+)", read("dev/FLAGS.md"))) | OTHER_PROGRAMS | {"--help"}
    for script in [*(ROOT / "dev/bench").glob("*.py"), ROOT / "nanochat/dataset.py"]:
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text("utf-8")))
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", read(page))) - known == set()


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_new_places_of_the_log_exist():
    rows = re.findall(r"^\| (`.*) \| (.*) \| [0-9a-f]{7} \|$", read("dev/LOG.md"), re.MULTILINE)
    paths = [path for _, new in rows for path in re.findall(r"`([\w/]+\.py)`", new)]
    assert len(paths) >= 6 and not [path for path in paths if not (ROOT / path).exists()]


def test_every_page_is_reached_from_the_readme():
    reached = {"README.md"} | {target.partition("#")[0] for target in links("README.md")}
    assert set(ALL_PAGES) <= reached


def test_every_figure_of_the_results_is_shown():
    pages = [*map(ROOT.joinpath, ALL_PAGES), ROOT / "dev/LOG.md", *RESULTS.rglob("*.md")]
    shown = {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    assert {file for file in RESULTS.rglob("*.png") if file.resolve() not in shown} == set()
    assert {file for file in shown if not file.exists()} == set()


def test_speedrun_variables_of_the_readme_exist():
    script = read("speedrun.sh")
    for name in re.findall(r"`([A-Z_]{4,})`", read("README.md").split("## Training")[0]):
        assert re.search(rf"\${{{name}:?=", script), name
