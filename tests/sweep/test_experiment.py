"""Experiment files: what they expand to, and every refusal."""

from pathlib import Path

import pytest

from nanochat.accounting import count_parameters
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.sweep.experiment import read_experiment

FLAGS = """
seeds = [1, 2]
[flags]
vocab-size = 300
depth = 2
model-dim = 32
head-dim = 16
max-seq-len = 32
device-batch-size = 4
total-batch-size = 256
num-iterations = 6
"""


@pytest.fixture
def read(tmp_path):
    """read(text, preset) -> the Sweep of an experiment file: `before`, FLAGS, text."""

    def run(text="", preset="", data="", before=""):
        path = tmp_path / "question.toml"
        path.write_text(before + FLAGS + text)
        return read_experiment(path, preset, data)

    return run


def labels(sweep):
    return list(dict.fromkeys(p.label for p in sweep.points))


# ---- what a file means


def test_points_grid_and_seeds_are_multiplied_and_each_has_a_tag_and_its_flags(read):
    text = "[points.full]\n[points.low]\nattn-rank = 8\nmlp-rank = 0.25\n[grid]\nmatrix-lr = [0.01, 0.04]\n"
    sweep = read(text)
    assert [p.tag for p in sweep.points] == [
        f"question_{point}_lr{lr}_s{seed}"
        for seed in (1, 2)
        for point in ("full", "low")
        for lr in ("0.01", "0.04")
    ]
    low = next(p for p in sweep.points if p.tag == "question_low_lr0.04_s2")
    args = low.args
    assert (args.attn_rank, args.mlp_rank, args.matrix_lr, args.seed) == (8, 0.25, 0.04, 2)
    assert args.model_tag == low.tag
    assert low.args == build_parser().parse_args(low.argv) and low.config.attn_ranks == (8, 8)
    assert low.args.resume == "auto" and 0 < low.args.save_every <= 6
    assert set(low.varying) == {"attn-rank=8", "mlp-rank=0.25", "matrix-lr=0.04"}
    assert low.pair == "question_full_lr0.04_s2"
    assert read(text) == sweep


def test_every_low_rank_run_gets_its_full_rank_partner_at_its_seed_depth_and_learning_rate(read):
    sweep = read(
        "[grid]\nattn-rank = [4, 8]\ndepth = [1, 2]\n[points.deep]\ndepth = 3\nmlp-rank = 4\nseeds = [7]\n"
    )
    by_tag = {p.tag: p for p in sweep.points}
    low = [p for p in sweep.points if any(p.config.attn_ranks) or any(p.config.mlp_ranks)]
    # the named point, at every rank of the grid, under its own seed
    assert len(low) == 2 and all(p.label.startswith("deep") for p in low)
    assert {p.pair for p in low} == {"question_full_d3_s7"}
    assert not any(by_tag["question_full_d3_s7"].config.attn_ranks)
    grid = read("[grid]\nattn-rank = [4, 8]\ndepth = [1, 2]\n")
    assert labels(grid) == ["full_d1", "attn4_d1", "full_d2", "attn4_d2", "attn8_d1", "attn8_d2"]
    assert len(grid.points) == 12
    for point in grid.points:
        if point.pair:
            partner = grid.point(point.pair)
            assert partner.seed == point.seed and partner.config.n_layer == point.config.n_layer
    assert labels(read("[grid]\nattn-rank = [4, 8]\n", before="baseline = false\n")) == ["attn4", "attn8"]
    another = read("[points.full]\nmatrix-lr = 0.5\n[points.low]\nattn-rank = 4\n")
    assert labels(another) == ["full", "full-rank", "low"]


def test_the_recipe_of_the_speedrun_is_asked_h3_beside_the_full_rank_run(read):
    recipe = "attn-rank = 0.25\nmlp-rank = 0.297\nmatrix-ranks = 'v=0,o=0'\nrank-multiple = 1\n"
    deep = f"depth = 4\n{recipe}budget-params = 'full'\nsolve = 'rank'\npaired-with = 'full'\n"
    sweep = read(f"[points.full]\n[points.recipe]\n{recipe}[points.deep]\n{deep}")
    at = {p.label: p for p in sweep.points if p.seed == 1}
    assert list(at) == ["full", "recipe", "deep"] and at["recipe"].pair == at["deep"].pair == at["full"].tag
    budget = count_parameters(at["full"].config)
    assert 0.98 * budget < count_parameters(at["deep"].config) <= budget
    assert at["deep"].config.rank("v", 3) == 0 < at["deep"].config.rank("q", 3)


def test_a_partner_has_none_of_the_flags_of_rank_and_low_rank_takes_its_horizon(read):
    low = (
        "attn-rank = 16\nattn-rank-schedule = 'linear'\nattn-rank-end = 4\n"
        "mlp-rank = 0.5\nmlp-rank-schedule = 'step'\nmlp-rank-end = 0.25\n"
    )
    own = "mlp-rank = 4\nhorizon-from = 'own'\n"
    grid = "mlp-rank = 8\nmlp-rank-schedule = 'linear'\nmlp-rank-end = [2, 4]\n"
    derived = "num-iterations = -1\ntotal-batch-size = -1\ntarget-param-data-ratio = 2000\n"
    points = f"[points.full]\n[points.low]\n{low}[points.own]\n{own}[points.grid]\n{grid}"
    sweep = read(f"rank-multiple = 4\n{points}[preset.derived.flags]\n{derived}", "derived")
    at = {p.label: p for p in sweep.points if p.seed == 1}
    assert labels(sweep) == ["full", "low", "own", "grid_mlp-end2", "grid_mlp-end4"] and not at["full"].pair
    assert {p.pair for label, p in at.items() if label != "full"} == {at["full"].tag}
    assert at["low"].config.attn_ranks == (16, 4) and at["low"].config.whole_rank("up", 1) == 8
    assert at["low"].plan == at["full"].plan and at["own"].plan["tokens"] < at["full"].plan["tokens"]


def test_the_partner_may_be_named_and_then_has_all_the_seeds(read):
    sweep = read(
        "[points.full]\nseeds = [1]\n[points.deep]\ndepth = 4\nattn-rank = 4\npaired-with = 'full'\n"
    )
    assert {p.tag: p.pair for p in sweep.points} == {
        "question_full_s1": "",
        "question_full_s2": "",
        "question_deep_s1": "question_full_s1",
        "question_deep_s2": "question_full_s2",
    }


def test_scans_that_cross_run_their_common_point_once(read):
    scans = "[points.lr]\nmatrix-lr = [0.01, 0.02]\n[points.depth]\ndepth = [2, 3]\n"
    sweep = read(f"matrix-lr = 0.02\n[points.full]\nseeds = [1, 2, 3]\n{scans}")
    assert labels(sweep) == ["full", "lr_lr0.01", "depth_d3"] and len(sweep.points) == 3 + 2 + 2
    assert sweep.duplicates == (("lr_lr0.02", "full"), ("depth_d2", "full"))


def test_a_budget_may_be_the_parameters_of_another_point(read):
    budget = "budget-params = 'full'\nsolve = 'rank'\npaired-with = 'full'\n"
    deep = f"[points.deep]\ndepth = 4\nattn-rank = 8\nmlp-rank = 8\n{budget}"
    sweep = read(f"[points.full]\n{deep}[grid]\nmodel-dim = [32, 64]\n")
    at = {p.tag: p for p in sweep.points}
    for width in (32, 64):
        full = at[f"question_full_w{width}_s1"]
        deep = at[f"question_deep_w{width}_s1"]
        budget = count_parameters(full.config)
        assert deep.args.budget_params == str(budget) and deep.config.n_layer == 4
        assert 0.97 * budget < count_parameters(deep.config) <= budget


def test_presets_add_to_the_file_and_one_has_to_be_chosen(read):
    text = (
        "[points.a]\nattn-rank = 4\n[preset.small]\nseeds = [5]\n[preset.small.flags]\ndepth = 1\n"
        "[preset.small.points.a]\nmlp-rank = 4\n[preset.big.points.b]\ndepth = 3\n"
    )
    small = read(text, "small")
    big = read(text, "big")
    assert small.name == "question-small" and {p.seed for p in small.points} == {5}
    shapes = {(p.config.n_layer, p.args.attn_rank, p.args.mlp_rank) for p in small.points}
    assert shapes == {(1, 0, 0), (1, 4, 4)}
    assert labels(big) == ["full", "a", "b"]
    with pytest.raises(InputError, match="--preset is missing: .* has small, big"):
        read(text)
    with pytest.raises(InputError, match="--preset smal: .* has small, big; did you mean small"):
        read(text, "smal")


def test_the_text_can_be_given_beside_the_file_and_a_folder_is_named_in_full(read, tmp_path, monkeypatch):
    assert read("data = 'tinystories'\n").points[0].args.data == "tinystories"
    monkeypatch.chdir(tmp_path)
    assert read("data = 'tinystories'\n", data="texts").points[0].args.data == str(tmp_path / "texts")


def test_switches_and_texts(read):
    sweep = read(
        "[points.list]\nrank-schedule = '8,4'\n[points.tied]\ntie-embeddings = true\n"
        "[points.switch]\nvalue-embeddings = [true, false]\n"
    )
    assert labels(sweep) == ["list", "tied", "switch_value-embeddings", "switch_no-value-embeddings"]
    by_label = {p.label: p for p in sweep.points if p.seed == 1}
    assert by_label["list"].config.attn_ranks == (8, 4) and "--tie-embeddings" in by_label["tied"].argv
    # this point is full rank already, so no partner is added
    assert by_label["list"].pair == by_label["switch_no-value-embeddings"].tag


# ---- what is refused


@pytest.mark.parametrize(
    "text, message",
    [
        ("[points.a]\nattn_rank = 4", "attn_rank is no flag of base_train; did you mean attn-rank"),
        ("[grid]\nlearning-rate = [1]", "learning-rate is no flag of base_train"),
        ("[points.a]\nattn-rank = -3", "point a: argument --attn-rank: '-3': give 0"),
        ("[points.a]\nattn-rank = 99", "point a: --attn-rank .* 99"),
        ("[points.a]\ndepth = true", "point a: argument --depth: expected one argument"),
        (
            "[points.a]\nattn-rank = 4\n[points.A]\nmlp-rank = 4",
            "two points are named A, with other values of attn-rank, mlp-rank",
        ),
        ("[points.'a/b']\ndepth = 1", "points 'a/b': becomes the name of a folder; use letters"),
        ("[points.a]\ntotal-batch-size = 100", "point a: --total-batch-size 100: not a multiple"),
        ("[points.a]\nbudget-params = 100\nsolve = 'rank'", "point a: --budget-params 100: even rank 1"),
        (
            "[points.a]\nbudget-params = 'b'\nsolve = 'rank'",
            "budget-params 'b': no point of this file; there are a",
        ),
        (
            "[points.a]\nbudget-params = 'b'\nsolve = 'rank'\n[points.b]\ndepth = [1, 2]",
            "'b': that is 2 points, b_d1, b_d2",
        ),
        ("[points.a]\nbudget-params = 'a'\nsolve = 'rank'", "that point has a budget itself"),
        ("[points.a]\npaired-with = 'b'", "paired-with 'b': no point of this file"),
        ("[points.a]\nseeds = []", r"\[points.a\]: no seeds"),
        ("[points.a]\nseeds = [1, 1]", "seeds: give whole numbers >= 0, up to .*, each once"),
        ("[points.a]\ndata = 'stdlib'", "data has to be the same in all runs"),
        ("[grid]\nvocab-size = [300, 400]", "vocab-size has to be the same in all runs"),
        ("[points.a]\nmodel-tag = 'x'", "model-tag cannot be set here: the sweep names the runs"),
        ("[points.a]\nseed = 3", r"seed cannot be set here: write seeds = \[1, 2\]"),
        ("ppl-thresholds = [100, 50]", "ppl-thresholds has a list"),
        ("[grid]\ndepth = 3", "depth has one value"),
        ("[grid]\ndepth = []", "depth must be a number"),
        ("[gird]\ndepth = [1]", "unknown key gird; did you mean grid"),
        ("[preset.small]\nseed = [1]", r"\[preset.small\]: unknown key seed"),
        ("[points]\na = 3", "points.a is not a table"),
        ("depth = 2", "not TOML: "),
    ],
)
def test_a_mistake_is_one_line_that_names_it(read, text, message):
    with pytest.raises(InputError, match=message) as error:
        read(text, "small" if "preset" in text else "")
    assert "\n" not in str(error.value) and "question.toml" in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("seeds = [1]\n", "vocab-size is missing"),
        ("[flags]\nvocab-size = 300\nnum-iterations = 1\n", "no seeds: write for example"),
        ("matrix-lr = 1\n", r"unknown key matrix-lr; flags of base_train belong in \[flags\]"),
        ("seeds = 3\n", "seeds must be a list"),
        ("processes = true\n", "processes must be a whole number"),
        ("processes = 0\n", "processes: give whole numbers >= 1, up to 1024"),
        ("a = [", "not TOML"),
        (b"\xff", "invalid UTF-8 at byte 0"),
    ],
)
def test_a_file_that_is_no_experiment(tmp_path, content, message):
    path = tmp_path / "e.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_experiment(path)
    with pytest.raises(InputError, match="no such experiment file"):
        read_experiment(tmp_path / "missing.toml")


# ---- the experiments that come with the project


@pytest.mark.parametrize("preset", ["small", "full"])
@pytest.mark.parametrize("name", ["low_rank_substitution", "parameter_approximation", "rank_schedules"])
def test_the_published_experiments_are_well_formed(name, preset):
    sweep = read_experiment(Path(__file__).parents[2] / "dev" / "experiments" / f"{name}.toml", preset)
    tags = [p.tag for p in sweep.points]
    assert len(set(tags)) == len(tags) > 15 and all(tag.startswith(f"{name}-{preset}_") for tag in tags)
    assert len({p.plan["tokens"] for p in sweep.points}) == 1 and sweep.question and sweep.cost
    for p in sweep.points:
        assert bool(p.pair) == (any(p.config.attn_ranks) or any(p.config.mlp_ranks))
        assert not p.pair or p.pair in tags
    size = {p.label: count_parameters(p.config) for p in sweep.points}
    if name == "low_rank_substitution":
        assert size["large"] == pytest.approx(size["full"], rel=0.003)
        assert size["deep"] == pytest.approx(size["full"], rel=0.01)
        assert size["deep"] <= size["full"] and size["falling"] == size["rising"] < size["medium"]
    if name == "rank_schedules":
        del size["full"]
        assert all(0.99 * size["constant"] < count <= size["constant"] for count in size.values())
