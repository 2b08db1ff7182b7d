"""The rules of style that ruff does not have. `python tests/test_style.py [path ...]` lists what breaks them.

The rules read syntax trees; nothing of the package is imported. A rule yields the node that breaks it and
a message that says what would be right.
"""

import ast
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("nanochat", "scripts", "dev", "tests")
WINGS = ("adapters", "subspace", "sweep", "report")
LAUNCHERS = ("nanochat/sweep/", "scripts/sweep.py")  # on a cluster's login node: no matplotlib
MOST_LINES = 60
MAX_PARAMETERS = 7

# (rule, "path" or "path::function"): why it stands
EXEMPT: dict[tuple[str, str], str] = {}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SEQUENCES = (ast.Tuple, ast.List)
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    rule: str
    function: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"

    @property
    def places(self) -> set[tuple[str, str]]:
        """The two keys of EXEMPT that would cover it."""
        return {(self.rule, self.path), (self.rule, f"{self.path}::{self.function}")}


class Module:
    """A file's syntax tree: nodes by type, and the parent of each."""

    def __init__(self, path: str, source: str):
        self.path = path
        self.tree = ast.parse(source, path)
        self.parents: dict[ast.AST, ast.AST] = {}
        self.by_type: dict[type, list] = defaultdict(list)
        waiting = [self.tree]
        for node in waiting:
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
                self.by_type[type(child)].append(child)
                waiting.append(child)

    def nodes(self, *types: type) -> list:
        return [node for kind in types for node in self.by_type[kind]]

    def ancestors(self, node: ast.AST) -> list[ast.AST]:
        chain = []
        while node in self.parents:
            node = self.parents[node]
            chain.append(node)
        return chain

    def is_inside(self, node: ast.AST, types: tuple) -> bool:
        return any(isinstance(outer, types) for outer in self.ancestors(node))

    def function(self, node: ast.AST) -> str:
        """The dotted name of the function or class around a node, "" at the top."""
        scopes = [
            scope for scope in [node, *self.ancestors(node)] if isinstance(scope, (*FUNCTIONS, ast.ClassDef))
        ]
        return ".".join(scope.name for scope in reversed(scopes))

    @cached_property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def imported(self, statement: ast.Import | ast.ImportFrom) -> list[str]:
        """The modules that an import may load: `from a import b` gives a and a.b."""
        if isinstance(statement, ast.Import):
            return [alias.name for alias in statement.names]
        base = statement.module or ""
        if statement.level:
            package = self.path.split("/")[: -statement.level]
            base = ".".join([*package, base] if base else package)
        return [base, *(f"{base}.{alias.name}" for alias in statement.names)]

    def loaded(self) -> list[tuple[int, str]]:
        """(line, name) of the modules that are loaded when this one is imported."""
        statements = self.nodes(ast.Import, ast.ImportFrom)
        at_import = [statement for statement in statements if not self.is_inside(statement, FUNCTIONS)]
        return [(statement.lineno, name) for statement in at_import for name in self.imported(statement)]


def multiple_assignment(module: Module):
    for node in module.nodes(ast.Assign):
        for target in node.targets:
            literals = isinstance(target, SEQUENCES) and isinstance(node.value, SEQUENCES)
            if literals and not is_swap(target, node.value):
                yield node, "two unrelated values in one assignment; one line for each"


def is_swap(targets: ast.Tuple, values: ast.Tuple) -> bool:
    """Does a value read another one's target? Then lines of their own would change the meaning."""
    names = [ast.unparse(target) for target in targets.elts]
    for place, value in enumerate(values.elts):
        read = {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
        if read & {*names[:place], *names[place + 1 :]}:
            return True
    return False


def walrus(module: Module):
    for node in module.nodes(ast.NamedExpr):
        chain = [node, *module.ancestors(node)]
        tests = [p for c, p in zip(chain, chain[1:]) if isinstance(p, (ast.If, ast.While)) and p.test is c]
        if not tests:
            yield node, ":= outside the test of an if or a while; assign on a line of its own"


def nested_comprehension(module: Module):
    for node in module.nodes(*COMPREHENSIONS):
        if module.is_inside(node, COMPREHENSIONS):
            yield node, "a comprehension within a comprehension; name the inner one, or write a loop"


def nested_ternary(module: Module):
    for node in module.nodes(ast.IfExp):
        if module.is_inside(node, (ast.IfExp,)):
            yield node, "a ternary within a ternary; write if, elif, else"


def boolean_arithmetic(module: Module):
    message = "arithmetic on a condition; write an if (for tensors: torch.where, or .float())"
    for node in module.nodes(ast.BinOp):
        if isinstance(node.op, ARITHMETIC) and (is_condition(node.left) or is_condition(node.right)):
            yield node, message
    for node in module.nodes(ast.AugAssign):
        if isinstance(node.op, ARITHMETIC) and is_condition(node.value):
            yield node, message
    for node in module.nodes(ast.Subscript):
        literal = isinstance(node.value, (ast.Tuple, ast.List, ast.Dict, ast.Constant))
        if literal and is_condition(node.slice):
            yield node, "a literal indexed by a condition; write `a if condition else b`"


def is_condition(node: ast.AST) -> bool:
    """Comparisons, not, bool(...), and, or. `value or 1` is a default, no condition."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "bool"
    if isinstance(node, ast.BoolOp):
        return isinstance(node.op, ast.And) or is_condition(node.values[-1])
    return isinstance(node, ast.Compare)


def string_arithmetic(module: Module):
    for node in module.nodes(ast.BinOp):
        text, factor = (node.left, node.right) if is_text(node.left) else (node.right, node.left)
        product = isinstance(node.op, ast.Mult) and is_text(text)
        if product and not is_count(factor) and not is_condition(factor):
            yield node, "a string times a variable; write an if (padding: .ljust, or a width in the f-string)"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_count(node: ast.AST) -> bool:
    """A whole number, a CONSTANT, len(...), and sums and products of these."""
    if isinstance(node, ast.BinOp):
        return any(is_count(side) for side in (node.left, node.right))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("len", "max", "min")
    if isinstance(node, ast.Name):
        return node.id.isupper()
    return isinstance(node, ast.Constant) and type(node.value) is int


def function_length(module: Module):
    for node in module.nodes(*FUNCTIONS):
        lines = node.end_lineno - node.lineno + 1
        if lines > MOST_LINES:
            yield node, f"{node.name} has {lines} lines; at most {MOST_LINES}: split it by its steps"


def parameter_count(module: Module):
    for node in module.nodes(*FUNCTIONS):
        a = node.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        count = sum(p.arg not in ("self", "cls", "ctx") for p in parameters)
        if count > MAX_PARAMETERS:
            yield (
                node,
                f"{node.name} has {count} parameters; at most {MAX_PARAMETERS}: group what belongs together",
            )


def layer(name: str) -> str:
    """scripts, a wing's name, core, or "" for what is outside the package."""
    parts = name.split(".")
    if parts[0] == "nanochat":
        return parts[1] if len(parts) > 1 and parts[1] in WINGS else "core"
    return parts[0] if parts[0] in FOLDERS else ""


DIRECTION = "imports run from scripts to the wings to the core, and report and sweep do not import each other"


def import_direction(module: Module):
    here = layer(module.name)
    if here in ("dev", "tests"):
        return
    refused = {"dev", "tests"}
    if here != "scripts":
        refused.add("scripts")
    if here == "core":
        refused.update(WINGS)
    refused.update({"report": ["sweep"], "sweep": ["report"]}.get(here, []))
    for statement in module.nodes(ast.Import, ast.ImportFrom):
        names = [name for name in module.imported(statement) if layer(name) in refused]
        if names:
            yield statement, f"{here} imports {names[-1]}; {DIRECTION}"


def launcher_loads_matplotlib(modules: list[Module]):
    """Follows what runs on import, from each line of a launcher that imports something."""
    by_name = {module.name: module for module in modules}
    for launcher in [module for module in modules if module.path.startswith(LAUNCHERS)]:
        for line, name in sorted(launcher.loaded()):
            chain = chain_to_matplotlib(name, by_name)
            if chain:
                message = (
                    f"loads matplotlib: {' -> '.join(chain)}; a launcher takes what it needs from the core"
                )
                yield launcher, ast.Pass(lineno=line), message
                break


def chain_to_matplotlib(name: str, by_name: dict[str, Module]) -> list[str]:
    """The shortest way from a module to matplotlib, [] if there is none. A package runs with its modules."""
    chains = [[name]]
    seen = set()
    for chain in chains:
        last = chain[-1]
        if last.split(".")[0] == "matplotlib":
            return chain
        if last in seen or last.split(".")[0] not in FOLDERS:
            continue
        seen.add(last)
        following = [name for _, name in by_name[last].loaded()] if last in by_name else []
        if "." in last:
            following.append(last.rpartition(".")[0])
        chains += [[*chain, name] for name in following]
    return []


def constant_defined_twice(modules: list[Module]):
    first: dict[str, str] = {}
    for module in sorted(modules, key=lambda module: module.path):
        if not module.path.startswith("nanochat/"):
            continue
        for node, name in sorted(constants(module), key=lambda pair: pair[0].lineno):
            other = first.setdefault(name, module.path)
            if other != module.path:
                yield module, node, f"{name} is also defined in {other}; import it, or name what differs"


def constants(module: Module):
    """(statement, name) of each UPPER_CASE name that is assigned outside of functions and classes."""
    for node in module.nodes(ast.Assign, ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if module.is_inside(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and re.fullmatch("_?[A-Z][A-Z0-9_]+", part.id):
                    yield node, part.id


FILE_RULES = [
    multiple_assignment,
    walrus,
    nested_comprehension,
    nested_ternary,
    boolean_arithmetic,
    string_arithmetic,
    function_length,
    parameter_count,
    import_direction,
]
TREE_RULES = [launcher_loads_matplotlib, constant_defined_twice]
NAMES = [rule.__name__ for rule in FILE_RULES + TREE_RULES]


def violations(files: dict[str, str]) -> list[Violation]:
    modules = [Module(path, source) for path, source in files.items()]
    results = []
    for rule in FILE_RULES:
        for module in modules:
            results += [(rule, module, node, message) for node, message in rule(module)]
    for rule in TREE_RULES:
        results += [(rule, *result) for result in rule(modules)]
    listed = [
        Violation(module.path, node.lineno, rule.__name__, module.function(node), message)
        for rule, module, node, message in results
    ]
    return sorted(listed, key=lambda violation: (violation.path, violation.line))


def tree() -> dict[str, str]:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


EIGHT = "a, b, c, d, e, f, g, h"
SAMPLES = [
    # rule, what breaks it, what keeps it
    ("multiple_assignment", "a, b = 1, 2", "a, b = b, a\na, b, c = b, c, a\na, b = f()\na = 1, 2"),
    ("multiple_assignment", "x.a, [b] = 1, [2]", "x[i], x[j] = x[j], x[i]\nold, new = new, old + new"),
    ("walrus", "f(a := 1)", "if (a := f()):\n    pass\nwhile x and (a := f()) > 1:\n    pass"),
    ("walrus", "if f():\n    g(a := 1)", "if x:\n    pass\nelif f(a := 1):\n    pass"),
    ("nested_comprehension", "[[x for x in y] for y in z]", "[x for y in z for x in y]\n[f(x) for x in y]"),
    ("nested_comprehension", "{x: y for x in sum(1 for y in z)}", "a = [x for x in y]\nb = {x for x in a}"),
    ("nested_ternary", "a if b else c if d else e", "a if b else c"),
    ("nested_ternary", "f(a if b else c) if d else e", "f(a if b else c) + (d if e else f)"),
    ("boolean_arithmetic", "1 + (a > b)", "1 + a\n(a > b) & (c > d)\na == b + 1\nx[a > b]"),
    ("boolean_arithmetic", "[x] * (not a)", "-a * b"),
    ("boolean_arithmetic", "a -= b and c", "a -= b\na |= b > c"),
    ("boolean_arithmetic", "a * (b or c > d)", "a * (b or 1)"),
    ("boolean_arithmetic", "('no', 'yes')[a > b]", "('no', 'yes')[a]"),
    ("boolean_arithmetic", "'s' * bool(a)", "2 * f(a)"),
    ("string_arithmetic", "'s' * many", "'-' * 20\n'-' * WIDTH\n'-' * len(a)\n'-' * (len(a) - 1)"),
    ("string_arithmetic", "many * f'{a}s'", "n * 3\n'a' + b\n'%s' % a"),
    ("function_length", "def f():\n" + "    x\n" * 60, "def f():\n" + "    x\n" * 59),
    (
        "function_length",
        "@a\nclass A:\n    async def f():\n" + "        x\n" * 60,
        "@a(\n1)\ndef f():\n" + "    x\n" * 59,
    ),
    ("parameter_count", f"def f({EIGHT}): pass", f"class A:\n    def f(self, {EIGHT[:-3]}): pass"),
    (
        "parameter_count",
        f"def f({EIGHT[:-6]}, *, g, **h): pass",
        f"def f({EIGHT[:-6]}, *, g): pass\nf({EIGHT})",
    ),
    (
        "import_direction",
        {"nanochat/a.py": "import scripts.b"},
        {"scripts/b.py": "import nanochat.a, scripts.c"},
    ),
    (
        "import_direction",
        {"nanochat/a.py": "import nanochat.report"},
        {"scripts/b.py": "import nanochat.report.page"},
    ),
    (
        "import_direction",
        {"nanochat/a.py": "from nanochat import sweep"},
        {"dev/b.py": "from nanochat import sweep"},
    ),
    (
        "import_direction",
        {"nanochat/a.py": "from .adapters import b"},
        {"nanochat/a.py": "from .rank import b"},
    ),
    (
        "import_direction",
        {"nanochat/report/a.py": "from ..sweep import b"},
        {"nanochat/report/a.py": "from .. import b"},
    ),
    (
        "import_direction",
        {"nanochat/sweep/a.py": "import nanochat.report.b"},
        {"nanochat/sweep/a.py": "from . import b"},
    ),
    ("import_direction", {"scripts/a.py": "import tests.b"}, {"tests/a.py": "import scripts.b"}),
    (
        "launcher_loads_matplotlib",
        {"nanochat/sweep/a.py": "from nanochat.b import c", "nanochat/b.py": "import matplotlib.text"},
        {"nanochat/sweep/a.py": "import nanochat.b", "nanochat/b.py": "def f():\n    import matplotlib"},
    ),
    (
        "launcher_loads_matplotlib",
        {
            "scripts/sweep.py": "from nanochat.b import c",
            "nanochat/__init__.py": "from matplotlib import text",
        },
        {"scripts/report.py": "from nanochat.b import c", "nanochat/b.py": "import matplotlib"},
    ),
    (
        "constant_defined_twice",
        {"nanochat/a.py": "SIZE = 1", "nanochat/report/b.py": "try:\n    SIZE: int = 2\nexcept E: pass"},
        {
            "nanochat/a.py": "SIZE = 1\nSIZE = 2\nT = 1",
            "nanochat/b.py": "T = 2\ndef f():\n    SIZE = 1",
            "tests/c.py": "SIZE = 3",
        },
    ),
]


@pytest.mark.parametrize("rule, bad, good", SAMPLES)
def test_rule_tells_good_from_bad(rule, bad, good):
    assert {violation.rule for violation in violations(sources(bad))} == {rule}
    assert violations(sources(good)) == []


def sources(sample):
    return sample if isinstance(sample, dict) else {"nanochat/a.py": sample}


def test_every_rule_has_a_sample():
    assert {rule for rule, _, _ in SAMPLES} == set(NAMES)


@pytest.fixture(scope="module")
def broken():
    return violations(tree())


def test_tree_keeps_the_rules(broken):
    left = [str(violation) for violation in broken if not violation.places & EXEMPT.keys()]
    assert not left, "\n" + "\n".join(left)


def test_every_exemption_is_needed(broken):
    assert EXEMPT.keys() - set().union(*(violation.places for violation in broken)) == set()
    assert all(EXEMPT.values()), "each needs its reason"


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or ""
    files = tree()
    if not any(path.startswith(wanted) for path in files):
        sys.exit(f"error: no Python file of {', '.join(FOLDERS)} begins with {' or '.join(wanted) or ROOT}")
    left = [violation for violation in violations(files) if not violation.places & EXEMPT.keys()]
    listed = [str(violation) for violation in left if violation.path.startswith(wanted)]
    print("\n".join([*listed, f"{len(listed)} violations"]))
    sys.exit(1 if listed else 0)
