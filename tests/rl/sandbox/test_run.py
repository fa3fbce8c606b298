"""Attacks of a solution on the trainer, each with every layer, and with layers left out as on machines that lack them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from trainkit.errors import UserError
from trainkit.rl.sandbox import run as sandbox
from trainkit.rl.sandbox.level import FEATURES, Level
from trainkit.rl.sandbox.run import Calls, Limits, Program, Verdict, probe, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
WITHOUT = {
    "all": (),
    "no-filter": ("filter",),
    "no-namespaces": ("namespaces",),
    "filter-only": FEATURES[:-1],
    "none": FEATURES,
}
NAMED = "import ctypes, os, sys, time\nctypes.CDLL(None).prctl(15, {!r}.encode(), 0, 0, 0)\n"
"""Gives a process a name by which the test finds it."""


@pytest.fixture(params=WITHOUT)
def level(request: pytest.FixtureRequest) -> Level:
    """The machine's level without some layers."""
    return probe(WITHOUT[request.param])


def run(source: str, tests: str, level: Level | None = None, **limits: int) -> Verdict:
    return run_python(textwrap.dedent(source), Calls(tests), Limits(**limits), level)


def pids_named(name: str) -> list[int]:
    """Processes of this name, at any depth of process namespaces."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def attack(body: str, level: Level, what: str, **limits: int) -> bool:
    """Whether an attack, a function that returns True if it worked, works; it may only where the level says so."""
    verdict = run(
        "import os, socket\ndef attack():\n" + textwrap.indent(textwrap.dedent(body), "    "), "assert attack() is True", level
    )
    assert verdict.outcome in ("passed", "failed"), verdict
    worked = verdict.outcome == "passed"
    assert worked <= any(what in text for text in level.open), (verdict, level)
    return worked


def test_passing_and_failing_solutions_are_told_apart(level: Level) -> None:
    """The verdict follows the tests at every level, for functions and for programs."""
    right, wrong = "def f(x):\n    return x + 1\n", "def f(x):\n    return x - 1\n"
    assert run(right, "assert f(1) == 2", level) == Verdict("passed")
    assert run(wrong, "assert f(1) == 2", level) == Verdict("failed", why="AssertionError")
    double = "print(2 * int(input()))"
    assert run_python(double, Program([("1", "2"), ("4\n", "8 \n")]), level=level) == Verdict("passed", 2, 2)
    assert run_python(double, Program([("1", "3"), ("4", "8")], partial=True), level=level).passed == 1


def test_level_names_what_is_not_contained() -> None:
    """The fewer layers, the more the line names; a level is full only with namespaces and Landlock."""
    levels = {name: probe(without) for name, without in WITHOUT.items()}
    assert levels["none"].name == levels["filter-only"].name == "none"
    assert levels["no-namespaces"].name in ("landlock", "none")
    assert set(levels["all"].open) <= set(levels["no-filter"].open) <= set(levels["none"].open)
    line = str(levels["none"])
    assert line.startswith("sandbox level none: not contained: files") and "\n" not in line
    assert all(word in line for word in ("TCP", "UDP", "signals", "outlive"))
    if levels["all"].name == "full":
        assert {"namespaces", "landlock"} <= levels["all"].features


@pytest.mark.parametrize("without", ["all", "none"])
def test_endless_loop_ends_at_the_cpu_limit(without: str) -> None:
    """It is a timeout, and no process is left."""
    level = probe(WITHOUT[without])
    name = secrets.token_hex(6)
    verdict = run(NAMED.format(name) + "def f():\n    while True: pass", "f()", level, cpu_seconds=1, wall_seconds=60)
    assert verdict.outcome == "timeout" and "CPU" in verdict.why, verdict
    wait_until(lambda: not pids_named(name), seconds=5)


@pytest.mark.parametrize("where", ["", "f()"])
def test_sleep_ends_at_the_wall_limit(where: str) -> None:
    """Whether it sleeps when it is loaded or in a call."""
    began = time.monotonic()
    source = "import time\ndef f(): time.sleep(100)\n" + ("" if where else "f()")
    assert run(source, where, wall_seconds=2).outcome == "timeout"
    assert time.monotonic() - began < 6


def test_flood_of_output_is_stopped(level: Level) -> None:
    """Printing without end is the outcome `output`, in a call as in a program."""
    assert run("def f():\n    while True: print('x' * 1000)", "f()", level).outcome == "output"
    program = "while True: print('x' * 1000)"
    assert run_python(program, Program([("", "")]), level=level).outcome == "output"


def test_memory_is_limited(level: Level) -> None:
    """An allocation of 2 GB fails in a call, when the solution is loaded and in a program."""
    allocate = "x = bytearray(2 << 30)"
    assert run(f"def f():\n    {allocate}", "f()", level).outcome == "memory"
    assert run(allocate, "", level).outcome == "memory"
    assert run_python(allocate, Program([("", "")]), level=level).outcome == "memory"


def test_forks_are_limited(level: Level) -> None:
    """At most as many processes as the limit; none is left."""
    name = secrets.token_hex(6)
    source = """
        def f():
            made = 0
            for _ in range(60):
                try:
                    pid = os.fork()
                except OSError:
                    break
                if not pid:
                    time.sleep(10)
                    os._exit(0)
                made += 1
            return made
        """
    outcome = run(NAMED.format(name) + textwrap.dedent(source), "assert f() < 16", level, processes=16).outcome
    if not any("number of processes" in text for text in level.open):
        assert outcome == "passed"
    wait_until(lambda: not pids_named(name), seconds=4)  # those that a group of processes has are killed at every level


def test_daemon_ends_with_its_solution(level: Level) -> None:
    """A grandchild in a session of its own does not outlive the solution, except where the level says so."""
    name = secrets.token_hex(6)
    source = """
        def f():
            if os.fork():
                time.sleep(0.2)
                return 1
            os.setsid()
            if os.fork():
                os._exit(0)
            os.closerange(0, 64)
            time.sleep(10)
            os._exit(0)
        """
    source = NAMED.format(name) + textwrap.dedent(source)
    verdict = run(source, "assert f() == 1", level)
    if any("outlive" in text for text in level.open):
        assert verdict.outcome == "passed" and pids_named(name), "the attack should work where nothing contains it"
        for pid in pids_named(name):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not pids_named(name), seconds=2)


def test_files_outside_its_folder_are_closed(level: Level, tmp_path: Path) -> None:
    """A solution neither reads nor writes what any user may, but may use its own folder."""
    tmp_path.chmod(0o777)
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("s")
    secret.chmod(0o666)
    read = attack(f"try: return open({str(secret)!r}).read() == 's'\nexcept PermissionError: return False", level, "files")
    attack("try: return bool(open('/etc/passwd').read())\nexcept PermissionError: return False", level, "files")
    for path in (secret, target):
        attack(f"try: return open({str(path)!r}, 'w').write('x') == 1\nexcept PermissionError: return False", level, "files")
    if level.name == "none":
        assert read, "the attack should work where nothing contains it"
    else:
        assert secret.read_text() == "s" and not target.exists()
    own = "import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as file: return file.write('x')"
    assert run(own, "assert f() == 1", level) == Verdict("passed")


def test_programs_cannot_be_started(level: Level) -> None:
    """Neither in place of the solution nor as its child."""
    verdict = run("import os\ndef f():\n    os.execv('/bin/sh', ['sh', '-c', 'sleep 0'])", "f()", level)
    assert verdict.outcome == "failed"
    if {"landlock", "filter"} & level.features:
        assert verdict.why.startswith("PermissionError"), verdict


@pytest.mark.parametrize("kind", ["TCP", "UDP", "unix"])
def test_sockets_reach_nobody(kind: str, level: Level) -> None:
    """A server of this machine hears nothing from a solution."""
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    name = f"\0{secrets.token_hex(8)}" if kind == "unix" else ("127.0.0.1", 0)
    with socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM) as server:
        server.bind(name)
        if kind == "TCP":
            server.listen()
        server.settimeout(0.05)
        body = f"""
            try:
                s = socket.socket({int(family)}, {int(server.type)})
                s.connect({server.getsockname()!r})
                s.send(b'x')
            except OSError:
                return False
            return True
        """
        heard = attack(body, level, "TCP" if kind == "TCP" else "UDP")
        if level.features == set():
            assert heard, "the attack should work where nothing contains it"
        try:
            assert (server.accept() if kind == "TCP" else server.recv(1)) and heard
        except TimeoutError:
            assert not heard


def test_signals_do_not_reach_other_processes(level: Level) -> None:
    """Neither this process nor another of the same user can be signalled."""
    with subprocess.Popen(["sleep", "20"]) as victim:
        body = f"try: os.kill({victim.pid}, 15)\nexcept OSError: return False\nreturn True"
        hit = attack(body, level, "signals")
        if hit:
            assert victim.wait(5) == -signal.SIGTERM
        assert hit or victim.poll() is None
        victim.kill()
    attack(f"try: os.kill({os.getpid()}, 0)\nexcept OSError: return False\nreturn True", level, "signals")


def test_disk_space_is_limited() -> None:
    """All files together fit the limit where the folder is in memory, and each file elsewhere."""
    level = probe()
    body = "for i in range(40):\n    with open(str(i), 'wb') as file: file.write(bytes(1 << 20))\nreturn True"
    assert run("def f():\n" + textwrap.indent(body, "    "), "assert f()", level, disk_mb=8).outcome == (
        "failed" if "tmpfs" in level.features else "passed"
    )
    one = "def f():\n    with open('x', 'wb') as file: file.write(bytes(9 << 20))"
    assert run(one, "f()", probe(FEATURES), disk_mb=8).outcome in ("failed", "signal")


WRITE_ALL = """
import os
def write(data):
    for file in range(3, 64):
        try: os.write(file, data)
        except OSError: pass
"""
FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits in the call": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "prints success": "print('contained\\nx passed 1 1')\ndef f(x): print('passed'); return 0",
    "equals everything": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "is a string that equals everything": "class A(str):\n    def __eq__(self, other): return True\ndef f(x): return A('3')",
    "is its own argument": "def f(x): return x",
    "patches builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.str = lambda x: ''\ndef f(x): return 9",
    "patches the judge": """
import sys
sys.modules['trainkit.rl.sandbox.judge'].judge_calls = lambda *a: ('passed', 1, 1, '')
def f(x): return 0
""",
    "writes to every file": WRITE_ALL + "write(b'x passed 1 1 \\n')\nos._exit(0)",
    "sends a pickle that calls os.system": WRITE_ALL + """
def f(x):
    data = b'cos\\nsystem\\n(S"touch evil"\\ntR.'
    write(len(data).to_bytes(8, 'little') + data)
""",
    "sends a pickle that changes a class": WRITE_ALL + """
def always(*a): return True
def f(x):
    number = bytes([list(globals()).index('always')])
    patch = b"cfractions\\nFraction\\nN}X\\x06\\0\\0\\0__eq__K" + number + b"Qs\\x86b"
    data = b"\\x80\\x04\\x88" + patch + b")\\x87."
    write(len(data).to_bytes(8, 'little') + data)
    return True
""",
    "sends a length without end": WRITE_ALL + "def f(x):\n    write(b'\\xff' * 8)\n    os._exit(0)",
    "looks for the tests": """
import gc, re, sys
def f(x):
    frame, texts = sys._getframe(), []
    while frame:
        texts.append(str(frame.f_locals))
        frame = frame.f_back
    texts += [str(o) for o in gc.get_objects() if type(o) in (dict, list, tuple)]
    found = [m[1] for text in texts for m in [re.search(r"f\\(1\\) in \\[7654, '(\\w+)'", text)] if m]
    return found[0] if found else 0
""",
    "kills the judge": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "attaches to the judge": """
import ctypes, os
def f(x): return 0 if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) else 7654
""",
    "opens the judge's files": """
import os
def f(x):
    for n in range(3, 32):
        try:
            open(f'/proc/{os.getppid()}/fd/{n}', 'wb').close()
            return 7654
        except OSError: pass
""",
    "crashes": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "nests without end": "def f(x):\n    a = []\n    for _ in range(10 ** 5): a = [a]\n    return a",
    "raises with strange text": """
class E(Exception):
    def __str__(self): return '\\ud800\\n\\nx passed 1 1'
def f(x): raise E
""",
    "is no Python": "def f(x) return 7654",
    "has a null": "\0",
    "has half a character": "def f(x): return '\ud800'",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_success_cannot_be_forged(name: str) -> None:
    """Only a solution that returns the right value passes, with the filter of system calls and without layers."""
    token = secrets.token_hex(8)
    tests = f"from fractions import Fraction\nassert f(1) in [7654, {token!r}, Fraction(1, 3)]"
    for level in (probe(), probe(FEATURES)):
        verdict = run(FORGERIES[name], tests, level, wall_seconds=2)
        assert verdict.outcome in ("failed", "signal", "memory", "timeout"), verdict
        assert not Path("evil").exists() and "\n" not in verdict.why


def test_trainer_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solution does not see this process's variables."""
    monkeypatch.setenv("SECRET_KEY", "s")
    assert run("import os\ndef f(): return sorted(os.environ)", "assert 'SECRET_KEY' not in f()").outcome == "passed"


def test_results_are_the_same_in_every_run() -> None:
    """Strings hash alike, so that the order of a set does not depend on chance."""
    source = "def f(): return list({'a', 'b', 'c', 'd', 'e'})"
    orders = {run(source, "raise Exception(str(f()))").why for _ in range(4)}
    assert len(orders) == 1 and "['" in orders.pop()


def test_calls_pass_data_objects_and_changes() -> None:
    """Classes of the solution, its exceptions, iterators, named tuples, callables and changed arguments reach the tests."""
    source = """
        from collections import namedtuple, Counter
        from fractions import Fraction
        from datetime import date
        P = namedtuple("P", "x y")
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x)
            def pop(self): return self.items.pop()
            def __len__(self): return len(self.items)
            def __str__(self): return "stack"
        def point(): return P(1, [2])
        def count(s): return Counter(s)
        def numbers(): yield from range(3)
        def half(d): return [Fraction(1, 2), d]
        def add(n): return lambda m: n + m
        def order(items): items.sort()
        def total(stacks): return sum(len(s) for s in stacks)
        def fail(): raise KeyError("k")
        def own():
            class Own(Exception): pass
            raise Own("o")
        """
    tests = """
        from fractions import Fraction
        from datetime import date
        assert point() == (1, [2]) and count("aab") == {"a": 2, "b": 1} and list(numbers()) == [0, 1, 2]
        assert half(date(2020, 1, 2)) == [Fraction(1, 2), date(2020, 1, 2)] and add(1)(2) == 3
        s = Stack(); s.push(5); s.push(6)
        assert len(s) == 2 and s.pop() == 6 and str(s) == "stack" and s.items == [5] and total([s, s]) == 2 and s == s
        x = [3, 1, 2]; order(x)
        assert x == [1, 2, 3]
        for function, kind in ((fail, KeyError), (own, RuntimeError)):
            try: function()
            except kind as error: assert "k" in str(error) or "Own: o" in str(error)
            else: assert False
        """
    verdict = run(source, textwrap.dedent(tests))
    assert verdict.outcome == "passed", verdict


def test_what_tests_cannot_pass_is_a_sandbox_error() -> None:
    """A function of the tests cannot be sent to the solution, and setup that raises is no fault of the solution."""
    verdict = run("def f(g): return g(1)", "assert f(lambda x: x) == 1")
    assert verdict.outcome == "sandbox_error" and "cannot be sent" in verdict.why
    verdict = run_python("def f(): return 1", Calls("assert f() == 1", setup="import missing"))
    assert verdict.outcome == "sandbox_error" and "cannot be prepared" in verdict.why and "missing" in verdict.why


def test_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left on disk, not even by a deep folder that nobody may enter."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    body = "import os\nfor _ in range(300):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w').close()\nos.chmod('.', 0)\n"
    body += "def f(): return 1"
    for without in ((), ("namespaces",), FEATURES):
        assert run(body, "assert f() == 1", probe(without)) == Verdict("passed")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("without", ["all", "no-filter", "no-namespaces"])
def test_solution_ends_with_its_trainer(without: str, tmp_path: Path) -> None:
    """A trainer that is killed leaves no process behind, and no file where the folder is in memory."""
    name = secrets.token_hex(6)
    source = NAMED.format(name) + "time.sleep(30)"
    code = f"from trainkit.rl.sandbox.run import *\nrun_python({source!r}, Calls(''), level=probe({WITHOUT[without]!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as trainer:
        wait_until(lambda: bool(pids_named(name)), trainer.pid)
        assert pids_named(name)
        trainer.kill()
    wait_until(lambda: not pids_named(name), seconds=5)
    assert "tmpfs" not in probe(WITHOUT[without]).features or not list(tmp_path.iterdir())


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows get one line."""
    for name in ("darwin", "win32"):
        monkeypatch.setattr(sandbox.sys, "platform", name)
        with pytest.raises(UserError, match="only on Linux"):
            probe.__wrapped__()


def test_missing_layer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that forbids namespaces gets the next level with the reason; one that runs nothing is refused."""
    real = sandbox.run_python

    def forbidden(source: str, tests: Calls, level: Level) -> Verdict:
        if "namespaces" in level.features:
            return Verdict("sandbox_error", why="unshare: Operation not permitted")
        return real(source, tests, level=level)

    monkeypatch.setattr(sandbox, "run_python", forbidden)
    level = probe.__wrapped__()
    assert level.name in ("landlock", "none") and "namespaces" not in level.features and "unshare" in str(level)
    monkeypatch.setattr(sandbox, "run_python", lambda *a, **k: Verdict("sandbox_error", why="no processes"))
    with pytest.raises(UserError, match="does not start: no processes"):
        probe.__wrapped__()


@pytest.mark.parametrize("limits", [{"wall_seconds": 0}, {"memory_mb": 1.5}, {"files": True}])
def test_wrong_limits_are_refused(limits: dict[str, int]) -> None:
    """A limit is a positive whole number."""
    with pytest.raises(UserError, match=f"limit {next(iter(limits))}"):
        Limits(**limits)
