"""A sweep as a W&B sweep: every point once, commands as W&B's own agent makes them, names of its runs."""

import json
import shlex

import pytest
from conftest import tiny_experiment
from processes import Launched
from wandb_server import serving

from nanochat import metrics
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.sweep import wandb_agent
from scripts import sweep

EXPERIMENT = """
question = "Does rank matter?"
[flags]
vocab-size = 300
depth = 2
model-dim = 32
head-dim = 16
max-seq-len = 32
device-batch-size = 4
total-batch-size = 256
num-iterations = 3
eval-tokens = 1024
sample-every = -1
[points.full]
[points.low]
attn-rank = [2, 4]
tie-embeddings = true
[preset.small]
seeds = [1, 2]
[preset.small.grid]
matrix-lr = [0.02, 0.04]
"""


@pytest.fixture
def register(tmp_path, monkeypatch, corpus_dir):
    """register('--flag', …) -> (the sweep, the configuration in the file that W&B would read)."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "question.toml").write_text(EXPERIMENT)

    def run(*flags):
        args = sweep.build_parser().parse_args(
            [str(tmp_path / "question.toml"), "--preset", "small", "--data", str(corpus_dir), *flags]
        )
        from wandb.sdk.launch.sweeps.utils import load_sweep_config  # slow to import

        wandb_agent.register(sweep.load(args), args)
        path = tmp_path / "base" / "sweeps" / "question-small" / "wandb_sweep.yaml"
        return sweep.load(args), load_sweep_config(path)

    return run


def agent_commands(config) -> list[list[str]]:
    """What W&B's agent would start for each value of a grid of one parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    ((name, parameter),) = config["parameters"].items()
    commands = []
    for value in parameter["values"]:
        replacements = create_sweep_command_args({"args": {name: {"value": value}}})
        replacements |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
        command = []
        for word in create_sweep_command(list(config["command"])):
            command += replacements[word[2:-1]] if word.startswith("${") else [word]
        commands.append(command)
    return commands


def test_agents_run_every_point_exactly_once_with_flags_that_base_train_takes(register, capsys):
    planned, config = register("--run", "try")
    assert config["method"] == "grid" and config["name"] == "question-small"
    assert config["description"].startswith("Does rank matter?\n")
    flags = set()
    tags = []
    for command in agent_commands(config):
        assert command[:4] == ["/usr/bin/env", "python", "-m", "scripts.sweep"]
        args = sweep.build_parser().parse_args(command[4:])
        assert args.run == "try"
        point = sweep.load(args).point(args.task)
        given = build_parser().parse_args(list(point.argv))
        tags.append(given.model_tag)
        flags.add((given.attn_rank, given.tie_embeddings, given.matrix_lr, given.seed))
        assert f"{point.tag}: {' '.join(point.varying)}" in config["description"]
    assert len(tags) == len(set(tags)) == len(planned.points)
    # both ranks, tied, and two baselines (tied and not), at two learning rates and two seeds
    assert flags == {
        (rank, tied, lr, seed)
        for rank, tied in ((0, False), (0, True), (2, True), (4, True))
        for lr in (0.02, 0.04)
        for seed in (1, 2)
    }
    assert "16 runs" in capsys.readouterr().out


def finish(point):
    point.folder.mkdir(parents=True)
    (point.folder / "config.json").write_text(json.dumps({"flags": vars(point.args)}))
    (point.folder / "summary.json").write_text('{"status": "finished"}')


def test_finished_runs_are_left_out(register, capsys):
    planned, _ = register()
    for point in planned.points[1:]:
        finish(point)
    _, config = register()
    assert config["parameters"]["task"]["values"] == [planned.points[0].tag]
    # not 'dummy': agents report to W&B
    assert config["command"][config["command"].index("--run") + 1] == "question-small"
    finish(planned.points[0])
    register()
    assert capsys.readouterr().out.endswith("all 16 runs are finished, nothing to register\n")


def test_online_the_configuration_goes_to_wandb_and_a_refusal_is_one_line(register, monkeypatch, capsys):
    import wandb

    sent = []
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setattr(wandb, "sweep", lambda config, project: sent.append((config, project)) or "abc123")
    _, config = register()
    assert sent == [(config, "ours")] and "wandb agent --project ours abc123" in capsys.readouterr().out

    def refuse(config, project):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "sweep", refuse)
    message = "^--launcher wandb: No API key configured. Use `wandb login`; [^\n]*wandb_sweep.yaml later"
    with pytest.raises(InputError, match=message):
        register()


def test_words_that_an_agent_or_a_shell_would_change(register, tmp_path, monkeypatch, capsys):
    from wandb.sdk.launch.sweeps.utils import load_sweep_config  # slow to import

    folder = tmp_path / "a $(b) 'c' 😀"
    folder.mkdir()
    monkeypatch.setenv("WANDB_PROJECT", "our project; $(b)")
    path = tmp_path / "question.toml"
    args = sweep.build_parser().parse_args([str(path), "--preset", "small", "--data", str(folder)])
    planned = sweep.load(args)
    wandb_agent.register(planned, args)
    config = load_sweep_config(planned.folder / "wandb_sweep.yaml")
    assert config["command"][config["command"].index("--data") + 1] == str(folder)
    command = capsys.readouterr().out.splitlines()[1].split("#")[0]
    words = ["wandb", "sweep", "--project", "our project; $(b)", f"{planned.folder}/wandb_sweep.yaml"]
    assert shlex.split(command) == words
    for name in ("${args}", "${envvar:HOME}", "a\x1b"):
        (tmp_path / name).mkdir()
        flags = ["--preset", "small", "--data", str(tmp_path / name), "--launcher", "wandb"]
        with pytest.raises(InputError, match=r"--launcher wandb: .*agents do not take \$\{") as e:
            sweep.main([str(path), *flags])
        assert str(e.value).isprintable()


@pytest.mark.parametrize("answer", ["a b", "$(x)", "-x\n", "\x1b"])
def test_what_wandb_calls_a_sweep_is_checked(register, monkeypatch, answer):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "sweep", lambda config, project: answer)
    with pytest.raises(InputError, match="W&B calls the sweep .*, which is no name of one"):
        register()


def test_an_agents_run_is_the_one_it_asked_for_with_its_names(register, base_dir, tmp_path, monkeypatch):
    _, config = register("--run", "try")
    command = next(c for c in agent_commands(config) if "attn4_lr0.02_s2" in c[-1])
    for name in ("WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        given = {"SWEEP_ID": "abc123", "RUN_ID": "run42", "BASE_URL": server.url, "API_KEY": "0" * 40}
        for name, value in given.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        agent = Launched(1, tmp_path / "output", sweep.main, command[4:])
        assert agent.codes() == [0], agent.output.read_text()
        (run,) = server.runs.values()
        assert list(server.runs) == ["run42"], "the run that the agent asked for"
    tag = command[-1].removeprefix("--task=")
    assert metrics.load_run(metrics.runs_dir() / tag).summary["status"] == run["state"] == "finished"
    assert run["group"] == "question-small"
    assert run["displayName"] == f"try-{tag.removeprefix('question-small_')}"
    assert {"attn-rank=4", "matrix-lr=0.02", "tie-embeddings"} <= set(run["tags"])
    assert "baseline" not in run["tags"]
    assert (metrics.runs_dir() / tag / "wandb_id.txt").read_text() == "run42\n"


def test_a_baseline_is_logged_too_and_the_report_names_what_is_missing(
    base_dir, corpus_dir, tmp_path, monkeypatch, capsys
):
    """Of a baseline nothing varies, so that it has no tag of that kind."""
    path = tiny_experiment(tmp_path / "tiny.toml", "[points.low]\nattn-rank = 4\n", [1], corpus_dir)
    for name in ("MODE", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # what the task sets is taken back after the test
    with serving() as server:
        given = {"BASE_URL": server.url, "API_KEY": "0" * 40, "TAGS": f"mine,{'long ' * 20}"}
        for name, value in given.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        full = sweep.load(sweep.build_parser().parse_args([str(path)])).points[0]
        assert full.varying == () and full.tag == "tiny_full_s1"
        sweep.main([str(path), "--task", full.tag, "--run", "mine"])
        (run,) = server.runs.values()
    assert run["state"] == "finished" and run["group"] == "tiny"
    assert run["tags"] == ["mine", ("long " * 20)[:64].strip(), "baseline"]
    log = tmp_path / "base" / "sweeps" / "tiny" / "logs" / "tiny_low_s1.log"
    log.parent.mkdir(parents=True)
    log.write_text("CUDA error: out of memory\n")
    with pytest.raises(SystemExit) as end:
        sweep.main([str(path), "--report"])
    told = capsys.readouterr().out
    assert end.value.code == 1 and "1 of 2 runs did not finish" in told
    assert f"tiny_low_s1: has not begun, {log}\n    CUDA error: out of memory\n" in told
    report = tmp_path / "base" / "sweeps" / "tiny" / "report"
    assert "out of memory" in (report / "unfinished.txt").read_text() and (report / "report.html").exists()
