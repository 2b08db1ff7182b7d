"""Base folders as scenarios begin and end, made once, and commands that are run in copies of them."""

import shutil
from pathlib import Path

from . import outcome
from .library import Server, build
from .scenarios import KINDS, SCENARIOS, Command, Scenario, local_hub, write_corpus

# all processes die when the third checkpoint is to have its name
STOP = {"fault": "killall", "at": 1, "kinds": "rename", "path": "/step_000003"}
LIMIT = 60  # seconds until a command counts as hung


class World:
    """A corpus, the library, and folders of scenarios. Several threads may use it once `prepare` is done."""

    def __init__(self, work: Path, tree: Path):
        self.work = work
        self.tree = tree
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

    def prepare(self, server: Server, cases):
        """Make the folders that these cases begin with and are compared with."""
        for name, processes in sorted({(case.scenario, case.processes) for case in cases}):
            self.start_of(server, name, processes)
            self.end_of(server, name, processes)

    # ---- commands

    def environment(self, scenario: Scenario, base: Path) -> dict:
        """The variables of a command. The hub that files are downloaded from starts with the first one."""
        if scenario.environment and not self.hub:
            self.hub = local_hub()
        url = self.hub.url if self.hub else ""
        variables = {name: value.format(hub=url, base=base) for name, value in scenario.environment}
        return {"NANOCHAT_BASE_DIR": str(base), **variables}

    def run(self, server, command: Command, base: Path, output: Path, struck=-1, **injector) -> dict:
        """The answer of the server (see server.supervise), with what each process said, "out", "err" and
        "stacks", and the operations that were struck, "fired".

        struck: the rank. injector: at, fault, times, kinds, path and log of faulty_files.c.
        """
        scenario = command.scenario
        state = output.with_suffix(".state")
        state.write_bytes(bytes(4096))
        fired = output.with_suffix(".fired")
        fired.unlink(missing_ok=True)
        settings = {
            "INJECTOR_ROOTS": f"{base}:{self.corpus}",
            "INJECTOR_STATE": str(state),
            "INJECTOR_FIRED": str(fired),
            "INJECTOR_KINDS": KINDS["files"],
        }
        settings |= {f"INJECTOR_{key.upper()}": str(value) for key, value in injector.items()}
        arguments = [flag.format(corpus=self.corpus, base=base) for flag in command.flags]
        answer = server(
            module=scenario.module,
            arguments=arguments,
            processes=command.processes,
            environment=self.environment(scenario, base),
            struck=struck,
            injector=settings,
            output=str(output),
            limit=LIMIT,
        )
        for end in ("out", "err", "stacks"):
            paths = [Path(f"{output}.{rank}.{end}") for rank in range(command.processes)]
            answer[end] = [path.read_text(errors="replace") for path in paths]
        answer["fired"] = fired.read_text().splitlines() if fired.exists() else []
        return answer

    def trace(self, server, case) -> list[str]:
        """number, kind and path of each file operation of a case's command, without a fault."""
        folder = self.work / f"trace-{case.name}"
        base = self.copy_of_start(server, case.command(), folder)
        trace = {"fault": "trace", "at": 1, "times": 0, "kinds": KINDS[case.kinds]}
        answer = self.run(server, case.command(), base, folder / "traced", case.struck, **trace)
        if any(answer["codes"]):
            raise RuntimeError(f"{case} without a fault: {answer}")
        shutil.rmtree(folder)
        return answer["fired"]

    # ---- folders

    def copy_of_start(self, server, command: Command, folder: Path) -> Path:
        """A new base folder, folder/base, as this command begins with."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = self.start_of(server, command.name, command.processes)
        shutil.copytree(start, folder / "base", symlinks=True)
        return folder / "base"

    def start_of(self, server, name: str, processes: int) -> Path:
        before = SCENARIOS[name].before
        if before:
            return self.end_of(server, before, processes)[0]
        empty = self.work / "empty"
        empty.mkdir(exist_ok=True)
        return empty

    def end_of(self, server, name: str, processes: int) -> tuple[Path, dict, set]:
        """(base folder after this scenario without a fault, its outcome.of_base, the names in it)."""
        if not SCENARIOS[name].launched:
            processes = 1
        key = (name, processes)
        if key not in self.ends:
            folder = self.work / f"end-{name}-{processes}"
            if not (folder / "done").exists():
                self.make_end(server, name, processes, folder)
            base = folder / "base"
            self.ends[key] = base, outcome.of_base(base), outcome.names(base)
        return self.ends[key]

    def make_end(self, server, name, processes, folder):
        command = Command(name, processes)
        base = self.copy_of_start(server, command, folder)
        fault = STOP if name == "stopped" else {}
        answer = self.run(server, command, base, folder / "said", 0, **fault)
        if any(answer["codes"]) != bool(fault):
            raise RuntimeError(f"{name} without a fault: {answer}")
        (folder / "done").touch()
