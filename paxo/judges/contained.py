"""The two small programs between a judge and code that nobody has read. Standard library only.

`supervise` goes into namespaces of its own where the system has them, starts `execute` under
resource limits in a folder of its own, reads its output up to a bound and kills it at the time
limit. `execute` refuses sockets, processes and writes elsewhere by an audit hook, runs the code and
then the tests, and says how it went through another hook, which holds what the supervisor takes for
a verdict where the code cannot read it. Both are started by `paxo.judges.sandbox` as scripts.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

VERDICT = 3  # file descriptor on which `execute` answers
MAX_VERDICT = 1 << 16

# From the kernel's headers; the numbers are the same on every architecture.
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534


def supervise() -> None:
    """Reads a job from standard input, runs it and prints `{status, detail, output, steps}`."""
    job = json.load(sys.stdin)
    steps: list[str] = []
    if job["namespaces"]:
        try:
            steps = enter_namespaces(job["scratch"], job["disk_bytes"])
        except OSError as error:
            print(json.dumps({"status": "unavailable", "detail": str(error)}))
            return
    job_read, job_write = os.pipe()
    out_read, out_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become_executor(job, job_read, out_write, verdict_write)
        finally:
            os._exit(127)
    for end in (job_read, out_write, verdict_write):
        os.close(end)
    result = watch(child, job, job_write, out_read, verdict_read)
    print(json.dumps(result | {"steps": steps}))


def enter_namespaces(scratch: str, disk_bytes: int) -> list[str]:
    """Leaves network, processes and file system behind; returns what was possible of it.

    Raises:
        OSError: if not even the network could be left.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: Any, *arguments: Any) -> None:
        if function(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
    call(libc.unshare, flags)
    # An ordinary user inside, so that the capabilities of this process end at the next exec.
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as mapping:
            mapping.write(text)
    steps = ["network", "processes"]
    attributes = ctypes.c_uint64 * 4
    size = ctypes.c_size_t(ctypes.sizeof(attributes))

    def set_attributes(path: str, flags: int, add: int, remove: int) -> None:
        wanted = attributes(add, remove, 0, 0)
        call(
            libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), flags,
            ctypes.byref(wanted), size,
        )  # fmt: skip

    mount = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    libc.mount.argtypes = mount
    try:
        call(libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
        options = f"size={disk_bytes},mode=700".encode()
        call(libc.mount, b"tmpfs", os.fsencode(scratch), b"tmpfs", MS_NOSUID | MS_NODEV, options)
        steps.append("disk space")
        set_attributes("/", AT_RECURSIVE, MOUNT_ATTR_RDONLY, 0)
        set_attributes(scratch, 0, 0, MOUNT_ATTR_RDONLY)
        steps.append("file system")
    except OSError:  # an older kernel, or one that allows no mounts: `steps` says so
        pass
    return steps


def become_executor(job: dict[str, Any], job_read: int, out_write: int, verdict: int) -> None:
    """Turns this process into `execute`, under its limits."""
    import ctypes

    os.setsid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if job["namespaces"]:  # its own processes only; where it is refused, the old view stays
            libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
            first_process()
    os.chdir(job["scratch"])
    for source, target in ((job_read, 0), (out_write, 1), (out_write, 2), (verdict, VERDICT)):
        # The first pipe may lie at 3 itself, but has been copied by then.
        os.dup2(source, target)
    os.closerange(VERDICT + 1, 256)
    set_limits(job)
    environment = {
        "HOME": job["scratch"],
        "TMPDIR": job["scratch"],
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    script = os.path.abspath(__file__)
    os.execve(sys.executable, [sys.executable, "-I", "-B", script, "execute"], environment)


def first_process() -> None:
    """Forks: the first process of a namespace ignores signals, so that the code is to be another.

    The second process returns; the first waits for it and ends with 128 + signal or its code.
    """
    second = os.fork()
    if second == 0:
        return
    os.closerange(0, 256)  # the pipes end when the code closes them
    ended = 0
    while ended != second:
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def set_limits(job: dict[str, Any]) -> None:
    """Memory, processor time, size of files, number of files and of processes."""
    import resource

    seconds = int(job["seconds"]) + 2
    limits = {
        "RLIMIT_AS": job["memory_bytes"],
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": job["disk_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    # The number of a user's processes is counted by namespace from Linux 5.14 on; before that, and
    # outside, those of the whole machine would count.
    if job["namespaces"] and kernel_version() >= (5, 14):
        limits["RLIMIT_NPROC"] = job["processes"]
    for name, limit in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def watch(
    child: int, job: dict[str, Any], job_write: int, out_read: int, verdict_read: int
) -> dict[str, Any]:
    """Feeds the job in, reads output and verdict, and kills the child at the end or in time."""
    start = time.monotonic()
    deadline = start + job["seconds"]
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    text = json.dumps({name: job[name] for name in ("program", "tests", "scratch", "token")})
    to_write, output, verdict, status = memoryview(text.encode()), b"", b"", None
    reading, writing = {out_read, verdict_read}, {job_write}
    for end in (*reading, *writing):
        os.set_blocking(end, False)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or (verdict_read not in reading and status is not None):
            break
        readable, writable, _ = select.select(reading, writing, [], min(left, 0.02))
        if writable:
            try:
                to_write = to_write[os.write(job_write, to_write) :]
            except BrokenPipeError:
                to_write = to_write[:0]
            if not to_write:
                os.close(job_write)
                writing = set()
        for end in readable:
            piece = os.read(end, 65536)
            if not piece:
                reading.discard(end)
            elif end == out_read:
                output += piece[: job["output_bytes"] - len(output)]
            elif len(verdict) < MAX_VERDICT:
                verdict += piece
        if status is None:
            ended, found = os.waitpid(child, os.WNOHANG)
            status = found if ended else None
    late = status is None
    if late:  # the first process of a namespace takes all others with it
        os.kill(child, signal.SIGKILL)
    # Elsewhere its group goes; it has none where it was killed before it made one.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if late:
        _, status = os.waitpid(child, 0)
    with contextlib.suppress(BlockingIOError):
        while len(output) < job["output_bytes"] and (piece := os.read(out_read, 65536)):
            output += piece[: job["output_bytes"] - len(output)]
    result = judge_end(verdict, job, status, late)
    return result | {
        "output": output.decode(errors="replace"),
        "seconds": time.monotonic() - start,
    }


def judge_end(verdict: bytes, job: dict[str, Any], ended: int, late: bool) -> dict[str, str]:
    """`{status, detail}` from what the child said and how it ended."""
    word, _, rest = verdict.decode(errors="replace").partition(" ")
    if word == "passed" and rest == job["token"]:
        return {"status": "passed", "detail": ""}
    if word in ("failed", "error"):  # whoever says so is believed
        return {"status": word, "detail": rest}
    code = os.waitstatus_to_exitcode(ended)
    if job["namespaces"] and code > 128:
        code = 128 - code
    if late or code == -signal.SIGXCPU:
        return {"status": "timeout", "detail": f"not finished after {job['seconds']} s"}
    if code < 0:
        how = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        return {"status": "error", "detail": f"killed by {how} before the tests were over"}
    return {"status": "error", "detail": f"left with code {code} before the tests were over"}


def execute() -> None:
    """Reads the job from standard input, runs code and tests, and answers on `VERDICT`."""
    with open(0, "rb", closefd=False) as pipe:
        job = json.loads(pipe.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.set_inheritable(VERDICT, False)
    sys.argv = ["candidate"]
    refuse_unheard()
    namespace = types.ModuleType("candidate")
    sys.modules["candidate"] = namespace
    # Bound here, before the code can put something else in their places. It can reach this frame,
    # which therefore holds neither the token nor, until they run, the tests.
    run, say, write, leave, explain, assertion = (
        exec, sys.audit, os.write, os._exit, describe, AssertionError,
    )  # fmt: skip
    program, namespace, tests = job["program"], namespace.__dict__, []
    sys.addaudithook(make_referee(sys._getframe(), job["token"], job["tests"]))
    sys.addaudithook(make_hook(os.path.realpath(job["scratch"])))
    del job
    try:
        run(compile(program, "<code>", "exec"), namespace)
        say("paxo.tests", tests)
        run(tests[0], namespace) or flush() or say("paxo.passed")
    except BaseException as error:
        flush()
        word = "failed" if tests and isinstance(error, assertion) else "error"
        stage = "tests" if tests else "code"
        write(VERDICT, f"{word} {stage}: {explain(error)}".encode(errors="replace"))
        leave(0)
    leave(1)


def flush() -> None:
    """What the code has printed and Python still holds."""
    with contextlib.suppress(BaseException):  # what cannot be printed is not printed
        sys.stdout.flush()


def make_referee(trusted: types.FrameType, token: str, tests: str) -> Callable[[str, tuple], None]:
    """An audit hook that hands the tests over and says that they passed, for one frame alone.

    The interpreter holds the hook and gives it to nobody. "paxo.tests" puts the compiled tests into
    a list; "paxo.passed" sends the token and ends the process. It is heeded only in the line that
    has run these tests, so they have come to their end: what is called in this frame on an error,
    when an object goes or a signal comes, stands in another line.
    """
    frame_of, trace, write, leave = sys._getframe, sys.settrace, os.write, os._exit
    verdict, line = VERDICT, 0
    try:
        ready: Any = compile(tests, "<tests>", "exec")
    except Exception:
        ready = tests  # running them says what is wrong

    def referee(event: str, arguments: tuple) -> None:
        nonlocal line
        if event not in ("paxo.tests", "exec", "paxo.passed"):
            return
        try:
            if frame_of(1) is not trusted:
                return
            if event == "paxo.tests":
                arguments[0].append(ready)
                trace(None)  # or else the tests could be led past their lines
            elif event == "exec" and arguments[0] is ready:
                line = line or trusted.f_lineno
            elif event == "paxo.passed" and trusted.f_lineno == line:
                write(verdict, f"passed {token}".encode())
                leave(0)
        except:  # noqa: E722  an error's traceback would show this frame, and names can be replaced
            return

    return referee


def refuse_unheard() -> None:
    """Puts refusals in the place of functions of `os` that the audit hook does not hear of."""
    import posix

    for name in ("mkfifo", "mknod", "pidfd_open"):
        if hasattr(posix, name):

            def refused(*arguments: Any, name: str = name, **named: Any) -> None:
                raise PermissionError(f"code under test may not do this: os.{name} {arguments!r}")

            setattr(os, name, refused)
            setattr(posix, name, refused)


def describe(error: BaseException) -> str:
    """Type and text of an error, with the line where it rose."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<code>", "<tests>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        text = str(error)[:300]
    except BaseException:  # the code may define what its errors print
        text = "(cannot be printed)"
    return f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


REFUSED = {
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
    "os.startfile", "os.system", "pty.spawn", "resource.prlimit", "resource.setrlimit",
    "signal.pthread_kill", "subprocess.Popen", "ctypes.call_function", "ctypes.dlsym",
    "ctypes.dlsym/handle", "ctypes.cdata", "ctypes.string_at", "ctypes.wstring_at",
    # What shows every object and every thread.
    "gc.get_objects", "gc.get_referents", "gc.get_referrers", "sys._current_frames",
    "sys._current_exceptions",
}  # fmt: skip
# Event -> (place of a path among its arguments, place of its folder's descriptor or None) each.
PATHS = {
    "os.chflags": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.removexattr": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "sqlite3.connect": ((0, None),),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def make_hook(scratch: str) -> Callable[[str, tuple], None]:
    """An audit hook that refuses sockets, processes, native code and changes outside `scratch`.

    Also memory, environment and command line of processes, its own memory too. It is no wall:
    native code that Python calls without an event passes it.
    """
    realpath, fsdecode, readlink, isabs = os.path.realpath, os.fsdecode, os.readlink, os.path.isabs
    join, prefix = os.path.join, scratch.rstrip(os.sep) + os.sep
    own, testing = realpath("/proc/self") + os.sep, False

    def inside(path: Any, folder: Any) -> bool:
        if isinstance(path, int):  # an open file: it was checked when it was opened
            return True
        path = fsdecode(path)
        if path in (os.devnull, ":memory:"):
            return True
        if isinstance(folder, int) and folder >= 0:
            path = join(readlink(f"/proc/self/fd/{folder}"), path)
        path = realpath(path)
        return path == scratch or path.startswith(prefix)

    def may_open(path: Any, mode: Any, flags: int) -> bool:
        if isinstance(path, int):
            return True
        name = fsdecode(path)
        if mode is None and not isabs(name):  # `os.open` does not say of which folder
            return not flags & WRITING and name.rpartition(os.sep)[2] not in ("mem", "environ")
        if flags & WRITING:
            return inside(path, None)
        name = realpath(name)
        of_process = name.startswith("/proc/") and name[6:7].isdigit()
        return not of_process or (name.startswith(own) and not name.endswith("/mem"))

    def hook(event: str, arguments: tuple) -> None:
        nonlocal testing
        testing = testing or event == "paxo.tests"
        if event == "open":
            allowed = may_open(*arguments)
        elif event in PATHS:
            allowed = all(
                inside(arguments[path], None if folder is None else arguments[folder])
                for path, folder in PATHS[event]
            )
        elif event == "ctypes.dlopen":
            allowed = arguments[0] is None  # what `import ctypes` does
        else:
            allowed = event not in REFUSED and not event.startswith("socket.")
            allowed = allowed and not (testing and event == "sys.settrace")
        if not allowed:
            raise PermissionError(f"code under test may not do this: {event} {arguments!r:.200}")

    return hook


if __name__ == "__main__":
    {"supervise": supervise, "execute": execute}[sys.argv[1]]()
