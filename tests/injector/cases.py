"""Cases: a script, with a fault at one of its file operations, then the same command again without one."""
import errno
import json
import random
import re
import shutil
import sys
import threading
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

from . import outcome
from .library import HERE, Server, build

LIMIT = 60  # seconds until a run counts as hung
CHANGES = "open_write,write,fsync,rename,link,unlink,rmdir,mkdir,truncate"
READS = "open_read,read,map,opendir,readdir"
KINDS = {"changes": CHANGES, "reads": READS, "files": f"{CHANGES},{READS}",
         "all": f"{CHANGES},{READS},chmod,close_write,stat"}
WORDS = "the a cat dog bird sees finds likes red blue small big tree house and then it ran away home again".split()
TINY = ["--depth", "2", "--model-dim", "32", "--head-dim", "16", "--max-seq-len", "32", "--device-batch-size", "4",
        "--total-batch-size", "256", "--num-iterations", "3", "--eval-every", "1", "--eval-tokens", "512",
        "--sample-every", "-1", "--save-every", "1", "--ppl-thresholds", "100,20,12", "--run", "dummy"]


@dataclass(frozen=True)
class Scenario:
    """A command on a base folder. before: the scenario whose end it begins with; cut: how many times that one's
    run is to be stopped early (see World.template).
    """
    module: str
    flags: tuple
    again: tuple = ()     # flags of the command that comes after the fault; (): the same
    before: str = ""
    launched: bool = True  # whether torchrun may start it
    environment: tuple = ()  # (name, value) pairs


EARLY = ("--num-iterations", "6", "--stop-at-ppl", "12")
TRAIN = (*TINY, "--data", "{corpus}", "--model-tag", "tiny")
ADAPT = ("--model-tag", "tiny", "--run-tag", "adapted", "--rank", "4", "--device-batch-size", "4",
         "--total-batch-size", "256", "--num-iterations", "3", "--eval-every", "1", "--eval-tokens", "512",
         "--sample-every", "-1", "--save-every", "1", "--run", "dummy")
SCENARIOS = {
    "tok_train": Scenario("scripts.tok_train", ("--data", "{corpus}", "--vocab-size", "300"), launched=False),
    "train": Scenario("scripts.base_train", TRAIN, (*TRAIN, "--resume", "auto"), "tok_train"),   # cold token cache
    "lowrank": Scenario("scripts.base_train", (*TRAIN, "--attn-rank", "4", "--mlp-rank", "8"),
                        (*TRAIN, "--attn-rank", "4", "--mlp-rank", "8", "--resume", "auto"), "tok_train"),
    "early": Scenario("scripts.base_train", (*TRAIN, *EARLY), (*TRAIN, *EARLY, "--resume", "auto"), "tok_train"),
    "stopped": Scenario("scripts.base_train", TRAIN, before="tok_train"),                         # killed in step 3
    "resume": Scenario("scripts.base_train", (*TRAIN, "--resume", "auto"), before="stopped"),
    "finished": Scenario("scripts.base_train", (*TRAIN, "--resume", "auto"), before="train"),
    "adapter": Scenario("scripts.adapter_train", ADAPT, (*ADAPT, "--resume", "auto"), "train"),
    "base_eval": Scenario("scripts.base_eval", ("--model-tag", "tiny", "--eval-tokens", "512"), before="train"),
    "materialize": Scenario("scripts.materialize", ("--model-tag", "tiny", "--out-tag", "smaller", "--attn-rank", "8"),
                            before="train", launched=False),
    "report": Scenario("scripts.report", ("{base}/runs/tiny", "--out", "{base}/report"), before="train",
                       launched=False),
    "download": Scenario("nanochat.dataset", ("--data", "climbmix", "-n", "2", "-w", "1"), launched=False,
                         environment=(("HF_ENDPOINT", "{hub}"), ("HF_HUB_DISABLE_XET", "1"), ("HF_HOME", "{base}/../hf"))),
}


@dataclass(frozen=True)
class Case:
    scenario: str
    processes: int = 1
    struck: int = 0          # the rank
    fault: str = "kill"      # or killall, short, stop, an errno's name
    at: int = 1
    times: int = 1
    kinds: str = "files"     # of KINDS

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


@dataclass
class Result:
    case: Case
    where: str = ""                              # the operation that the fault struck
    first: dict = field(default_factory=dict)    # of the run with the fault: codes, seconds
    again: dict = field(default_factory=dict)
    line: str = ""                               # what the run with the fault said
    findings: list = field(default_factory=list)  # (kind, detail)
    outcome: str = ""                            # finished, refused, killed, not struck

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "case": asdict(self.case), "name": self.case.name})


def write_corpus(folder: Path):
    folder.mkdir()
    for name, seeds in (("part0", range(150)), ("part1", range(150, 250)), ("val", range(1000, 1030))):
        lines = []
        for seed in seeds:
            rng = random.Random(seed)
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) + "."
            lines.append(json.dumps({"text": text}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def local_hub():
    """The hub of test_download.py, in a thread."""
    sys.path.insert(0, str(HERE.parent))
    import test_download
    names = ["shard_00000.parquet", "shard_00001.parquet", test_download.VAL]
    hub = test_download.Hub(test_download.CLIMBMIX, {name: test_download.parquet_bytes(f"text of {name}") for name in names})
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub


class World:
    """A corpus, a library and templates: base folders as scenarios begin and end. Shared by the workers."""

    def __init__(self, work: Path, tree: Path):
        self.work, self.tree = work, tree
        work.mkdir(parents=True, exist_ok=True)
        self.corpus = work / "corpus"
        if not self.corpus.exists():
            write_corpus(self.corpus)
        self.library = build(work)
        self.servers = 0
        self.ends = {}
        self.hub = None

    def server(self) -> Server:
        self.servers += 1
        return Server(self.tree, self.library, self.work / f"server{self.servers}.log")

    def flags(self, flags, base: Path) -> list[str]:
        return [str(flag).format(corpus=self.corpus, base=base) for flag in flags]

    def environment(self, scenario: Scenario, base: Path) -> dict:
        """The variables of a scenario's command. The hub that files are downloaded from starts with the first one."""
        if scenario.environment and not self.hub:
            self.hub = local_hub()
        url = self.hub.url if self.hub else ""
        variables = {name: value.format(hub=url, base=base) for name, value in scenario.environment}
        return {"NANOCHAT_BASE_DIR": str(base), **variables}

    def run(self, server, base: Path, scenario: Scenario, flags, processes, output: Path, struck=-1, **injector):
        """The answer of the server, with `out` and `err` (of each rank) and `fired`."""
        state = output.with_suffix(".state")
        state.write_bytes(bytes(4096))
        fired = output.with_suffix(".fired")
        fired.unlink(missing_ok=True)
        settings = {"INJECTOR_ROOTS": f"{base}:{self.corpus}", "INJECTOR_STATE": str(state),
                    "INJECTOR_FIRED": str(fired), "INJECTOR_KINDS": KINDS["files"],
                    **{f"INJECTOR_{key.upper()}": str(value) for key, value in injector.items()}}
        answer = server(module=scenario.module, arguments=self.flags(flags, base), output=str(output),
                        environment=self.environment(scenario, base), processes=processes, struck=struck,
                        injector=settings, limit=LIMIT)
        for end in ("out", "err"):
            paths = [Path(f"{output}.{rank}.{end}") for rank in range(processes)]
            answer[end] = [path.read_text(errors="replace") for path in paths]
        answer["stacks"] = [Path(f"{output}.{rank}.stacks").read_text() for rank in range(processes)]
        answer["fired"] = fired.read_text().splitlines() if fired.exists() else []
        counts = state.read_bytes()[:64]
        answer["count"] = int.from_bytes(counts[8 * max(struck, 0):8 * max(struck, 0) + 8], "little")
        return answer

    def start_of(self, server, name: str, processes: int) -> Path:
        """A base folder as this scenario begins with."""
        before = SCENARIOS[name].before
        if not before:
            empty = self.work / "empty"
            empty.mkdir(exist_ok=True)
            return empty
        return self.end_of(server, before, processes)[0]

    def end_of(self, server, name: str, processes: int) -> tuple[Path, dict, set]:
        """(base folder after this scenario without a fault, its outcome.of_base, the names in it)."""
        scenario = SCENARIOS[name]
        processes = processes if scenario.launched else 1
        key = (name, processes)
        if key not in self.ends:
            template = self.work / f"end-{name}-{processes}"
            if not (template / "done").exists():
                self.make_template(server, name, processes, template)
            base = template / "base"
            self.ends[key] = base, outcome.of_base(base), outcome.names(base)
        return self.ends[key]

    def prepare(self, server, cases):
        """Make the templates of these cases, which the workers then share."""
        for name, processes in sorted({(case.scenario, case.processes) for case in cases}):
            self.start_of(server, name, processes)
            self.end_of(server, name, processes)

    def make_template(self, server, name, processes, template):
        scenario = SCENARIOS[name]
        shutil.rmtree(template, ignore_errors=True)
        template.mkdir()
        start = self.start_of(server, name, processes)
        shutil.copytree(start, template / "base", symlinks=True)
        trouble = {}
        if name == "stopped":  # every process dies when the second checkpoint has its name and the third has not
            trace = self.trace(server, Case("train", processes, kinds="changes"))
            third = [line.split("\t")[0] for line in trace if "\trename\t" in line and line.endswith("step_000003")]
            trouble = dict(fault="killall", at=third[0], struck=0, kinds=KINDS["changes"])
        answer = self.run(server, template / "base", scenario, scenario.flags, processes, template / "output", **trouble)
        expected = name == "stopped"
        if any(answer["codes"]) != expected:
            raise RuntimeError(f"{name} without a fault: {answer}")
        (template / "done").touch()

    def trace(self, server, case: Case) -> list[str]:
        """number, kind and path of each file operation of a case's command, without a fault."""
        base = self.work / f"trace-{case.name}"
        scenario = SCENARIOS[case.scenario]
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(self.start_of(server, case.scenario, case.processes), base, symlinks=True)
        answer = self.run(server, base, scenario, scenario.flags, case.processes, self.work / f"trace-{case.name}.o",
                          case.struck, fault="trace", at=1, times=0, kinds=KINDS[case.kinds])
        shutil.rmtree(base)
        if any(answer["codes"]):
            raise RuntimeError(f"{case} without a fault: {answer}")
        return answer["fired"]


def run_case(world: World, server: Server, case: Case, keep: bool = False) -> Result:
    scenario = SCENARIOS[case.scenario]
    folder = world.work / "cases" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = folder / "base"
    shutil.copytree(world.start_of(server, case.scenario, case.processes), base, symlinks=True)
    _, wanted, wanted_names = world.end_of(server, case.scenario, case.processes)
    result = Result(case)

    first = world.run(server, base, scenario, scenario.flags, case.processes, folder / "first", case.struck,
                      fault=errno_number(case.fault), at=case.at, times=case.times, kinds=KINDS[case.kinds])
    result.first = {"codes": first["codes"], "seconds": round(first["seconds"], 2)}
    result.where = "; ".join(normal(line, base) for line in first["fired"][:3])
    if not first["fired"]:
        result.outcome = "not struck"
    judge_words(result, first, "with the fault", dies=case.fault in ("kill", "killall", "stop"))
    judge_lines(result, first, [base, world.corpus])
    if not any(first["codes"]):
        result.outcome = result.outcome or "finished"
        compare(result, wanted, base, "finished with the fault")

    again = world.run(server, base, scenario, scenario.again or scenario.flags, case.processes, folder / "again")
    result.again = {"codes": again["codes"], "seconds": round(again["seconds"], 2)}
    judge_words(result, again, "afterwards", dies=False)
    if any(again["codes"]):
        result.findings.append(("cannot go on", error_lines(again)[:1] or again["codes"]))
    else:
        compare(result, wanted, base, "after going on")
        compare_names(result, wanted_names, base)
    if not keep and not result.findings:
        shutil.rmtree(folder)
    return result


def run_all(world: World, servers: list[Server], cases: list[Case], on_result, keep: bool = False):
    """Run cases, as many at once as there are servers; on_result(result) is called for one at a time."""
    world.prepare(servers[0], cases)
    waiting = list(reversed(cases))
    lock = threading.Lock()
    errors = []

    def work(server):
        try:
            while True:
                with lock:
                    if not waiting or errors:
                        return
                    case = waiting.pop()
                result = run_case(world, server, case, keep)
                with lock:
                    on_result(result)
        except BaseException as e:  # raised again below
            errors.append(e)
    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def errno_number(fault: str) -> str:
    return str(getattr(errno, fault)) if hasattr(errno, fault) else fault


def judge_words(result: Result, answer: dict, when: str, dies: bool):
    """Findings in what the processes said and how they ended. dies: a process was killed, or asked to stop."""
    if answer["hung"]:
        stacks = " | ".join(stack_summary(text) for text in answer["stacks"])
        result.findings.append((f"hang {when}", stacks))
    for rank, (out, err) in enumerate(zip(answer["out"], answer["err"])):
        if outcome.BROKEN.search(err + out):
            words = outcome.last_words(err if outcome.BROKEN.search(err) else out)
            result.findings.append((f"traceback {when}", f"rank {rank}: {words}"))
    lines = error_lines(answer)
    if when == "with the fault":
        result.line = " || ".join(lines)
    if 2 in answer["codes"]:
        result.outcome = result.outcome or "refused"
        if not lines:
            result.findings.append((f"no line {when}", [text[-200:] for text in answer["err"]]))
    elif any(answer["codes"]):
        result.outcome = result.outcome or "killed"
        strange = [code for code in answer["codes"] if code not in (0, -9, -15, 143, 75, 130)]
        if not dies and not answer["hung"] and strange:
            result.findings.append((f"exit code {when}", answer["codes"]))


def judge_lines(result: Result, answer: dict, roots: list[Path]):
    """A finding if a process ended with a line that does not name the file, or a folder around it."""
    if not answer["fired"] or 2 not in answer["codes"]:
        return
    path = answer["fired"][0].split("\t")[2].removesuffix(" (deleted)")
    places = {path}
    for root in map(str, roots):
        parents = Path(path).parents if path.startswith(root) else ()
        places |= {str(parent) for parent in parents if str(parent).startswith(root + "/")}
        if root == path or (parents and root == str(roots[-1])):
            places.add(root)
    places |= {re.sub(r"/\.([^/]*?)(\.[0-9a-f]{12}\.tmp|\.building|\.[0-9a-f]{8})?$", r"/\1", place) for place in places}
    lines = error_lines(answer)
    if lines and not any(place in line for line in lines for place in places):
        named = any(re.search(r"(^|[\s'\"])/\w", line) for line in lines)
        kind = "line names another file" if named else "line names no file"
        result.findings.append((kind, hidden(lines[0].replace(str(roots[0]), ""))))


def error_lines(answer) -> list[str]:
    return [line for err in answer["err"] for line in err.splitlines() if line.startswith("error")]


def stack_summary(text: str) -> str:
    """The innermost functions of this program in a dump of faulthandler, main thread (the last one)."""
    places = re.findall(r'File "[^"]*?/?((?:nanochat|scripts)/\w+\.py)", line (\d+) in (\w+)', text.split("Thread ")[-1])
    return " < ".join(f"{file}:{line} {function}" for file, line, function in places[:3])


def compare(result, wanted, base, when):
    got = outcome.of_base(base)
    older = older_checkpoints(wanted, got)
    if older:
        result.findings.append((f"note: older checkpoints are still there {when}", older))
    if lines := outcome.differences(wanted, got):
        result.findings.append((f"difference {when}", [hidden(line) for line in lines[:6]]))


def compare_names(result, wanted_names, base):
    names = outcome.names(base)
    whole = {str(path.parent.relative_to(base)) for path in base.glob("runs/*/checkpoints/step_*/state.pt")
             if (path.parent / "meta.json").exists()}
    left = [name for name in sorted(names - wanted_names) if not {name, name.rpartition("/")[0]} & whole]
    if left:
        result.findings.append(("left over", [hidden(name) for name in left][:4]))
    if lost := wanted_names - names:
        result.findings.append(("missing", sorted(lost)[:4]))


def older_checkpoints(wanted: dict, got: dict) -> list[str]:
    """Names of checkpoints that were to be removed and are there, whole. They leave `got`."""
    names = []
    for tag, run in wanted["runs"].items():
        weights = got["runs"].get(tag, {}).get("weights", {})
        extra = [name for name in weights.keys() - run["weights"].keys() if re.fullmatch("[0-9a-f]{64}", weights[name])]
        names += [f"{tag}/{name}" for name in extra if name < max(run["weights"], default="")]
        for name in extra:
            weights.pop(name)
    return names


def normal(line: str, base: Path) -> str:
    number, kind, path = line.split("\t")
    return f"{kind} {hidden(path.replace(str(base), ''))}"


def hidden(text: str) -> str:
    """Without random names and numbers of processes."""
    return re.sub(r"(?<![0-9a-f_])[0-9a-f]{12,}|building\.\w+|(?<=\.)[a-z0-9_]{8}(?=\.tmp|$)", "X", text)


def cases_of(case: Case, trace: list[str], every: int, whole: bool, first: int = 1, last: int = 0) -> list[Case]:
    """The case at the operations of a trace. Of a row of the same operations on the same file (the many writes of a
    checkpoint) only the first, the middle and the last, unless `whole`; of these every `every`-th.
    """
    chosen = []
    rows = [list(row) for _, row in groupby(enumerate(trace, 1), key=lambda item: item[1].split("\t", 1)[1])]
    for row in rows:
        places = {0, len(row) // 2, len(row) - 1}
        chosen += [row[place][0] for place in (range(len(row)) if whole else sorted(places))]
    return [replace(case, at=at) for at in chosen if first <= at <= (last or len(trace))][::every]
