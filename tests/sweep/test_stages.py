"""Experiments of two stages: runs that start from other runs, and measurements made after all of them."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import tiny_experiment

from nanochat import metrics
from nanochat.accounting import count_parameters
from nanochat.arguments import ArgumentParser
from nanochat.errors import InputError
from nanochat.sweep import costs, display, local, slurm, wandb_agent
from nanochat.sweep.experiment import read_experiment
from scripts import sweep as sweeps


@pytest.fixture(autouse=True)
def adapter_train(monkeypatch):
    """A stand-in for scripts.adapter_train with its flags; .calls is what its main was given."""

    def parse(argv) -> Namespace:
        parser = ArgumentParser("stand-in")
        for flag, default in (
            ("model-tag", ""),
            ("run-tag", ""),
            ("adapter", "lora"),
            ("layer-map", ""),
            ("data", "stdlib"),
            ("resume", "-1"),
            ("run", "dummy"),
        ):
            parser.add_argument(f"--{flag}", default=default)
        for flag, default in (
            ("rank", 8),
            ("seed", 42),
            ("num-iterations", -1),
            ("device-batch-size", 32),
            ("total-batch-size", -1),
            ("eval-tokens", 1024),
            ("keep", 2),
        ):
            parser.add_argument(f"--{flag}", type=int, default=default)
        parser.add_argument("--lr", type=float, default=1e-3)
        args = parser.parse_args(argv)
        if args.rank < 1:
            raise InputError(f"--rank {args.rank}: give a whole number above 0")
        return args

    module = ModuleType("scripts.adapter_train")
    module.parse, module.calls, module.main = parse, [], lambda argv: module.calls.append(argv)
    monkeypatch.setitem(sys.modules, "scripts.adapter_train", module)
    return module


LORA = "[points.lora]\nscript = 'adapter_train'\nbase = 'd2'\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text, seeds) -> path of an experiment file: TINY flags, the point d2, this text. No runs yet."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))

    def experiment(text, seeds=(1, 2)):
        return tiny_experiment(tmp_path / "two.toml", f"[points.d2]\n{text}", seeds)

    return experiment


@pytest.fixture
def read(write):
    return lambda text, seeds=(1, 2), **given: read_experiment(write(text, seeds), **given)


# ---- what a file means -------------------------------------------------------------------------------------


def test_a_later_run_has_its_scripts_flags_the_shared_ones_that_it_knows_and_its_base_of_the_same_seed(read):
    sweep = read(LORA + "rank = [2, 4]\nlr = 0.01\nnum-iterations = 3\n")
    at = {p.tag: p for p in sweep.points}
    assert list(at) == [
        f"two_{label}_s{seed}" for seed in (1, 2) for label in ("d2", "lora_rank2", "lora_rank4")
    ]
    lora = at["two_lora_rank4_s2"]
    assert (lora.script, lora.base, lora.pair) == ("adapter_train", "two_d2_s2", "") and at[
        "two_d2_s2"
    ].script == "base_train"
    given = vars(lora.args)
    assert (
        given["model_tag"],
        given["run_tag"],
        given["seed"],
        given["rank"],
        given["resume"],
        given["keep"],
    ) == ("two_d2_s2", lora.tag, 2, 4, "auto", 1)
    # of [flags]; which the stand-in has not
    assert given["device_batch_size"] == 4 and "--depth" not in lora.argv and "--save-every" not in lora.argv
    assert (
        lora.plan["num_iterations"] == 3
        and lora.plan["tokens"] == 3 * 256
        and at["two_d2_s1"].plan["num_iterations"] == 6
    )
    assert lora.config == at["two_d2_s2"].config and set(lora.varying) == {
        "rank=4",
        "lr=0.01",
        "num-iterations=3",
    }


def test_without_the_same_seed_it_starts_from_the_first_and_the_grid_is_that_of_its_base(read):
    assert {p.tag: p.base for p in read(LORA + "seeds = [2, 7]\n").points if p.base} == {
        "two_lora_s2": "two_d2_s2",
        "two_lora_s7": "two_d2_s1",
    }
    sweep = read(LORA + "[grid]\nmodel-dim = [32, 48]\n", seeds=[1])
    assert {p.tag: (p.base, p.config.n_embd) for p in sweep.points if p.base} == {
        "two_lora_w32_s1": ("two_d2_w32_s1", 32),
        "two_lora_w48_s1": ("two_d2_w48_s1", 48),
    }


def test_what_is_started_from_comes_first_and_low_rank_bases_keep_their_partner(read, write):
    path = write("attn-rank = 4\n", seeds=[1])
    path.write_text(path.read_text().replace("[points.d2]", LORA + "[points.d2]"))
    sweep = read_experiment(path)
    assert [(p.label, p.pair) for p in sweep.points] == [("full", ""), ("d2", "two_full_s1"), ("lora", "")]


def test_a_layer_map_is_executed_by_position_and_named(read):
    sweep = read(LORA + "layer-map = ['0,0,1,1', '0,1,1']\n", seeds=[1])
    assert {p.label: p.config.layer_map for p in sweep.points} == {
        "d2": (),
        "lora_map0-0-1-1": (0, 0, 1, 1),
        "lora_map0-1-1": (0, 1, 1),
    }


def test_a_later_run_may_have_a_text_of_its_own_and_the_command_line_says_where_it_is(read, tmp_path):
    sweep = read(
        LORA + "data = 'wiki'\n",
        seeds=[1],
        data=str(tmp_path / "stories"),
        texts={"wiki": str(tmp_path / "w")},
    )
    assert [p.args.data for p in sweep.points] == [str(tmp_path / "stories"), str(tmp_path / "w")]
    assert sweep.data_flags() == ["--data", str(tmp_path / "stories"), "--data", f"wiki={tmp_path / 'w'}"]
    args = sweeps.build_parser().parse_args([str(sweep.file), *sweep.data_flags()])
    assert sweeps.load(args) == sweep
    with pytest.raises(
        InputError, match="--data wikipedia=…: the file has no text of this name; it names stdlib, wiki"
    ):
        read(LORA + "data = 'wiki'\n", texts={"wikipedia": "x"})
    with pytest.raises(
        InputError, match="there is no .*nowhere; say where the text wiki is: --data wiki=FOLDER"
    ):
        sweeps.prepare(read(LORA + "data = 'wiki'\n", texts={"wiki": str(tmp_path / "nowhere")}))
    with pytest.raises(InputError, match="--data a and b: give the text once"):
        sweeps.main([str(sweep.file), "--data", "a", "--data", "b", "--plan"])


@pytest.mark.parametrize(
    "text, message",
    [
        (LORA + "rank = 0\n", "point lora: --rank 0: give a whole number above 0"),
        (LORA + "rnak = 4\n", "point lora: unrecognized arguments: --rnak"),
        (LORA + "run-tag = 'x'\n", "run-tag cannot be set here: the sweep names the runs"),
        (LORA + "paired-with = 'd2'\n", "paired-with is for points of base_train"),
        (LORA + "data = ['a', 'b']\n", "data must be one text"),
        (LORA + "layer-map = '0,5'\n", "point lora: --layer-map 0,5: there is no layer 5"),
        (LORA.replace("'d2'", "'d3'"), "point lora: base 'd3': no point of this file; there are d2, lora"),
        (LORA.replace("'d2'", "'lora'"), "point lora: base 'lora': is a run of adapter_train itself"),
        (LORA.replace("'d2'", "'many'") + "[points.many]\ndepth = [1, 2]\n", "'many': that is 2 points"),
        (LORA.replace("base = 'd2'\n", ""), "go together"),
        ("base = 'd2'\n", "go together"),
        (
            LORA.replace("adapter_train", "base_eval"),
            "script 'base_eval': a point is a run of base_train or adapter_train",
        ),
        ("[evals.maps]\nbase = 'd2'\n", 'give script = "layer_map_eval"'),
        (
            "[evals.maps]\nscript = 'layer_map_eval'\nbase = 'd2'\n",
            r"\[evals.maps\]: --maps, --all-monotone, --random: give at least one",
        ),
        (
            "[evals.maps]\nscript = 'layer_map_eval'\nbase = 'd4'\nmaps = '0'\n",
            r"\[evals.maps\]: base 'd4': no point of this file",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(read, text, message):
    with pytest.raises(InputError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value) and "two.toml" in str(error.value)


# ---- in which order they run -------------------------------------------------------------------------------

STAND_IN = """
import json, pathlib, sys
folder, log, failing = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(log, "a") as f:
    print(folder.name, file=f)
if folder.name == failing:
    sys.exit("too hot")
folder.mkdir(parents=True)
(folder / "config.json").write_text('{"flags": {}}')
summary = {"status": "finished", "val/ppl": 9.0, "total_training_flops": 50, "total_training_time": 1}
(folder / "partial").write_text(json.dumps(summary))
(folder / "partial").rename(folder / "summary.json")  # at once, as a run does: the sweep reads it meanwhile
"""


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """run_all(sweep, failing, j) -> (run_all's answer, tags in the order of their starts)"""
    monkeypatch.setattr(local, "CHILD_POLL", 0.02)
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def run(sweep, failing="", j=2):
        def command(sweep, point, args):
            return [
                sys.executable,
                "-I",
                str(tmp_path / "stand_in.py"),
                str(point.folder),
                str(tmp_path / "starts"),
                failing,
            ]

        answer = local.run_all(sweep, SimpleNamespace(j=j, run="dummy"), command)
        return answer, (tmp_path / "starts").read_text().split()

    return run


def test_a_run_starts_once_its_base_is_finished_and_not_at_all_if_that_failed(read, run_all, capfd):
    sweep = read(LORA)
    (failed, stopped), starts = run_all(sweep, failing="two_d2_s1")
    assert (
        sorted(starts) == ["two_d2_s1", "two_d2_s2", "two_lora_s2"]
        and starts[-1] == "two_lora_s2"
        and not stopped
    )
    assert (
        sorted(failed) == ["two_d2_s1", "two_lora_s1"]
        and failed["two_lora_s1"][0] == "cannot start: two_d2_s1 failed"
    )
    assert "two_lora_s1: cannot start: two_d2_s1 failed" in capfd.readouterr().out
    answer, starts = run_all(sweep)
    assert answer == ({}, "") and starts[3:] == ["two_d2_s1", "two_lora_s1"]


def finish(tag):
    folder = metrics.runs_dir() / tag
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"flags": {}}')
    (folder / "summary.json").write_text('{"status": "finished"}')


def test_slurm_gets_a_second_array_that_waits_for_the_first(read, monkeypatch, capsys):
    sweep = read(LORA, seeds=[1])
    sent = []
    monkeypatch.setattr(slurm, "check_cluster", lambda _: None)
    monkeypatch.setattr(slurm, "jobs_in_queue", lambda _: {})
    monkeypatch.setattr(
        slurm, "sbatch", lambda path, script: sent.append((path.name, script)) or str(70 + len(sent))
    )
    args = SimpleNamespace(sbatch="", j=None, run="dummy", out="")
    slurm.submit(sweep, args)
    (first, one), (second, two), (report, last) = sent
    assert (first, second, report) == ("slurm.sh", "slurm_adapters.sh", "slurm_report.sh")
    assert (
        "--dependency" not in one
        and '--dependency="afterok:71"' in two
        and '--kill-on-invalid-dep="yes"' in two
        and '"afterany:71:72"' in last
    )
    assert "TAGS=(\n  two_d2_s1\n)" in one and "TAGS=(\n  two_lora_s1\n)" in two
    assert json.loads(slurm.jobs_path(sweep).read_text()) == {
        "71": {"0": "two_d2_s1"},
        "72": {"0": "two_lora_s1"},
    }
    assert "submitted as job 71, 72, the report as job 73" in capsys.readouterr().out
    sent.clear()
    finish("two_d2_s1")
    slurm.submit(sweep, args)
    assert [name for name, _ in sent] == [
        "slurm_adapters.sh",
        "slurm_report.sh",
    ] and "--dependency" not in sent[0][1]
    sent.clear()
    # the base's one task is still in the queue, from before
    sweep = read(LORA + "seeds = [1, 2]\n", seeds=[3])
    monkeypatch.setattr(slurm, "jobs_in_queue", lambda _: {"60": {"0": "two_d2_s3"}})
    slurm.submit(sweep, args)
    assert sent[0][0] == "slurm_adapters.sh" and '--dependency="afterok:60"' in sent[0][1]


def test_wandbs_agents_know_no_order(read):
    with pytest.raises(
        InputError,
        match="--launcher wandb: two_lora_s1 starts from the run two_d2_s1, and agents know no order",
    ):
        sweeps.main([str(read(LORA).file), "--launcher", "wandb"])
    wandb_agent.check_for_agents(read(""))


# ---- the whole way -----------------------------------------------------------------------------------------


def test_plan_and_task_of_a_later_run(read, adapter_train, monkeypatch, capsys):
    path = str(read(LORA + "num-iterations = 3\n", seeds=[1]).file)
    monkeypatch.setattr(costs, "measured_rate", lambda *_: (1e9, "made up"))
    sweeps.main([path, "--plan"])
    out = capsys.readouterr().out
    assert "two_lora_s1" in out and "an upper bound" in out and "2 runs" in out
    with pytest.raises(
        InputError, match=r"--task two_lora_s1: starts from two_d2_s1, which is not finished \(new\)"
    ):
        sweeps.main([path, "--task", "two_lora_s1"])
    finish("two_d2_s1")
    monkeypatch.setattr(sweeps, "prepare_tokenizer", lambda _: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")
    sweeps.main([path, "--task", "two_lora_s1"])
    [argv] = adapter_train.calls
    assert (
        argv[argv.index("--model-tag") + 1] == "two_d2_s1"
        and argv[argv.index("--run-tag") + 1] == "two_lora_s1"
    )


def test_reports_by_text_and_then_the_evals_once(read, monkeypatch, tmp_path):
    text = LORA + "data = 'wiki'\n[evals.maps]\nscript = 'layer_map_eval'\nbase = 'd2'\nall-monotone = 3\n"
    sweep = read(text, seeds=[1], texts={"wiki": str(tmp_path / "w")})
    reports = []
    evals = []
    monkeypatch.setattr("scripts.report.main", reports.append)
    monkeypatch.setattr(
        "scripts.layer_map_eval.main",
        lambda argv: (evals.append(argv), (sweep.folder / "report" / "maps").mkdir(parents=True)),
    )
    finish("two_d2_s1"), finish("two_lora_s1")
    sweeps.make_report(sweep, SimpleNamespace(out=""))
    sweeps.make_report(sweep, SimpleNamespace(out=""))
    folder = sweep.folder / "report"
    assert reports == 2 * [
        ["two_d2_s1", "--out", str(folder / "stdlib")],
        ["two_lora_s1", "--out", str(folder / "wiki")],
    ]
    assert evals == [["--model-tag", "two_d2_s1", "--all-monotone", "3", "--out", str(folder / "maps")]]


def test_a_run_of_another_text_or_flags_is_refused(write, base_dir, corpus_dir, tmp_path):
    path = write(LORA + "data = 'mine'\n", seeds=[1])
    sweep = read_experiment(path, data=str(corpus_dir), texts={"mine": str(corpus_dir)})
    finish("two_lora_s1")
    derived = {
        "tokenizer_hash": sweeps.load_tokenizer().hash,
        "corpus": {
            f"{split}_fingerprint": sweeps.open_corpus(str(corpus_dir)).fingerprint(split)
            for split in ("train", "val")
        },
    }
    # as adapter_train fills them in
    flags = vars(sweep.points[1].args) | {
        "depth": 2,
        "attn_rank": 0,
        "step": 6,
    }
    record = metrics.runs_dir() / "two_lora_s1" / "config.json"
    record.write_text(json.dumps({"flags": flags, "derived": derived}))
    sweeps.prepare(sweep)
    record.write_text(
        json.dumps({"flags": {**flags, "rank": 64}, "derived": {**derived, "tokenizer_hash": "other"}})
    )
    with pytest.raises(
        InputError,
        match=r"two_lora_s1: .* is another run: rank \(64 there, 8 now\); tokenizer_hash \('other' there",
    ):
        sweeps.prepare(sweep)


@pytest.mark.parametrize(
    "name, preset, runs, later",
    [
        ("virtual_layers", "small", 19, 16),
        ("virtual_layers", "full", 54, 48),
        ("adapters", "small", 15, 14),
        ("adapters", "full", 34, 33),
        ("depth_for_free", "small", 12, 0),
        ("five_parameters", "small", 20, 0),
        ("intrinsic_dimension", "small", 15, 0),
        ("loss_versus_bits", "small", 15, 4),
    ],
)
def test_the_published_experiments_are_well_formed(name, preset, runs, later, monkeypatch):
    monkeypatch.delitem(sys.modules, "scripts.adapter_train")
    sweep = read_experiment(Path(__file__).parents[2] / "dev" / "experiments" / f"{name}.toml", preset)
    tags = [p.tag for p in sweep.points]
    assert (
        len(set(tags)) == len(tags) == runs
        and sum(bool(p.base) for p in sweep.points) == later
        and sweep.question
        and sweep.cost
    )
    assert all(not p.base or p.base in tags[: tags.index(p.tag)] for p in sweep.points if preset == "small")
    if name == "depth_for_free":
        size = {p.label: count_parameters(p.config) for p in sweep.points}
        # a tied position has two scalars of its own
        assert all(0.98 < n / size["full"] < 1.0001 for n in size.values())
        assert {p.label: len(p.config.positions) for p in sweep.points} == {
            "full": 4,
            "low-rank": 8,
            "tied": 8,
            "low-rank-tied": 16,
        }


def test_the_display_of_a_run_that_was_only_evaluated_so_far():
    line = display.run_line(
        SimpleNamespace(tag="a", plan={"num_iterations": 9}),
        {"step": 0, "total_training_time": 0.0, "val/ppl": 7.0},
    )
    assert line == "  a  starting"
