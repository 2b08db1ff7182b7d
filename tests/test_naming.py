"""What can name a run, everywhere a run is named; and what is said of one that is not there."""

import json
from types import SimpleNamespace

import pytest
from conftest import tiny_experiment

from nanochat import metrics
from nanochat.adapters.loading import load_bases
from nanochat.common import get_base_dir
from nanochat.errors import InputError
from nanochat.naming import is_tag, lock_path, option, run_folder
from nanochat.report.wandb_import import run_name
from nanochat.sweep.experiment import read_experiment
from scripts import (
    adapter_train,
    base_eval,
    base_train,
    generate,
    infer_bench,
    layer_map_eval,
    materialize,
    sweep,
)

NO_TAGS = [
    "../up",
    "/tmp/x",
    "a/b",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a\nb",
    "a\0b",
    "a\tb",
    " a",
    "a ",
    "a:1",
    "a\\b",
    "a*",
    "$HOME",
    "~",
    "x" * 151,
    "é" * 76,
    "\udcff",
]
TAGS = [
    "d20",
    "d4_w256_attn0.25-0.5_map0-0-1-1",
    "d2_Fastfood-5-in-all",
    "stories (2)_v300",
    "Märchen_d4",
    "物語",
    "a=1,b+2@x",
    "_x",
    "x" * 150,
    "1..2",
]
TAKERS = [
    (base_train, "--model-tag"),
    (base_train, "--init-from"),
    (base_eval, "--model-tag"),
    (generate, "--model-tag"),
    (infer_bench, "--model-tag"),
    (layer_map_eval, "--model-tag"),
    (layer_map_eval, "--second-tag"),
    (materialize, "--model-tag"),
    (materialize, "--out-tag"),
    (adapter_train, "--model-tag"),
    (adapter_train, "--run-tag"),
    (adapter_train, "--second-tag"),
]


def test_what_can_be_a_tag():
    assert [text for text in NO_TAGS if is_tag(text)] == [] == [text for text in TAGS if not is_tag(text)]


@pytest.mark.parametrize("script, flag", TAKERS, ids=[f"{script.__name__} {flag}" for script, flag in TAKERS])
def test_a_tag_that_leads_elsewhere_is_refused_before_anything_is_touched(base_dir, script, flag):
    needed = {
        adapter_train: ["--model-tag", "a", "--run-tag", "b"],
        materialize: ["--model-tag", "a"],
        layer_map_eval: ["--model-tag", "a", "--maps", "0"],
    }
    there = set(base_dir.rglob("*"))
    for text in NO_TAGS:
        if flag == "--init-from" and text == "a:1":
            continue  # TAG:STEP
        with pytest.raises(
            InputError, match=f"{flag}.*becomes the name of a folder; use letters, digits"
        ) as e:
            script.main([*needed.get(script, []), f"{flag}={text}"])
        assert "\n" not in str(e.value)
    assert set(base_dir.rglob("*")) == there


def test_a_run_that_is_not_there(base_dir):
    with pytest.raises(InputError, match="--model-tag full: no such run in .*runs; it holds no runs"):
        run_folder("--model-tag", "full")
    for tag in ("d4_full", "d4_low", "other"):
        (metrics.runs_dir() / tag).mkdir(parents=True)
        (metrics.runs_dir() / tag / "config.json").write_text("{}")
    assert run_folder("--model-tag", "other") == metrics.runs_dir() / "other"
    for script, argv, message in [
        (
            base_eval,
            ["--model-tag", "d4-full"],
            "--model-tag d4-full: no such run in .*runs; did you mean d4_full",
        ),
        (generate, ["--model-tag", "xyz", "-p", "a"], "no such run in .*; there are: d4_full, d4_low, other"),
        (
            base_train,
            ["--init-from", "d4_ful"],
            "--init-from d4_ful: no such run in .*; did you mean d4_full",
        ),
        (base_train, ["--init-from", "d4_full"], "--init-from d4_full: the run d4_full has no checkpoint"),
        (
            base_train,
            ["--budget-params", "d4_lowe", "--solve", "rank", "--dry-run"],
            "--budget-params d4_lowe: neither .*; did you mean d4_low",
        ),
        (
            base_train,
            ["--budget-params", "../runs/d4_low", "--solve", "rank", "--dry-run"],
            "--budget-params ../runs/d4_low: neither",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            script.main(argv)


def test_a_default_tag_that_is_too_long_asks_for_one(train):
    with pytest.raises(InputError, match="--model-tag is missing, and 'd2_w32_map0-0.*at most 150 bytes"):
        train("--layer-map", ",".join(["0"] * 80 + ["1"]), "--model-tag", "")


def test_names_of_the_dashboard(train, tmp_path):
    for name in ("", "  ", "a\nb", "x" * 129):
        with pytest.raises(
            InputError, match="argument --run: .*give W&B a name of 1 to 128 printable characters"
        ):
            train("--run", name)
        with pytest.raises(InputError, match="argument --run: "):
            sweep.main([str(tmp_path / "e.toml"), "--run", name])


def test_points_of_an_experiment_are_named_by_the_same_rule(tmp_path, corpus_dir):
    def read(name):
        return read_experiment(
            tiny_experiment(tmp_path / "e.toml", f"[points.'{name}']\nattn-rank = 4\n", [1], corpus_dir)
        )

    assert {point.tag for point in read("Märchen (2)").points} == {"e_full_s1", "e_Märchen (2)_s1"}
    for name in ("a/b", "..", "-x", "a:b", "x" * 151):
        with pytest.raises(InputError, match="points '.*: becomes the name of a folder"):
            read(name)
    with pytest.raises(InputError, match="point x*: this name is too long"):
        read("x" * 149)


# ---- names in files ----------------------------------------------------------------------------------------

NO_NAMES = [text for text in NO_TAGS if text != "\udcff"] + ["a\ntouch pwned", "\x1b[31m", ""]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_preset_that_is_no_name_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "e.toml"
    path.write_text(f"[preset.{json.dumps(name)}]\nseeds = [1]\n")
    with pytest.raises(InputError, match="e.toml: preset .*: becomes the name of a folder; use letters") as e:
        read_experiment(path, name)
    assert str(e.value).isprintable()


def test_a_sweep_that_its_file_gives_no_name_is_refused(tmp_path, corpus_dir):
    for name in ("-x.toml", ".hidden.toml", "ä.toml", "x" * 152 + ".toml"):
        path = tiny_experiment(tmp_path / name, "", [1], corpus_dir)
        message = "named by its file and preset, '.*': becomes the name of a folder"
        with pytest.raises(InputError, match=message):
            read_experiment(path)
    path = tiny_experiment(tmp_path / "a\n$(b) \x1b.toml", "", [1], corpus_dir)
    assert read_experiment(path).name == "a-b-"
    path.write_text(f'question = "red \\u001b[31m\\n!"\n{path.read_text()}')
    assert read_experiment(path).question == r"red \x1b[31m !"
    path.write_text('"bad\\u001b\\n" = 3\n')
    with pytest.raises(InputError) as e:
        read_experiment(path)
    assert str(e.value).isprintable()


def test_the_reports_of_several_texts_are_parts_of_the_reports_folder():
    texts = (
        ("/home/me/wiki", "/home/me/wiki"),
        ("../../up", "/home/up"),
        ("a/b", "/x/b"),
        ("b", "/y/b"),
        ("/", "/"),
    )
    folders = sweep.text_folders(SimpleNamespace(data="/z/wiki", texts=texts))
    assert list(folders.values()) == ["wiki", "wiki-2", "up", "b", "b-2", "text"]


def test_a_base_that_meta_json_names_is_a_run_beside_this_one(tmp_path):
    for tag in ("../elsewhere", "/tmp/x", "a\nb", "", None, 3, ["a"]):
        with pytest.raises(InputError, match="the base that meta.json names: .*becomes the name of a folder"):
            load_bases(tmp_path, [{"tag": tag, "step": 1, "sha256": ""}])


def test_a_name_that_wandb_sends_cannot_command_a_terminal():
    def name(tag, model_tag, shown):
        config = {"tag": tag, "flags": {"model_tag": model_tag}}
        return run_name(SimpleNamespace(config=config, name=shown, id="i1"))

    assert name("d4", "d5", "x") == "d4" and name({"a": 1}, "d5", "x") == "d5"
    assert name("../up", None, "my run!") == "my run!" and name("", "", "") == "i1"
    assert name(None, None, "\x1b]0;x\x07" + "y" * 200) == r"\x1b]0;x\x07" + "y" * 116


# ---- names that are shown, or go into commands -------------------------------------------------------------


def test_an_error_is_one_line_that_commands_no_terminal():
    assert str(InputError("a\nb\x1b[2J\u202e \udcff\x85é")) == r"a b\x1b[2J\u202e \udcff é"


def test_a_base_directory_has_a_name_that_can_be_shown(monkeypatch):
    for name in ("a\nb", "\x1b[31m", "x\udcff", "a\x85"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", f"/tmp/{name}")
        with pytest.raises(InputError, match="NANOCHAT_BASE_DIR=/tmp/.*give another folder"):
            get_base_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "-x $(y) 'z' é")
    assert str(get_base_dir()) == "-x $(y) 'z' é"


def test_no_other_lock_has_the_name_of_a_runs(base_dir):
    runs = {lock_path(tag).name for tag in ("a", "a.sweep", "sweep.a", "tokenizer")}
    assert runs == {"a.lock", "a.sweep.lock", "sweep.a.lock", "tokenizer.lock"}
    others = {lock_path(*what).name for what in (("a", "sweep"), ("tokenizer", "all"), ("GPU-0/../1", "gpu"))}
    assert others == {".sweep.a.lock", ".all.tokenizer.lock", ".gpu.GPU-0-..-1.lock"}


def test_a_value_that_looks_like_a_flag_is_a_value():
    for value in ("-x", "--dry-run", "-1", "-0.5", "x", "-1e-3"):
        words = option("--run", value)
        assert sweep.build_parser().parse_args(["e.toml", *words]).run == value
