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
import json, os
os.write(3, json.dumps({"status": "passed", "detail": "", "token": ""}).encode())
os._exit(0)
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
    ],
)
def test_the_status_says_how_it_ended(sandbox, program, tests, status, detail):
    found = sandbox.run(program, tests)
    assert (found.status, detail in found.detail) == (status, True), found


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(99)", "try:\n  while 1: pass\nexcept: 1"],
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


@pytest.mark.parametrize(
    "program",
    [
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
    ],
)
def test_sockets_processes_and_changes_elsewhere_are_refused(sandbox, program, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    found = sandbox.run(program.format(victim=str(victim), folder=str(tmp_path)))
    assert found.status == "error", found
    assert "code under test may not do this" in found.detail + found.output
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
