"""Small faults, put into polyak one at a time, and how many of them its tests see: `make mutants`.

The faults are cosmic-ray's mutants. A process that has collected the tests forks for each of them; there the code of
the one function that differs is exchanged, or polyak imported anew where what differs is no function, and the tests run
that pass through the changed lines, the fastest first, up to the first that fails. Which modules, which tests and how
many mutants says mutants.toml, which also explains those that no test can tell from the original.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib.machinery
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from inspect import CO_NEWLOCALS
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeGuard, TypeVar

import hypothesis
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text())
Position = tuple[int, int]

# Mutants.


@dataclass(frozen=True)
class Mutant:
    """One change of a file: which, and where."""

    file: str
    operator: str
    at: Position
    line: str
    nth: int  # of those that are the same but for the line's number
    make: Callable[[], str] = field(repr=False, compare=False)

    @property
    def place(self) -> tuple[Position, str]:
        """Where, and by which kind of operator, whatever that puts there."""
        return self.at, self.operator.partition("_")[0]

    @cached_property
    def draw(self) -> str:
        """In this order they are drawn: a mutant keeps its place when other lines change."""
        return hashlib.sha256("\0".join((str(SETTINGS["seed"]), *self.key[:-1])).encode()).hexdigest()

    @cached_property
    def source(self) -> str:
        """The file with it; none where that is no Python."""
        source = self.make()
        return source if _compiles(source) else ""

    @property
    def shown(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("file", "operator", "at", "line", "nth", "becomes")}

    @property
    def key(self) -> tuple[str, ...]:
        """What it is known by when lines have moved."""
        return self.file, self.operator, self.line, str(self.at[1]), str(self.nth)

    @property
    def becomes(self) -> str:
        is_gone = self.operator == "core/RemoveDecorator"
        return "" if is_gone else self.source.splitlines()[self.at[0] - 1].strip()


def mutants_of(file: str, most: int) -> tuple[list[Mutant], int]:
    """Those that are tried, in the order of lines, and of how many."""
    places: dict[tuple[Position, str], list[Mutant]] = defaultdict(list)
    for mutant in sorted(_all_mutants(file), key=lambda mutant: mutant.draw):
        places[mutant.place].append(mutant)
    # Of the eleven ways to exchange a plus most fail at once: at each place a few stand for all.
    each = SETTINGS["most_of_a_place"]
    possible = sum(min(each, len(those)) for those in places.values())
    waiting = sorted((m for those in places.values() for m in those), key=lambda mutant: mutant.draw)
    drawn: list[Mutant] = []
    taken = Counter[tuple[Position, str]]()
    for mutant in waiting:
        if len(drawn) < most and taken[mutant.place] < each and mutant.source:
            drawn.append(mutant)
            taken[mutant.place] += 1
    return sorted(drawn, key=lambda mutant: (mutant.at, mutant.operator)), possible


def _all_mutants(file: str) -> Iterator[Mutant]:
    source = (ROOT / file).read_text()
    tree = get_ast(source)
    nodes = list(ast_nodes(tree))
    left_out = _left_out(ast.parse(source))
    lines = source.splitlines()
    same = Counter[tuple[str, str, int]]()
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        # Identity for equality, and back, differs for few objects and is a matter of style.
        if kind.arguments() or name.endswith(("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")):
            continue
        operator = kind()
        for node in nodes:
            for index, (start, stop) in enumerate(operator.mutation_positions(node)):
                is_mark = node.parent is not None and node.parent.type in ("parameters", "lambdef")
                if not is_mark and not any(first <= start and stop <= last for first, last in left_out):
                    make = partial(_mutated, tree, node, operator, index)
                    line = lines[start[0] - 1].strip()
                    yield Mutant(file, name, start, line, same[name, line, start[1]], make)
                    same[name, line, start[1]] += 1


def _mutated(tree: Any, node: Any, operator: Any, index: int) -> str:
    """The source with one mutation. The tree is as it was afterwards: parsing a file for each would take longer."""
    changed = [node.parent, *ast_nodes(node)]
    before = [
        (each, n, getattr(each, n)) for each in changed for n in ("children", "value") if hasattr(each, n)
    ]
    for each in changed:
        if hasattr(each, "children"):
            each.children = list(each.children)
    try:
        new = operator.mutate(node, index)
        node.parent.children = [new if c is node else c for c in node.parent.children if c is not node or new]
        return tree.get_code()
    except AttributeError:  # cosmic-ray's, of an exception whose name has a dot
        return ""
    finally:
        for each, name, value in before:
            setattr(each, name, value)


def _compiles(source: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _left_out(tree: ast.Module) -> list[tuple[Position, Position]]:
    """Where a change would be of types, which do not run, or of the text of messages."""
    found: list[ast.expr | ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found += [node.returns] if node.returns else []
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found += [node.annotation] if node.annotation else []
        elif isinstance(node, ast.JoinedStr | ast.Raise) or _is_call(node, "warn_user"):
            found.append(node)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or n.lineno, n.end_col_offset or n.col_offset))
        for n in found
    ]


def _is_call(node: ast.AST, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


# A mutant in a process that runs the original.


class Originals:
    """The functions that run, by their code; looked up once, as each fork that did so would copy all memory."""

    def __init__(self, files: Sequence[str]) -> None:
        paths = {str(ROOT / file) for file in files}
        self._modules = {
            path: compile(Path(path).read_text(), path, "exec", dont_inherit=True) for path in paths
        }
        self._live: dict[CodeType, list[FunctionType]] = defaultdict(list)
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename in paths:
                self._live[one.__code__].append(one)

    def exchange(self, mutant: Mutant) -> bool:
        """Give functions the code of a mutant; False where something else differs, as in the body of a class."""
        path = str(ROOT / mutant.file)
        new = compile(mutant.source, path, "exec", dont_inherit=True)
        changed = dict(_changed(self._modules[path], new))
        if not changed or any(code not in self._live or not code.co_flags & CO_NEWLOCALS for code in changed):
            return False
        for code, other in changed.items():
            for function in self._live[code]:
                function.__code__ = other
        return True


def _changed(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The outermost codes that run while polyak is used, or imported, and are not the same."""
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new)]
    is_function = old.co_flags & CO_NEWLOCALS
    if (
        len(inner[0]) != len(inner[1])
        or _own(old) != _own(new)
        or (is_function and old.co_consts != new.co_consts)
    ):
        yield old, new
        return
    for pair in zip(*inner, strict=True):
        yield from _changed(*pair)


def _own(code: CodeType) -> tuple[object, ...]:
    values = [repr(c) for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_code, values, code.co_names, code.co_varnames


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a mutant in the place of its file."""

    mutant: Mutant

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        if Path(path) == ROOT / self.mutant.file:
            return compile(self.mutant.source, path, "exec", dont_inherit=True)
        return super().get_code(fullname)


def run_anew(mutant: Mutant, tests: Sequence[str]) -> int:
    """Import polyak again, mutated, and run tests; the exit code of pytest."""
    ours = (f"{ROOT}/src/", f"{ROOT}/tests/")
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(ours):
            del sys.modules[name]
    _Loader.mutant = mutant
    hooks = importlib.machinery.FileFinder.path_hook(
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
        (_Loader, importlib.machinery.SOURCE_SUFFIXES),
    )
    sys.path_hooks.insert(0, hooks)
    sys.path_importer_cache.clear()
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    return pytest.main([*PYTEST, *files], plugins=[_Only(tests)])


PYTEST = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", "--assert=plain", "--maxfail=1"]
PYTEST += [f"--rootdir={ROOT}", "--hypothesis-profile=mutants"]
# What fails has failed: no deadline, which a busy machine breaks, and no search for the smallest example.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("mutants", derandomize=True, deadline=None, phases=PHASES)


class _Only:
    """Runs these tests, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._rank = {test: rank for rank, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._rank), key=lambda i: self._rank[i.nodeid])


# The tests of a module, once with the original and then with each mutant.


class Session:
    """A plugin of pytest that runs what was collected once for each mutant, in a fork."""

    def __init__(self, module: dict[str, Any], mutants: Sequence[Mutant], report: Path, jobs: int) -> None:
        self._module, self._mutants, self._report, self._jobs = module, mutants, report, jobs

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            sys.stderr.write(f"{report.nodeid} failed:\n{report.longreprtext}\n")
            os._exit(FAILED)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.collect()
        gc.freeze()
        seconds, lines = self._baseline(session)
        print(f"{self._module['name']}: {len(seconds)} tests of {sum(seconds.values()):.0f} s", flush=True)
        originals = Originals(self._module["files"])
        items = {item.nodeid: item for item in session.items}
        known = _fates(self._report)
        results = [known[mutant.key] | mutant.shown for mutant in self._mutants if mutant.key in known]
        jobs = []
        for mutant in self._mutants:
            if mutant.key in known:
                continue
            tests = self._tests_of(mutant, seconds, lines)
            attempt = partial(_attempt, mutant, originals, [items[test] for test in tests])
            jobs.append((mutant, attempt, 5 * sum(map(seconds.__getitem__, tests)) + 30))
        for mutant, code in _in_forks(jobs, self._jobs):
            outcome = OUTCOMES.get(code, "killed")
            results.append({**mutant.shown, "outcome": outcome})
            self._report.write_text(json.dumps(results, indent=1))
            if outcome != "killed":
                print(
                    f"{outcome}: {mutant.file}:{mutant.at[0]}: {mutant.line}  ->  {mutant.becomes}",
                    flush=True,
                )
        return True

    def _baseline(self, session: pytest.Session) -> tuple[dict[str, float], dict[str, Any]]:
        """How long each test takes, and which tests run each line of the mutated files."""
        files: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in session.items:
            files[item.path].append(item)
        jobs = [
            (self._report.with_suffix(f".{number}.json"), partial(self._watched, items, number), 3600.0)
            for number, items in enumerate(files.values())
        ]
        seconds: dict[str, float] = {}
        lines: dict[str, Any] = {file: defaultdict(list) for file in self._module["files"]}
        for path, code in _in_forks(jobs, self._jobs, quiet=False):
            if code:
                raise pytest.UsageError(f"the tests of {self._module['name']} do not pass without a mutant")
            some, found = json.loads(path.read_text())
            path.unlink()
            seconds |= some
            for file, rows in found.items():
                for row, tests in rows.items():
                    lines[file][row] += tests
        return seconds, lines

    def _watched(self, items: Sequence[pytest.Item], number: int) -> int:
        import coverage

        seconds: dict[str, float] = {}
        watched = coverage.Coverage(data_file=None, config_file=False, include=self._module["files"])
        watched.start()
        for item, following in _with_next(items):
            watched.switch_context(item.nodeid)
            started = sum(os.times()[:4])
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds[item.nodeid] = sum(os.times()[:4]) - started
        watched.stop()
        with warnings.catch_warnings(action="ignore"):  # of a file of tests that runs none of these lines
            data = watched.get_data()
        lines = {
            name: {
                line: [test for test in tests if test in seconds]
                for line, tests in data.contexts_by_lineno(str(ROOT / name)).items()
            }
            for name in self._module["files"]
        }
        self._report.with_suffix(f".{number}.json").write_text(json.dumps([seconds, lines]))
        return 0

    def _tests_of(self, mutant: Mutant, seconds: dict[str, float], lines: dict[str, Any]) -> list[str]:
        """Those that run its line, or any of its file where it runs as the file is imported; the fastest first."""
        by_line = lines[mutant.file]
        tests: set[str] = set()
        for rows in _rows_of(mutant):
            if not tests:
                tests.update(test for row in rows for test in by_line.get(str(row), ()))
        if not tests:
            tests = {test for those in by_line.values() for test in those}
        chosen, total = [], 0.0
        for test in sorted(tests, key=seconds.__getitem__):
            total += seconds[test]
            if chosen and total > SETTINGS["most_seconds"]:
                break
            chosen.append(test)
        return chosen


def _attempt(mutant: Mutant, originals: Originals, items: Sequence[pytest.Item]) -> int:
    if not items:
        return UNTESTED
    if not originals.exchange(mutant):
        return run_anew(mutant, [item.nodeid for item in items])
    for item, following in _with_next(items):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    return 0


def _with_next(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip(items, [*items[1:], None], strict=True)


def _rows_of(mutant: Mutant) -> Iterator[set[int]]:
    """The lines of its statement, or of its head; then, for what runs at an import, those that use what it names."""
    nodes = _nodes_of(mutant.file)
    row, statement, names = mutant.at[0], {mutant.at[0]}, set[str]()
    for node in nodes:
        if not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if any(row in range(part.lineno, node.body[0].lineno) for part in [*node.decorator_list, node]):
                statement = set(range(node.lineno, (node.end_lineno or 0) + 1))
            continue
        body = getattr(node, "body", None)
        head = range(node.lineno, body[0].lineno if body else (node.end_lineno or node.lineno) + 1)
        if row in head:
            statement = set(head)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = {getattr(target, "id", "") for target in targets}
    yield statement
    yield {
        node.lineno
        for node in nodes
        if (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.Attribute) and node.attr in names)
    }


@cache
def _nodes_of(file: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse((ROOT / file).read_text())))


# Exit codes of a fork, beside those of pytest.
FAILED, UNTESTED, BROKEN = 1, 98, 99
OUTCOMES = {0: "survived", UNTESTED: "untested", -signal.SIGXCPU: "timeout", -signal.SIGALRM: "timeout"}
Key = TypeVar("Key")


def _in_forks(
    jobs: Iterable[tuple[Key, Callable[[], int], float]], most: int, *, quiet: bool = True
) -> Iterator[tuple[Key, int]]:
    """What each call gives in a process of its own, ``most`` at a time, each within its seconds of a processor."""
    waiting, running = iter(jobs), dict[int, Key]()
    folders = {}
    while True:
        for key, call, seconds in itertools.islice(waiting, most - len(running)):
            folder = tempfile.mkdtemp(prefix="polyak-mutants-")
            pid = _fork(call, int(seconds) + 1, folder, quiet)
            running[pid], folders[pid] = key, folder
        if not running:
            return
        pid, status = os.waitpid(-1, 0)
        if pid in running:
            with contextlib.suppress(ProcessLookupError):  # what it has started
                os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(folders.pop(pid), ignore_errors=True)
            yield running.pop(pid), os.waitstatus_to_exitcode(status)


def _fork(call: Callable[[], int], seconds: int, folder: str, quiet: bool) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2) if quiet else (1,):
                os.dup2(null, stream)
            os.environ["PYTEST_DEBUG_TEMPROOT"] = folder
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            signal.alarm(20 * seconds)  # of waiting for what never comes
            code = call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _fates(report: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """What has become of mutants so far."""
    found = json.loads(report.read_text()) if report.exists() else []
    return {(r["file"], r["operator"], r["line"], str(r["at"][1]), str(r["nth"])): r for r in found}


def run_module(module: dict[str, Any], mutants: Sequence[Mutant], report: Path, jobs: int) -> None:
    """In a process of its own, as what one imports is no other's."""
    flags = [*PYTEST, "--maxfail=0", "--capture=no", "-k", SETTINGS["which_tests"]]
    sys.exit(pytest.main([*flags, *module["tests"]], plugins=[Session(module, mutants, report, jobs)]))


# The report.


def explained(mutant: dict[str, Any]) -> bool:
    """Whether mutants.toml says why no test can tell it from the original."""
    return any(
        entry["file"] == mutant["file"]
        and entry["line"] == mutant["line"]
        and mutant["becomes"] in entry.get("becomes", [mutant["becomes"]])
        for entry in SETTINGS.get("explained", ())
    )


def interval(killed: int, tried: int) -> list[float]:
    """Wilson's, of 95%."""
    z, share = 1.96, killed / tried
    middle = (share + z * z / (2 * tried)) / (1 + z * z / tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried)) / (1 + z * z / tried)
    return [round(middle - half, 4), round(min(1.0, middle + half), 4)]


def summary(possible: int, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    survivors = [r for r in results if r["outcome"] in ("survived", "untested")]
    n_explained = sum(map(explained, survivors))
    killed, counted = len(results) - len(survivors), len(results) - n_explained
    outcomes = Counter(r["outcome"] for r in results)
    return {
        "possible": possible,
        "tried": len(results),
        "killed": killed,
        "timeouts": outcomes["timeout"],
        "survived": len(survivors) - n_explained,
        "explained": n_explained,
        "score": round(killed / counted, 4),
        "interval": interval(killed, counted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="names of modules in mutants.toml; none: all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "mutation.json")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "mutants", help="the fate of each mutant"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="only those that were neither killed nor explained, and what is new",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    os.chdir(ROOT)
    options.work.mkdir(parents=True, exist_ok=True)
    for module in SETTINGS["module"]:
        if options.modules and module["name"] not in options.modules:
            continue
        drawn = [mutants_of(file, module["most_of_a_file"]) for file in module["files"]]
        mutants, possible = [m for those, _ in drawn for m in those], sum(count for _, count in drawn)
        print(f"{module['name']}: {len(mutants)} of {possible} mutants", flush=True)
        report = options.work / f"{module['name']}.json"
        before = list(_fates(report).values()) if options.again else []
        done = [r for r in before if r["outcome"] in ("killed", "timeout") or explained(r)]
        report.write_text(json.dumps(done))
        process = multiprocessing.get_context("fork").Process(
            target=run_module, args=(module, mutants, report, options.jobs)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        found = summary(possible, json.loads(report.read_text()))
        print(module["name"], found, flush=True)
        write_down(options.output, module["name"], found)


def write_down(output: Path, name: str, found: dict[str, Any]) -> None:
    """The figures of one module, beside those of the others that are there."""
    known = json.loads(output.read_text())["modules"] if output.exists() else {}
    known[name] = found
    settings = {"cosmic_ray": importlib.metadata.version("cosmic-ray"), "seed": SETTINGS["seed"]}
    modules = {
        module["name"]: known[module["name"]] for module in SETTINGS["module"] if module["name"] in known
    }
    output.write_text(json.dumps({"settings": settings, "modules": modules}, indent=2) + "\n")


if __name__ == "__main__":
    main()
