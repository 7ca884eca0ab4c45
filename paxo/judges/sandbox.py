"""Runs a program that nobody has read, with limits, and says how it ended.

What holds it, on Linux where user namespaces are allowed: a network namespace without any
interface; a process namespace, whose processes all end with the first one; a mount namespace in
which everything but the scratch folder is read-only, and the scratch folder is memory of limited
size. Elsewhere, and everywhere in addition: an audit hook of Python that refuses sockets, new
processes, native calls and changes of files outside the scratch folder. Everywhere: limits of
memory, processor and wall time, file size and open files; an empty environment; output bounded.

What is not held: files that this user can read are read, except memory and environment of other
processes. Without namespaces, code that reaches native functions past Python's audit events can
open sockets, start processes and change this user's files. Tests run in the process of the code
they test. They are handed over when the code has run, and a pass is sent by a hook that no frame
leads to; leaving early, forging an answer or skipping lines of the tests is no pass. Code written
to deceive the tests themselves still can: by objects that equal everything, by builtins put in the
place of others, by the constants of the function that calls it. So can native code, and code that
interrupts the hook. The memory limit is for each process; the limit of processes needs namespaces
and Linux 5.14, and does not bind root: then the time limit ends them. Where that is not enough, run
the whole program in a container or a virtual machine.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Literal

logger = logging.getLogger(__name__)

Isolation = Literal["auto", "namespaces", "audit"]
STATUSES = ("passed", "failed", "error", "timeout")
# What the supervisor may take beyond the time limit, to start and to end.
GRACE_SECONDS = 20.0


class SandboxError(RuntimeError):
    """This system cannot run the sandbox: no verdict about any code."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall time, with starting Python.
        memory_mb: address space of a process, in MiB.
        disk_mb: files in the scratch folder, in MiB.
        output_bytes: of standard output and error together that are kept; the rest is read and
            dropped.
        processes: processes and threads, where the kernel counts them by namespace.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    disk_mb: int = 64
    output_bytes: int = 16384
    processes: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"Limits.{field.name} must be above 0; got {value!r}")
        if self.memory_mb < 128:
            raise ValueError(
                f"Limits.memory_mb must be at least 128, for Python itself; got {self.memory_mb}"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed"; "failed", a test's assertion did not hold; "error", anything else went
            wrong in code or tests, memory that ran out and refused acts too; "timeout".
        detail: type, text and line of the error; empty if it passed.
        output: what it printed, bounded.
        seconds: wall time.
    """

    status: str
    detail: str
    output: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Runs programs one at a time; as many threads as one likes may do so at once.

    Attributes:
        limits: of each program.
        isolation: "auto" takes namespaces where the system allows them and the audit hook alone
            elsewhere, and the log says which; "namespaces" refuses to run without; "audit" takes
            the hook alone.
        python: interpreter of the programs.

    Raises:
        SandboxError: if the system has neither, or not what was asked for.

    >>> Sandbox(Limits(seconds=20)).run("def f(x): return x", "assert f(1) == 2").status
    'failed'
    """

    limits: Limits = Limits()
    isolation: Isolation = "auto"
    python: str = sys.executable

    def __post_init__(self):
        if self.isolation not in ("auto", "namespaces", "audit"):
            raise ValueError(
                f"isolation must be 'auto', 'namespaces' or 'audit'; got {self.isolation!r}"
            )
        if os.name != "posix":
            raise SandboxError(
                f"code can be run with limits on Linux and macOS, not on {sys.platform}: run it in "
                "a container"
            )
        steps = self.held_by
        if self.isolation == "namespaces" and not steps:
            raise SandboxError(
                f"isolation='namespaces', but this system allows none ({_probe(self.python)[1]}): "
                "allow unprivileged user namespaces, or take isolation='audit' in a container"
            )
        if steps:
            logger.info(
                "code runs without a network, in namespaces of its own: %s", ", ".join(steps)
            )
        else:
            logger.warning(
                "code runs without a network only as far as an audit hook refuses sockets: %s",
                "as isolation='audit' asks"
                if self.isolation == "audit"
                else f"no namespaces here ({_probe(self.python)[1]})",
            )

    @property
    def held_by(self) -> tuple[str, ...]:
        """What namespaces hold: "network", "processes", "disk space", "file system", or nothing."""
        return () if self.isolation == "audit" else _probe(self.python)[0]

    def run(self, program: str, tests: str = "") -> Outcome:
        """Runs a program, then its tests in the same module.

        Args:
            program: Python source.
            tests: Python source that raises AssertionError where the program is wrong.
        """
        result = _supervised(
            self.python, self.limits, namespaces=bool(self.held_by), program=program, tests=tests
        )
        if result["status"] not in STATUSES:
            raise SandboxError(
                f"namespaces worked at first and now do not ({result['detail']}): lower the number "
                "of workers, or raise the system's limit of user namespaces"
            )
        return Outcome(**{f.name: result[f.name] for f in dataclasses.fields(Outcome)})


@functools.lru_cache
def _probe(python: str) -> tuple[tuple[str, ...], str]:
    """What namespaces hold on this system, and why they do not if they do not."""
    if sys.platform != "linux":
        return (), f"{sys.platform} has none"
    result = _supervised(python, Limits(), namespaces=True, program="", tests="")
    if result["status"] == "unavailable":
        return (), result["detail"]
    if result["status"] != "passed":
        raise SandboxError(
            f"an empty program does not run under {python}: {result['status']}, "
            f"{result['detail']} {result['output'][-500:]}"
        )
    return tuple(result["steps"]), ""


def _supervised(python: str, limits: Limits, *, namespaces: bool, program: str, tests: str) -> dict:
    """The supervisor's answer for one program."""
    with tempfile.TemporaryDirectory(prefix="paxo-code-", ignore_cleanup_errors=True) as scratch:
        job = {
            "program": program,
            "tests": tests,
            "scratch": scratch,
            "namespaces": namespaces,
            "token": secrets.token_hex(16),
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mb << 20,
            "disk_bytes": limits.disk_mb << 20,
            "output_bytes": limits.output_bytes,
            "processes": limits.processes,
        }
        script = str(pathlib.Path(__file__).with_name("contained.py"))
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", "-B", script, "supervise"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(
                f"the interpreter of programs cannot be started ({error}): name another, "
                "Sandbox(python=...)"
            ) from error
        try:
            said, errors = process.communicate(
                json.dumps(job).encode(), timeout=limits.seconds + GRACE_SECONDS
            )
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise SandboxError(f"the supervisor hung for {GRACE_SECONDS} s") from error
            raise
    try:
        return json.loads(said)
    except ValueError as error:
        raise SandboxError(
            f"the supervisor ended with code {process.returncode}: {errors.decode()[-500:]}"
        ) from error
