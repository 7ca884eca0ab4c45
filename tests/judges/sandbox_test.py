"""Code that nobody has read: what it may do, what ends it, and what it cannot reach."""

import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from paxo.judges import sandbox as sandbox_lib
from paxo.judges.sandbox import Limits, Sandbox, SandboxError

QUICK = Limits(seconds=20.0, memory_mb=256, disk_mb=4, output_bytes=2000)
NAMESPACES = bool(sandbox_lib._probe(sys.executable)[0])
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="this system allows no namespaces")

# Popen reports what it does to the audit hook through its module's `sys`; here it does not.
UNSEEN = """
import subprocess, sys
class Quiet:
    audit = staticmethod(lambda *event: None)
    __getattr__ = lambda self, name: getattr(sys, name)
subprocess.sys, subprocess._USE_POSIX_SPAWN = Quiet(), False
def run(*command):
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(found.stdout)
    return found.returncode
"""

FORGED = """
import os
os.write(3, b"passed ")
os._exit(0)
"""

# Looks for the 32 digits that make a verdict count, wherever Python code can look from its frames.
LOOKING = """
import re, signal, sys
def held(value, depth=4):
    if isinstance(value, (str, bytes)):
        yield from re.findall("[0-9a-f]{32}", value if isinstance(value, str) else repr(value))
    elif depth and isinstance(value, dict):
        for each in list(value.values()): yield from held(each, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for each in value: yield from held(each, depth - 1)
    elif depth and getattr(value, "__closure__", None):
        for cell in value.__closure__: yield from held(cell.cell_contents, depth - 1)
def look(frame):
    while frame:
        texts.extend(c.co_consts for c in vars_of(frame) if hasattr(c, "co_consts"))
        tokens.extend(held(dict(frame.f_locals)))
        tokens.extend(held(frame.f_globals, 1))
        frame = frame.f_back
def vars_of(frame):
    for value in dict(frame.f_locals).values():
        yield from value if isinstance(value, list) else [value]
def generator():
    yield running.gi_frame.f_back
tokens, texts = [], []
look(sys._getframe())
try: open("/nowhere", "w")
except PermissionError as error:
    trace = error.__traceback__
    while trace: look(trace.tb_frame); trace = trace.tb_next
running = generator()
look(next(running))
signal.signal(signal.SIGALRM, lambda number, frame: look(frame))
signal.raise_signal(signal.SIGALRM)
print(tokens, [text for text in texts if 4321 in text])
"""

# Each would end the process with a pass if it were believed.
SAYING = """
import json, json.encoder, sys
encode = json.encoder.JSONEncoder.encode
json.encoder.JSONEncoder.encode = lambda self, o: encode(self, {**o, "status": "passed"})
sys.audit("paxo.passed")
"""
SAYING_LATE = """
import functools, sys
class Wrong(Exception):
    __class__ = property(functools.partial(sys.audit, "paxo.passed"))
def f():
    sys.audit("paxo.passed")
    raise Wrong
"""
LEADING = """
import sys
def trace(frame, event, argument):
    if event == "line" and frame.f_code.co_filename == "<tests>" and frame.f_lineno == 2:
        frame.f_lineno = 3
    return trace
sys.settrace(trace)
"""
OWN_TESTS = """
import sys
for value in sys._getframe(1).f_locals.values():
    if type(value) is list: value.append(compile("", "<tests>", "exec"))
"""


@pytest.fixture(scope="module", params=["namespaces", "audit"])
def sandbox(request):
    if request.param == "namespaces" and not NAMESPACES:
        pytest.skip("this system allows no namespaces")
    return Sandbox(QUICK, request.param)


def running(text: str) -> bool:
    """Whether a process has `text` in its command line."""
    for folder in pathlib.Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "cmdline").read_text():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(
    ("program", "tests", "status", "detail"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", "passed", ""),
        ("def f(x): return x", "assert f(1) == 2", "failed", "tests: AssertionError:  (line 1)"),
        ("def f(x): return x", "\nassert f(1) == 2, f(1)", "failed", "AssertionError: 1 (line 2)"),
        ("def f(x): return x", "assert g(1)", "error", "tests: NameError: name 'g' is not"),
        ("assert False", "", "error", "code: AssertionError"),
        ("def f(x) return", "", "error", "code: SyntaxError"),
        ("import nowhere", "", "error", "ModuleNotFoundError"),
        ("def f(): return f()\nf()", "", "error", "RecursionError"),
        # Nothing passes that leaves before its tests.
        ("import os; os._exit(0)", "assert False", "error", "left with code 0 before the tests"),
        ("raise SystemExit(0)", "assert False", "error", "code: SystemExit: 0"),
        ("import sys; sys.exit()", "assert False", "error", "code: SystemExit"),
        ("def f(): raise SystemExit(0)", "f()\nassert False", "error", "tests: SystemExit"),
        (FORGED, "assert 0", "error", "left with code 0 before the tests"),
        ("import faulthandler; faulthandler._sigsegv()", "", "error", "killed by SIGSEGV"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "", "error", "cannot be"),
        ("import builtins; builtins.exec = lambda *a: None", "assert False", "failed", ""),
        (SAYING, "assert False", "failed", "tests: AssertionError"),
        (SAYING_LATE, "f()", "error", "tests: Wrong"),
        (LEADING, "x = 0\nassert x\ny = 1", "failed", "tests: AssertionError"),
        (OWN_TESTS, "assert False", "error", "left with code 1 before the tests were over"),
        ("import doctest, traceback; doctest.testmod(); traceback.print_stack()", "", "passed", ""),
        ("", "assert (", "error", "SyntaxError"),
    ],
)
def test_the_status_says_how_it_ended(program, tests, status, detail):
    found = Sandbox(QUICK).run(program, tests)
    assert (found.status, detail in found.detail) == (status, True), found


def test_without_namespaces_the_end_of_the_process_is_told_alike():
    sandbox = Sandbox(QUICK, "audit")
    assert sandbox.run("def f(): return 1", "assert f() == 2").status == "failed"
    assert "left with code 7" in sandbox.run("import os; os._exit(7)").detail
    segfault = sandbox.run("import faulthandler; faulthandler._sigsegv()")
    assert "killed by SIGSEGV" in segfault.detail


def test_what_a_verdict_needs_and_what_the_tests_say_is_not_found_from_any_frame(sandbox):
    found = sandbox.run(LOOKING, "assert 4321 == 0")
    assert (found.status, found.output) == ("failed", "[] []\n"), found


@pytest.mark.parametrize(
    "program",
    ["import time; time.sleep(99)", "try:\n  while 1: pass\nexcept: 1"],
)
@pytest.mark.parametrize("isolation", ["auto", "audit"])
def test_what_does_not_end_is_ended_at_the_time_limit(program, isolation):
    found = Sandbox(Limits(seconds=0.7), isolation).run(program)
    assert found.status == "timeout"
    assert found.detail == "not finished after 0.7 s"
    assert 0.7 <= found.seconds < 5


def test_a_memory_hog_runs_into_its_limit(sandbox):
    assert "MemoryError" in sandbox.run("x = bytearray(400 << 20)").detail
    assert sandbox.run("x = bytearray(50 << 20)").status == "passed"


def test_output_is_kept_up_to_a_bound_and_the_rest_is_dropped(sandbox):
    found = sandbox.run("print('x' * 10**7)")
    assert (found.status, found.output) == ("passed", "x" * 2000)
    assert sandbox.run("import sys; print('a'); print('b', file=sys.stderr)").output in (
        "a\nb\n",
        "b\na\n",
    )


def test_files_are_written_in_a_folder_of_its_own_that_is_gone_afterwards(sandbox):
    found = sandbox.run(
        "import os, tempfile\n"
        "open('mine', 'w').write('x'); os.rename('mine', 'yours'); os.mkdir('d'); os.rmdir('d')\n"
        "with tempfile.TemporaryDirectory() as d: open(d + '/z', 'w').write('z')\n"
        "print(os.getcwd(), os.listdir('.'), os.environ['HOME'])"
    )
    folder, listing, home = found.output.split()
    assert (listing, home) == ("['yours']", folder)
    assert not os.path.exists(folder)


def test_the_environment_is_empty(sandbox, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3cret")
    found = sandbox.run("import os; print(dict(os.environ))")
    assert found.status == "passed"
    assert "s3cret" not in found.output


REFUSED = [
    "import os; os.fork()",
    "import os; os.system('true')",
    "import os; os.execv('/bin/true', ['true'])",
    "import os; os.posix_spawn('/bin/true', ['true'], os.environ)",
    "import subprocess; subprocess.run(['true'])",
    "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "import os; os.kill(os.getppid(), 9)",
    "import socket; socket.socket()",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import urllib.request; urllib.request.urlopen('http://localhost:1')",
    "import ctypes; ctypes.CDLL(None).getpid()",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "open({victim!r}, 'w')",
    "open({victim!r}, 'r+')",
    "import os; os.open({victim!r}, os.O_WRONLY)",
    "import os; os.remove({victim!r})",
    "import os; os.rename({victim!r}, 'mine')",
    "import os; os.link({victim!r}, 'mine')",
    "import os; os.chmod({victim!r}, 0)",
    "import os; os.truncate({victim!r}, 0)",
    "import os; os.symlink({victim!r}, 'mine'); open('mine', 'w')",
    "import os; os.remove('../' + {victim!r}.split('/', 2)[2])",
    "import os; d = os.open({folder!r}, os.O_RDONLY); os.remove('victim', dir_fd=d)",
    "import shutil; shutil.rmtree({folder!r})",
    "import pathlib; pathlib.Path({folder!r}, 'new').mkdir()",
    "import sqlite3; sqlite3.connect({folder!r} + '/new')",
    "import os; os.symlink('x', {folder!r} + '/new')",
    "import os; os.mkfifo({folder!r} + '/new')",
    "import os; d = os.open({folder!r}, os.O_RDONLY); os.open('victim', os.O_WRONLY, dir_fd=d)",
    "import os; os.pidfd_open(os.getppid())",
    "import ctypes; ctypes.string_at(id(1), 8)",
    "import gc; gc.get_objects()",
    "import sys; sys._current_frames()",
    "open('/proc/self/mem', 'rb')",
    "import os; open(f'/proc/{{os.getppid()}}/environ')",
]


def test_sockets_processes_and_changes_elsewhere_are_refused(sandbox, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    acts = [act.format(victim=str(victim), folder=str(tmp_path)) for act in REFUSED]
    found = sandbox.run(
        f"""
        for number, act in enumerate({acts!r}):
            try:
                exec(act, {{}})
                print("done:", act)
            except Exception as error:
                if "code under test may not do this" not in str(error):
                    print(error, act)
        print(number + 1)
        """.replace("\n        ", "\n")
    )
    assert (found.status, found.output) == ("passed", f"{len(REFUSED)}\n"), found
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777
    assert os.listdir(tmp_path) == ["victim"]


@needs_namespaces
def test_past_the_audit_hook_there_is_still_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = UNSEEN + textwrap.dedent(f"""
            import sys
            code = "import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
            assert run(sys.executable, "-I", "-c", code) != 0
        """)
        found = Sandbox(QUICK, "namespaces").run(program)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert found.status == "passed", found
    assert "Network is unreachable" in found.output


@needs_namespaces
@pytest.mark.skipif(
    "file system" not in sandbox_lib._probe(sys.executable)[0], reason="mounts stay writable here"
)
def test_past_the_audit_hook_the_file_system_is_read_only_and_its_own_folder_is_bounded(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    program = UNSEEN + textwrap.dedent(f"""
        assert run("/bin/rm", "-f", {str(victim)!r}) != 0
        assert run("/bin/sh", "-c", "echo x > {victim}") != 0
        assert run("/bin/mount", "-o", "remount,rw", "/") != 0
        assert run("/bin/sh", "-c", "echo fine > mine") == 0
        for number in range(4):
            code = run("/bin/dd", "if=/dev/zero", f"of=big{{number}}", "bs=1M", "count=3")
        assert code != 0
    """)
    found = Sandbox(QUICK, "namespaces").run(program)
    assert found.status == "passed", found
    assert "Read-only file system" in found.output
    assert victim.read_text() == "precious"


@needs_namespaces
def test_past_the_audit_hook_other_processes_are_out_of_reach_and_none_is_left_behind():
    mark = "31.4159265"
    program = UNSEEN + textwrap.dedent(f"""
        subprocess.Popen(["/bin/sleep", "{mark}"], start_new_session=True)
        assert run("/bin/sh", "-c", "kill -0 {os.getpid()}") != 0
    """)
    found = Sandbox(QUICK, "namespaces").run(program)
    assert found.status == "passed", found
    deadline = time.monotonic() + 5
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(mark)


@needs_namespaces
def test_processes_past_the_hook_end_at_the_time_limit_too():
    mark = "27.1828182"
    program = UNSEEN + f'subprocess.Popen(["/bin/sleep", "{mark}"], start_new_session=True).wait()'
    assert Sandbox(Limits(seconds=1.0), "namespaces").run(program).status == "timeout"
    deadline = time.monotonic() + 5
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(mark)


def test_the_log_says_what_keeps_the_network_away(caplog):
    with caplog.at_level(logging.INFO, "paxo.judges.sandbox"):
        Sandbox(isolation="audit")
        assert "only as far as an audit hook refuses sockets" in caplog.text
        caplog.clear()
        Sandbox(isolation="auto")
    expected = "in namespaces of its own: network" if NAMESPACES else "an audit hook"
    assert expected in caplog.text


def test_without_namespaces_the_hook_alone_is_taken_and_asking_for_them_is_refused(
    monkeypatch, caplog
):
    monkeypatch.setattr(sandbox_lib, "_probe", lambda python: ((), "Operation not permitted"))
    found = Sandbox(QUICK)
    assert found.held_by == ()
    assert "no namespaces here (Operation not permitted)" in caplog.text
    assert "PermissionError" in found.run("import socket; socket.socket()").detail
    with pytest.raises(SandboxError, match=r"allows none \(Operation not permitted\)"):
        Sandbox(isolation="namespaces")


def test_namespaces_that_fail_later_are_no_verdict_and_no_fallback(monkeypatch):
    monkeypatch.setattr(sandbox_lib, "_probe", lambda python: (("network",), ""))
    answer = {"status": "unavailable", "detail": "No space left on device"}
    monkeypatch.setattr(sandbox_lib, "_supervised", lambda *args, **kwargs: answer)
    with pytest.raises(SandboxError, match="No space left"):
        Sandbox().run("")


def test_a_supervisor_that_is_killed_is_no_verdict(monkeypatch):
    found = Sandbox(QUICK)
    start = subprocess.Popen

    def killed(*args, **kwargs):
        process = start(*args, **kwargs)
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    with pytest.raises(SandboxError, match="supervisor ended with code -9"):
        found.run("")


def test_an_interpreter_that_is_not_there_is_named():
    with pytest.raises(SandboxError, match=r"cannot be started .*'/nowhere/python'"):
        Sandbox(python="/nowhere/python")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Limits(seconds=0), "Limits.seconds must be above 0"),
        (lambda: Limits(memory_mb=16), "at least 128"),
        (lambda: Sandbox(isolation="none"), "isolation must be"),
    ],
)
def test_settings_are_checked_when_they_are_made(build, says):
    with pytest.raises(ValueError, match=says):
        build()
