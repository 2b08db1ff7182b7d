"""Runs that an earlier version began, with fewer flags and other defaults. And text that was moved."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import TINY, Killed, losses, tiny_experiment

from nanochat import metrics, plan
from nanochat.budget import choose_model
from nanochat.checkpoint_manager import saved_steps, step_folder
from nanochat.continuation import FREE, PLACES, differences
from nanochat.errors import InputError
from nanochat.flags import OLD_DEFAULTS, build_parser
from nanochat.gpt import GPTConfig
from nanochat.plan import training_plan
from nanochat.report.configurations import settings
from scripts import adapter_train, base_eval, base_train, layer_map_eval, materialize
from scripts import sweep as sweeps

# as commit 983a6dc wrote it
OF_THEN = json.loads((Path(__file__).parent / "data/record_983a6dc.json").read_text())
MODEL_OF_THEN = OF_THEN["derived"]["model"]
GO_ON = ("--save-every", 2, "--resume", "auto")
ADAPTER = [
    *("--device-batch-size", "4", "--total-batch-size", "256"),
    *("--eval-tokens", "512", "--sample-every", "-1"),
]


def run_of(tag) -> metrics.Run:
    return metrics.load_run(metrics.runs_dir() / tag)


def rewrite(path, change):
    """Change a JSON file by change(content)."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_record(tag, change):
    rewrite(metrics.runs_dir() / tag / "config.json", change)


def keep(values: dict, names):
    for name in values.keys() - names:
        del values[name]


def as_of_then(tag, flags=None):
    """Leave in the record and the checkpoints of a run only what commit 983a6dc wrote there.

    flags: names of the flags to leave, if not those of base_train.
    """

    def shorten(record):
        record.pop("given")
        keep(record["flags"], flags or OF_THEN["flags"].keys())
        keep(record["derived"]["model"], MODEL_OF_THEN)
        keep(record["derived"]["corpus"], OF_THEN["derived"]["corpus"])

    rewrite_record(tag, shorten)
    folder = metrics.runs_dir() / tag
    for step in saved_steps(folder):
        meta = step_folder(folder, step) / "meta.json"
        rewrite(meta, shorten_meta)


def shorten_meta(meta):
    keep(meta, meta.keys() - {"format", "meta_sha256", "last", "summary", "record", "bad_steps_in_a_row"})
    keep(meta.get("model", {}), MODEL_OF_THEN)


@pytest.fixture
def interrupted(train, kill_after):
    """interrupted('--flag', value, …, tag=…): a run that was killed after step 4, with its checkpoint."""

    def run(*flags, tag="begun"):
        kill_after(4)
        with pytest.raises(Killed):
            train("--save-every", 2, *flags, tag=tag)
        kill_after(None)
        assert saved_steps(metrics.runs_dir() / tag)[-1] == 4

    return run


@pytest.fixture
def narrow_before(monkeypatch):
    """As if the program of then, which had no flag --mlp-ratio, had made MLPs of twice the width."""
    monkeypatch.setitem(OLD_DEFAULTS, "mlp_ratio", 2.0)


# ---- flags that came later, and other defaults -------------------------------------------------------------


def test_every_later_flag_has_a_value_with_which_the_flags_of_then_mean_what_they_meant():
    args = build_parser().parse_args([])
    later = vars(args).keys() - OF_THEN["flags"].keys()
    assert not later - OLD_DEFAULTS.keys() - FREE - PLACES, "a Flag that came later needs `old_default`"
    vars(args).update({**OLD_DEFAULTS, **OF_THEN["flags"]})
    config = choose_model(args, 300)
    assert json.dumps(asdict(config)) == json.dumps(asdict(GPTConfig(**MODEL_OF_THEN)))
    training = training_plan(args, config, 1)
    for name in ("num_iterations", "total_batch_size", "grad_accum_steps", "tokens", "matrix_lr"):
        assert training[name] == OF_THEN["derived"][name], name
    assert settings(metrics.Run("old", OF_THEN, {}, []), OLD_DEFAULTS)["mlp_ratio"] == 4.0


def test_what_a_record_lacks_does_not_make_it_another_run_and_what_it_says_does():
    flags = {**OF_THEN["flags"], "mlp_ratio": 4.0}
    derived = {**OF_THEN["derived"], "new_value": 1, "model": {**MODEL_OF_THEN, "mlp_ratio": 4.0}}
    assert differences(OF_THEN, flags, derived) == []
    other = differences(OF_THEN, {**flags, "mlp_ratio": 3.0, "seed": 1}, {**derived, "tokens": 5})
    assert [text.split()[0] for text in other] == ["flags.mlp_ratio", "flags.seed", "derived.tokens"]


def test_a_run_begun_with_fewer_flags_goes_on_to_the_bit_and_is_skipped_once_finished(
    train, interrupted, capsys
):
    straight = train("--attn-rank", 0.25, tag="straight")
    interrupted("--attn-rank", 0.25)
    as_of_then("begun")
    assert losses(train("--attn-rank", 0.25, *GO_ON, tag="begun")) == losses(straight)
    as_of_then("straight")
    capsys.readouterr()
    train("--attn-rank", 0.25, tag="straight")
    assert "straight: already finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"another config: flags.mlp_ratio \(4.0 there, 3.0 now\)"):
        train("--attn-rank", 0.25, "--mlp-ratio", 3, tag="straight")
    base_eval.main(["--model-tag", "straight", "--eval-tokens", "1024"])
    assert f"ppl {straight.summary['val/ppl']:.3f}" in capsys.readouterr().out


def test_a_run_keeps_the_default_that_it_began_with_and_another_value_is_refused(
    train, interrupted, capsys, narrow_before
):
    straight = train("--mlp-ratio", 2, tag="straight")
    interrupted("--mlp-ratio", 2)
    as_of_then("begun")
    with pytest.raises(InputError, match=r"--model-tag begun: .*flags.mlp_ratio \(2.0 there, 4.0 now\)"):
        train("--mlp-ratio", 4, tag="begun")
    capsys.readouterr()
    run = train(*GO_ON, tag="begun")
    assert "begun: as it began, with --mlp-ratio 2.0" in capsys.readouterr().out
    assert losses(run) == losses(straight) and run.config["derived"]["model"]["mlp_ratio"] == 2.0
    train("--save-every", 2, tag="begun")  # and again, after today's program has written the record anew
    assert "begun: already finished" in capsys.readouterr().out
    assert train(tag="new").config["flags"]["mlp_ratio"] == 4.0


def test_a_run_that_named_itself_is_known_by_the_name_of_then(
    train, interrupted, corpus_dir, capsys, narrow_before
):
    tag = "d2_w32_ratio2"
    command = [*TINY, "--data", str(corpus_dir)]
    interrupted("--mlp-ratio", 2, tag=tag)
    as_of_then(tag)
    rewrite_record(tag, lambda record: record["flags"].update(model_tag=""))
    base_train.main([*command, *map(str, GO_ON)])
    assert run_of(tag).summary["status"] == "finished" and not (metrics.runs_dir() / "d2_w32").exists()
    train("--mlp-ratio", 2, tag=tag)
    assert f"{tag}: already finished" in capsys.readouterr().out, "under the tag's flag too"
    rewrite_record(tag, lambda record: record.update(given=["mlp_ratio"]))
    base_train.main(command)  # that one was given its ratio: another run
    assert run_of("d2_w32").config["flags"]["mlp_ratio"] == 4.0


def test_a_default_that_changes_later_changes_no_run_that_was_begun(train, interrupted, monkeypatch):
    straight = train(tag="straight")
    interrupted()
    assert {"depth", "data", "num_iterations"} <= set(run_of("begun").config["given"])

    def tomorrow():
        parser = build_parser()
        parser.set_defaults(warmdown_ratio=0.25, depth=7)
        return parser

    monkeypatch.setattr(plan, "build_parser", tomorrow)
    with pytest.raises(InputError, match=r"warmdown_ratio \(0.5 there, 0.25 now\)"):
        train(*GO_ON, "--warmdown-ratio", 0.25, tag="begun")
    assert losses(train(*GO_ON, tag="begun")) == losses(straight)
    assert losses(train(tag="new")) != losses(straight)


def test_adapter_runs_of_then_go_on_too(train, kill_after, capsys):
    train(tag="base")
    as_of_then("base")
    command = ["--model-tag", "base", *ADAPTER, "--num-iterations", "6", "--save-every", "2"]
    adapter_train.main([*command, "--run-tag", "straight"])
    kill_after(4)
    with pytest.raises(Killed):
        adapter_train.main([*command, "--run-tag", "begun"])
    kill_after(None)
    as_of_then("begun", run_of("begun").config["flags"].keys() - {"mlp_ratio"})
    adapter_train.main([*command, "--run-tag", "begun", "--resume", "auto"])
    begun = run_of("begun").history
    straight = run_of("straight").history
    assert [entry.get("train/loss") for entry in begun] == [entry.get("train/loss") for entry in straight]
    capsys.readouterr()
    adapter_train.main([*command, "--run-tag", "begun"])
    assert "begun: already finished" in capsys.readouterr().out


def test_a_sweep_begun_then_goes_on_as_a_whole(
    base_dir, corpus_dir, tmp_path, kill_after, narrow_before, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    points = "[points.a]\n[points.b]\nseeds = [2]\ngrad-clip = 1.0\n"
    file = tiny_experiment(tmp_path / "q.toml", points, [1], str(corpus_dir))
    kill_after(4)
    with pytest.raises(Killed):
        base_train.main([*sweeps.read_experiment(file).point("q_a_s1").argv, "--mlp-ratio", "2"])
    kill_after(None)
    as_of_then("q_a_s1")
    shutil.copytree(corpus_dir, tmp_path / "moved")
    command = [str(file), "--data", str(tmp_path / "moved")]

    def prepare():
        sweeps.prepare(sweeps.load(sweeps.build_parser().parse_args(command)))

    for tag in ("q_a_s1", "q_b_s2", "q_a_s1"):
        prepare()
        sweeps.main([*command, "--task", tag])
        run = run_of(tag)
        assert run.summary["status"] == "finished"
        assert run.config["derived"]["model"]["mlp_ratio"] == 2.0, "a new run beside one of then is like it"
    prepare()
    out = capsys.readouterr().out
    assert "q: as it began, with --mlp-ratio 2.0" in out and "q_a_s1: already finished" in out
    rewrite_record("q_a_s1", lambda record: record["derived"]["corpus"].update(val_fingerprint="0000"))
    with pytest.raises(InputError, match=r"q_a_s1: .* is another run: corpus.val_fingerprint \('0000' there"):
        prepare()


# ---- text is its content -----------------------------------------------------------------------------------


def test_the_same_text_elsewhere_is_the_same_run(
    base_dir, corpus_dir, tmp_path, kill_after, monkeypatch, capsys
):
    home = tmp_path / "home"
    shutil.copytree(corpus_dir, home / "text")
    monkeypatch.chdir(home)
    base_train.main([*TINY, "--data", "text", "--model-tag", "straight"])
    kill_after(3)
    with pytest.raises(Killed):
        base_train.main([*TINY, "--data", "text", "--model-tag", "begun", "--save-every", "1"])
    kill_after(None)
    run = run_of("straight")
    assert run.config["flags"]["data"] == "text"
    assert run.config["derived"]["corpus"]["path"] == str(home / "text")
    monkeypatch.chdir(tmp_path)
    (home / "text").rename(tmp_path / "renamed")
    os.symlink(tmp_path / "renamed", tmp_path / "link")
    base_train.main([*TINY, "--data", "link", "--model-tag", "begun", *map(str, GO_ON)])
    assert losses(run_of("begun")) == losses(run)
    capsys.readouterr()
    base_train.main([*TINY, "--data", f"{tmp_path}/../{tmp_path.name}/renamed", "--model-tag", "straight"])
    assert "straight: already finished" in capsys.readouterr().out
    (tmp_path / "link/val.jsonl").write_text('{"text": "another text"}\n' * 200)
    with pytest.raises(InputError, match=r"flags.data \('link' there, 'renamed' now\); derived.corpus.val_"):
        base_train.main([*TINY, "--data", "renamed", "--model-tag", "begun"])


def test_scripts_that_read_the_text_of_a_run_ask_for_it_where_it_is_gone(
    train, corpus_dir, tmp_path, monkeypatch, capsys
):
    text = tmp_path / "text"
    moved = tmp_path / "moved"
    shutil.copytree(corpus_dir, text)
    monkeypatch.chdir(tmp_path)
    train("--attn-rank", 4, "--data", "text", tag="a")
    monkeypatch.chdir("/")
    evaluation = ["--model-tag", "a", "--eval-tokens"]
    base_eval.main([*evaluation, "512"])  # where the run read it, from another folder
    text.rename(moved)
    result = json.loads((metrics.runs_dir() / "a/eval_000006.json").read_text())
    assert result["data"] == str(text) and result["text_of_the_run"]
    commands = [
        (base_eval, ["--eval-tokens", "1024"]),
        (materialize, ["--out-tag", "dense"]),
        (layer_map_eval, ["--maps", "0,1,1"]),
        (adapter_train, ["--run-tag", "b", *ADAPTER, "--num-iterations", "1"]),
    ]
    for script, flags in commands:
        with pytest.raises(InputError, match=f"^--data: needed, .* of the run a is no longer in {text}"):
            script.main(["--model-tag", "a", *flags])
        capsys.readouterr()
        script.main(["--model-tag", "a", *flags, "--data", str(moved)])
        assert "note:" not in capsys.readouterr().out
    assert run_of("dense").summary["status"] == "finished"
    monkeypatch.setattr(base_eval, "evaluate", lambda *_: pytest.fail("evaluated again"))
    base_eval.main([*evaluation, "1024"])
    base_eval.main([*evaluation, "1024", "--data", str(moved)])


def test_an_evaluation_on_other_text_says_so_and_is_not_taken_for_that_of_the_run(
    train, corpus_dir, tmp_path, capsys
):
    train("--attn-rank", 4, tag="a")
    other = tmp_path / "other"
    result = metrics.runs_dir() / "a/eval_000006.json"
    shutil.copytree(corpus_dir, other)
    (other / "val.jsonl").write_text((corpus_dir / "part1.jsonl").read_text())
    command = ["--model-tag", "a", "--eval-tokens", "512"]
    base_eval.main([*command, "--data", str(other)])
    note = f"note: the validation text in {other} is other text than that of the run a: its perplexity"
    assert note in capsys.readouterr().out
    stored = json.loads(result.read_text())
    assert stored["data"] == str(other) and not stored["text_of_the_run"]
    base_eval.main(command)
    assert "note:" not in capsys.readouterr().out and json.loads(result.read_text())["text_of_the_run"]
    with pytest.raises(InputError, match=f"--data {other}: the validation text is no longer the one of the"):
        materialize.main(["--model-tag", "a", "--out-tag", "dense", "--data", str(other)])
