"""The launch scripts against stubs of gcloud, SLURM and paxo: retries, resume, clean-up, dry runs.

The stub of gcloud keeps machines as folders and runs what ssh is told in them, so the scripts'
remote halves (`launch/worker.sh`) are run for real.
"""

import ast
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paxo import cli

PROJECT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = PROJECT / "launch"
SCRIPTS = (
    "common.sh",
    "worker.sh",
    "tpu_vm.sh",
    "tpu_queued.sh",
    "gpu_node.sh",
    "gpu_slurm.sbatch",
)
FILE = "experiments/dpo_hh.py"
BUCKET = "gs://a-bucket/dpo"
QUICKLY = ("--pause", "0", "--poll", "0", "--tries", "3")
MACHINES = ("--name", "dpo", "--zone", "a-zone", "--project", "a-project", "--type", "v6e-16")

# Every stub: notes its arguments, then does what the next line of its file of faults says. Few
# imports: they would cost more than all else.
STUB = """#!{python} -IS
import fcntl, os, signal, sys, time
WORLD = {world!r}
NAME, ARGUMENTS = os.path.basename(sys.argv[0]), sys.argv[1:]

def path(*names):
    return os.path.join(WORLD, *names)

def read(name):
    with open(name) as file:
        return file.read()

def write(name, text="", mode="w"):
    with open(name, mode) as file:
        file.write(text)

def fault(what):
    with open(path("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name = path("faults", what)
        if not os.path.exists(name):
            return ""
        first, *rest = read(name).split("\\n")
        write(name, "\\n".join(rest)) if rest else os.unlink(name)
    return first

def fail(text, code=1):
    print(text, file=sys.stderr)
    raise SystemExit(code)

def copy(source, target):
    with open(source, "rb") as file:
        content = file.read()
    with open(target, "wb") as file:
        file.write(content)
    os.chmod(target, 0o755)
    return target

write(path("calls"), repr([NAME, *ARGUMENTS]) + "\\n", "a")
"""
GCLOUD = """
FOUND = {
    "quota": "ERROR: (gcloud) {'code': 8, 'message': \\"Quota limit "
    "'TPUV6EPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone a-zone.\\"}",
    "capacity": "ERROR: (gcloud) {'code': 8, 'message': 'There is no more capacity in the zone'}",
    "forbidden": "ERROR: (gcloud) PERMISSION_DENIED: tpu.nodes.create",
    "refused": "ssh: connect to host 10.0.0.2 port 22: Connection refused",
    "network": "ERROR: (gcloud) Could not reach the server",
}
STATE, HOMES = path("state"), [path("worker-0"), path("worker-1")]
state = read(STATE) if os.path.exists(STATE) else "NONE"
verb = ARGUMENTS[3]
flags = dict(a[2:].split("=", 1) for a in ARGUMENTS if a.startswith("--") and "=" in a)
queued = ARGUMENTS[2] == "queued-resources"

def take_machines():
    import shutil
    for home in HOMES:
        pid = os.path.join(home, "paxo-launch", "job.pid")
        if os.path.exists(pid):
            try:
                os.killpg(int(read(pid)), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(home, ignore_errors=True)

def on_worker(home, command):
    kept = command + " >../output-" + home[-1]
    environment = os.environ | {"HOME": home}
    code = os.spawnve(os.P_WAIT, "/bin/bash", ["bash", "-c", "cd ~ && " + kept], environment)
    text = read(path("output-" + home[-1]))
    if "output-directory" in flags:
        write(os.path.join(flags["output-directory"], home[-1] + ".log"), text)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    if code:
        sys.exit(code)

if verb == "create":
    if found := fault("create"):
        fail(FOUND[found])
    for home in HOMES:
        os.mkdir(home)
    write(STATE, "WAITING_FOR_RESOURCES" if queued else "READY")
elif verb == "describe":
    if found := fault("describe"):
        fail(FOUND[found])
    if "failedData" in flags["format"]:
        print(FOUND["quota"])
    elif state == "NONE":
        fail("ERROR: (gcloud) NOT_FOUND: Resource 'dpo' was not found")
    else:
        print(state)
        if state in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
            write(STATE, fault("queue") or "ACTIVE")
elif verb == "delete":
    if found := fault("delete"):
        fail(FOUND[found])
    take_machines()
    os.unlink(STATE)
elif verb == "scp":
    if found := fault("scp"):
        fail(FOUND[found], 255)
    for home in HOMES:
        copy(ARGUMENTS[4], os.path.join(home, os.path.basename(ARGUMENTS[4])))
elif verb == "ssh":
    words = flags["command"].split()
    found = fault("logs" if words[0] == "cat" else words[-1])
    if found == "preempt":
        take_machines()
        write(STATE, "SUSPENDED" if queued else "PREEMPTED")
        found = "refused"
    if found:
        fail(FOUND[found], 255)
    for home in HOMES:
        on_worker(home, flags["command"])
"""
UV = """
if ARGUMENTS[0] == "venv":
    os.makedirs(os.path.join(ARGUMENTS[-1], "bin"), exist_ok=True)
else:
    assert os.path.isfile(ARGUMENTS[-1].split("[")[0] + "/setup.py"), os.getcwd()
    python = ARGUMENTS[ARGUMENTS.index("--python") + 1]
    copy(path("bin", "paxo"), os.path.join(os.path.dirname(python), "paxo"))
"""
PAXO = """
assert os.path.isfile(ARGUMENTS[1]), os.getcwd()
print("training", os.environ.get("HF_TOKEN"), flush=True)
found = fault("paxo")
while found == "hang" and not os.path.exists(path("go")):
    time.sleep(0.02)
sys.exit(int(found) if found.isdigit() else 0)
"""
# A job that is queued again is ended.
SCONTROL = "write(path('requeued')), write(path('go'))\n"
SQUEUE = "print(fault('squeue') or 'RUNNING')\n"
# Slurm runs a copy of the script, and once more when it is requeued.
SBATCH = """
spool = copy(ARGUMENTS[0], path("slurm_script"))
for count in range(9):
    if os.path.exists(path("training")):
        os.unlink(path("training"))
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": os.getcwd()}
    if count:
        environment["SLURM_RESTART_COUNT"] = str(count)
    script = os.spawnve(os.P_NOWAIT, "/bin/bash", ["bash", spool, *ARGUMENTS[1:]], environment)
    if fault("time") == "up":
        while not os.path.exists(path("training")):
            time.sleep(0.02)
        os.kill(script, signal.SIGUSR1)
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    if not os.path.exists(path("requeued")):
        sys.exit(code)
    os.unlink(path("requeued"))
"""
SRUN = """
command = ARGUMENTS[ARGUMENTS.index("bash"):]
tasks = [os.spawnvp(os.P_NOWAIT, "bash", command) for _ in range(2)]
write(path("training"))
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks))
"""


class World:
    """A small checkout, stubs, the faults that they shall have, and what they were called with."""

    def __init__(self, folder, launch):
        self.folder, self.launch = folder, launch
        (folder / "bin").mkdir()
        (folder / "faults").mkdir()
        bodies = {
            "gcloud": GCLOUD,
            "uv": UV,
            "paxo": PAXO,
            "python3": "",
            "nvidia-smi": "print(580.65)",
        }
        slurm = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
        head = STUB.format(python=sys.executable, world=str(folder))
        for name, body in (bodies | slurm).items():
            (folder / "bin" / name).write_text(head + body)
            (folder / "bin" / name).chmod(0o755)

    def faults(self, **lists):
        for name, found in lists.items():
            (self.folder / "faults" / name).write_text("\n".join(str(x or "") for x in found))

    def run(self, script, *arguments, **options):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(self.launch / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env=os.environ | {"PATH": path} | options,
        )

    def tpu(self, script, *arguments, job=("--workdir", BUCKET)):
        logs = ("--logs", self.folder / "logs")
        return self.run(script, *arguments, *MACHINES, *QUICKLY, *logs, "--", FILE, *job)

    def calls(self, program="gcloud"):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(ast.literal_eval, lines) if call[0] == program]

    def verbs(self):
        """The verbs of gcloud's calls, those of ssh with the word that worker.sh was given."""
        found = []
        for call in self.calls():
            if call[3] == "ssh":
                found.append(call[-1].split()[1 if "cat" in call[-1] else -1])
            elif call[3] != "describe":
                found.append(call[3])
        return [
            verb for i, verb in enumerate(found) if found[max(i - 1, 0)] != verb or verb != "status"
        ]

    @property
    def is_there(self):
        return (self.folder / "state").exists()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """As much of the project as the scripts look at; its files are what workers are sent."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "experiments").mkdir()
    for name in (FILE, "setup.py"):
        shutil.copy(PROJECT / name, folder / name)
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    return folder


@pytest.fixture
def world(tmp_path, checkout):
    yield World(tmp_path, checkout / "launch")
    (tmp_path / "go").touch()  # a stub that hangs ends, also where a test failed


ONE_LIFE = ["create", "scp", "tpu", "start", "status", "paxo-launch/job.log", "delete"]


# --- tpu_vm.sh ------------------------------------------------------------------------------------


def test_a_vm_is_made_used_and_deleted(world):
    finished = world.tpu(
        "tpu_vm.sh", "all", "--spot", "--env", "HF_TOKEN=a b", job=("--set", "x=1 2")
    )
    assert finished.returncode == 0, finished.stderr
    assert world.verbs() == ONE_LIFE
    where = ["--zone=a-zone", "--project=a-project"]
    create = next(call for call in world.calls() if call[3] == "create")
    assert create[4:] == [
        "dpo", *where, "--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e", "--spot",
    ]  # fmt: skip
    for call in world.calls():
        assert set(where) <= set(call)
        assert ("--worker=all" in call) == (call[3] in ("ssh", "scp"))
    assert world.calls("paxo") == [["run", FILE, "--set", "x=1 2"]] * 2  # on both workers
    assert {path.name for path in (world.folder / "logs").iterdir()} == {"0.log", "1.log"}
    assert (world.folder / "logs" / "1.log").read_text() == "training a b\n"
    assert not world.is_there
    assert "no --workdir" in finished.stderr


def test_capacity_is_tried_again_and_quota_is_not(world):
    world.faults(create=["capacity", "capacity"])
    assert world.tpu("tpu_vm.sh", "all").returncode == 0
    assert world.verbs() == ["create", "create", *ONE_LIFE]
    world.faults(create=["capacity"] * 3)
    finished = world.tpu("tpu_vm.sh", "create")
    assert finished.returncode == 75
    assert "no capacity for v6e-16 in a-zone after 3 tries" in finished.stderr
    world.faults(create=["quota"])
    finished = world.tpu("tpu_vm.sh", "all")
    assert finished.returncode == 4
    assert "no quota for v6e-16 in a-zone" in finished.stderr
    assert "Limit: 0" in finished.stderr  # gcloud's own words too
    world.faults(create=["forbidden"])
    assert world.tpu("tpu_vm.sh", "all").returncode == 2
    assert not world.is_there


def test_a_worker_that_refuses_ssh_is_tried_again_and_in_the_end_given_up_and_deleted(world):
    world.faults(scp=["refused"], tpu=["refused"] * 2, start=["refused"], status=["refused"])
    assert world.tpu("tpu_vm.sh", "all").returncode == 0
    assert len(world.calls("paxo")) == 2
    world.faults(tpu=["refused"] * 3)
    finished = world.tpu("tpu_vm.sh", "all")
    assert finished.returncode == 75
    assert "installing on dpo failed 3 times" in finished.stderr
    assert world.verbs()[-1] == "delete"
    assert not world.is_there


def test_the_exit_code_of_the_job_is_that_of_the_script_and_the_others_are_stopped(world):
    world.faults(paxo=[3, "hang"])
    finished = world.tpu("tpu_vm.sh", "all")
    assert finished.returncode == 3, finished.stderr
    assert "exit code 3" in finished.stderr
    assert world.verbs() == [*ONE_LIFE[:5], "stop", *ONE_LIFE[5:]]
    assert not world.is_there


def test_a_vm_that_is_taken_away_ends_in_75_and_the_same_command_goes_on(world):
    world.faults(paxo=["hang", "hang"], status=[None, "preempt"])
    finished = world.tpu("tpu_vm.sh", "all", "--spot")
    assert finished.returncode == 75
    assert "dpo was pre-empted" in finished.stderr
    assert not world.is_there
    assert world.tpu("tpu_vm.sh", "all", "--spot").returncode == 0
    assert world.calls("paxo") == [["run", FILE, "--workdir", BUCKET]] * 4


def test_verbs_one_by_one_and_a_vm_that_is_there_is_used(world):
    for verb in ("create", "create", "install", "run", "logs"):
        assert world.tpu("tpu_vm.sh", verb).returncode == 0
        assert world.is_there
    assert world.verbs() == ONE_LIFE[:-1]
    assert world.tpu("tpu_vm.sh", "delete").returncode == 0
    assert not world.is_there
    assert world.tpu("tpu_vm.sh", "delete").returncode == 0  # there is nothing left to delete


def test_a_deletion_that_fails_is_tried_again_and_shouted_about(world):
    world.faults(delete=["network"])
    assert world.tpu("tpu_vm.sh", "all").returncode == 0
    world.faults(delete=["network"] * 3)
    finished = world.tpu("tpu_vm.sh", "all")
    assert finished.returncode == 1
    assert "dpo IS NOT DELETED AND COSTS" in finished.stderr
    assert world.is_there
    assert "is kept" in world.tpu("tpu_vm.sh", "all", "--keep").stderr
    assert world.is_there


# --- tpu_queued.sh --------------------------------------------------------------------------------


def test_queued_slices_are_waited_for_and_deleted_when_the_job_is_done(world):
    world.faults(queue=["WAITING_FOR_RESOURCES", "PROVISIONING"], describe=[None, "network"])
    finished = world.tpu("tpu_queued.sh", "--spot", "--create-flag", "--valid-until-duration=6h")
    assert finished.returncode == 0, finished.stderr
    assert world.verbs() == ONE_LIFE
    create = next(call for call in world.calls() if call[3] == "create")
    assert create[7:] == [
        "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
        "--valid-until-duration=6h", "--spot", "--node-id=dpo",
    ]  # fmt: skip
    assert "--force" in next(call for call in world.calls() if call[3] == "delete")
    assert not world.is_there


def test_pre_empted_slices_are_asked_for_again_until_the_job_is_done(world):
    world.faults(paxo=["hang"] * 4, status=[None, "preempt", None, "preempt"])
    finished = world.tpu("tpu_queued.sh", "--spot")
    assert finished.returncode == 0, finished.stderr
    assert world.calls("paxo") == [["run", FILE, "--workdir", BUCKET]] * 6
    lost = ["create", "scp", "tpu", "start", "status", "delete"]
    assert world.verbs() == [*lost, *lost, *ONE_LIFE]
    assert (
        "restart 2 of 50: the job goes on from the last checkpoint in " + BUCKET in finished.stderr
    )


def test_it_gives_up_after_the_restarts_that_were_granted(world):
    world.faults(paxo=["hang"] * 4, status=[None, "preempt"] * 2)
    finished = world.tpu("tpu_queued.sh", "--restarts", "1")
    assert finished.returncode == 75
    assert "gave up after 1 restarts" in finished.stderr
    assert not world.is_there


def test_a_crash_restarts_on_the_same_slices_and_nan_does_not(world):
    world.faults(paxo=[1, "hang"])
    finished = world.tpu("tpu_queued.sh")
    assert finished.returncode == 0, finished.stderr
    assert world.verbs().count("create") == 1
    assert world.calls("paxo") == [["run", FILE, "--workdir", BUCKET]] * 4
    world.faults(paxo=[3, "hang"])
    assert world.tpu("tpu_queued.sh").returncode == 3
    assert not world.is_there


def started(world, script, *arguments, looks=1):
    """The script in the background, as far as that many looks at its job."""
    looked = lambda: sum("status" in call[-1] for call in world.calls())  # noqa: E731
    wanted = looked() + looks
    # A shell cannot trap what was ignored when it began, as Ctrl-C is in what a script has started
    # in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            ["bash", world.launch / script, *arguments, *MACHINES, "--poll", "1", "--logs",
             world.folder / "logs", "--", FILE, "--workdir", BUCKET],
            env=os.environ | {"PATH": f"{world.folder / 'bin'}:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 30
    while looked() < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_queued.sh"])
def test_ctrl_c_deletes_the_machines(world, script):
    world.faults(paxo=["hang", "hang"])
    process = started(world, script, *(["all"] if script == "tpu_vm.sh" else []))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert world.verbs()[-1] == "delete"
    assert not world.is_there


def test_another_call_takes_the_slices_that_run_the_job(world):
    world.faults(paxo=["hang", "hang"])
    process = started(world, "tpu_queued.sh")
    process.kill()  # the machine that watched is gone, the slices are not
    process.communicate()
    assert world.is_there
    again = started(world, "tpu_queued.sh", looks=2)
    (world.folder / "go").touch()
    _, errors = again.communicate(timeout=30)
    assert again.returncode == 0, errors
    assert b"the job runs already" in errors
    assert world.verbs() == ONE_LIFE
    assert len(world.calls("paxo")) == 2


def test_slices_that_were_lost_while_nobody_looked_are_replaced(world):
    (world.folder / "state").write_text("SUSPENDED")
    assert world.tpu("tpu_queued.sh").returncode == 0
    assert world.verbs() == ["delete", *ONE_LIFE]


def test_a_request_that_failed_for_want_of_quota_ends_it(world):
    world.faults(queue=["FAILED"])
    finished = world.tpu("tpu_queued.sh")
    assert finished.returncode == 4
    assert "Limit: 0" in finished.stderr
    assert world.verbs() == ["create", "delete"]


def test_several_slices_are_nodes_of_one_request(world):
    finished = world.tpu("tpu_queued.sh", "--slices", "2", "--dry-run")
    assert "'--node-count=2' '--node-prefix=dpo'" in finished.stdout
    assert "--node-id" not in finished.stdout


def test_a_disk_that_is_lost_with_the_slice_is_refused_for_checkpoints(world):
    for job in ((), ("--workdir", "runs/dpo")):
        finished = world.tpu("tpu_queued.sh", job=job)
        assert finished.returncode == 2
        assert "--workdir must be a bucket's address" in finished.stderr
    assert world.calls() == []


# --- GPUs -----------------------------------------------------------------------------------------


def test_slurm_runs_one_process_a_gpu_and_keeps_all_gpus_visible(world):
    finished = submit(world, "--set", "mesh.fsdp=-1")
    assert finished.returncode == 0, finished.stderr
    (call,) = world.calls("srun")
    assert call[:2] == ["--kill-on-bad-exit=1", "--gpu-bind=none"]
    assert world.calls("paxo") == [["run", FILE, "--set", "mesh.fsdp=-1"]] * 2
    lines = (LAUNCH / "gpu_slurm.sbatch").read_text()
    tasks, gpus = (
        re.search(rf"#SBATCH --{f}-per-node=(\d+)", lines)[1] for f in ("ntasks", "gpus")
    )
    assert tasks == gpus


def test_slurm_queues_a_job_again_that_crashed_or_ran_out_of_time(world):
    world.faults(paxo=[1, 143, "hang", "hang"], time=[None, "up"])
    finished = submit(world)
    assert finished.returncode == 0, finished.stderr
    assert "exit code 143: queued again" in finished.stdout
    assert "the time is up: queued again" in finished.stdout
    assert world.calls("scontrol") == [["requeue", "7"]] * 2
    assert len(world.calls("paxo")) == 6


def test_slurm_queues_nothing_again_that_was_cancelled_that_is_wrong_or_that_crashes_for_ever(
    world,
):
    world.faults(paxo=[143, 143], squeue=["COMPLETING"])
    assert submit(world).returncode == 143
    world.faults(paxo=[3, 143])  # the second was ended because the first failed
    assert submit(world).returncode == 3
    assert world.calls("scontrol") == []
    world.faults(paxo=[134] * 9)
    assert submit(world, PAXO_RESTARTS="2").returncode == 134
    assert len(world.calls("scontrol")) == 2


def submit(world, *arguments, **options):
    (world.folder / "experiments").mkdir(exist_ok=True)
    shutil.copy(PROJECT / FILE, world.folder / FILE)
    environment = {"PATH": f"{world.folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sbatch", LAUNCH / "gpu_slurm.sbatch", FILE, *arguments],
        cwd=world.folder,
        env=os.environ | environment | {"PAXO": str(world.folder / "bin" / "paxo")} | options,
        executable=str(world.folder / "bin" / "sbatch"),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def node(world):
    """A copy of the launch folder, beside which a .venv may be made."""
    shutil.copytree(LAUNCH, world.folder / "launch")
    (world.folder / "experiments").mkdir()
    shutil.copy(PROJECT / FILE, world.folder / FILE)
    (world.folder / ".venv" / "bin").mkdir(parents=True)
    return world


def on_node(node, *arguments):
    return subprocess.run(
        ["bash", node.folder / "launch" / "gpu_node.sh", "--pause", "0", *arguments],
        cwd="/",
        env=os.environ | {"PATH": f"{node.folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_gpu_node_installs_for_its_driver_once_and_restarts_what_crashed(node):
    venv = node.folder / ".venv" / "bin"
    shutil.copy(node.folder / "bin" / "uv", venv / "pip")
    (venv / "pip").write_text(
        f'#!/bin/sh\necho "$@" >{node.folder}/pip\ncp {node.folder}/bin/paxo {venv}\n'
    )
    node.faults(paxo=[1, 139])
    finished = on_node(node, FILE, "--workdir", "here")
    assert finished.returncode == 0, finished.stderr
    assert node.calls("python3") == [["-m", "venv", ".venv"]]
    assert (node.folder / "pip").read_text() == "install --quiet .[cuda13]\n"
    assert node.calls("paxo") == [["run", FILE, "--workdir", "here"]] * 3
    for code, runs in ((3, 1), (2, 1), (1, 3)):
        node.faults(paxo=[code] * runs)
        before = len(node.calls("paxo"))
        assert on_node(node, "--restarts", "2", FILE).returncode == code
        assert len(node.calls("paxo")) == before + runs
    assert len(node.calls("python3")) == 1


def test_a_machine_without_a_gpu_or_with_an_old_driver_is_told(node):
    stub = node.folder / "bin" / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexit 9\n")
    finished = on_node(node, FILE)
    assert finished.returncode == 2
    assert "no NVIDIA GPU answers" in finished.stderr
    stub.write_text("#!/bin/sh\necho 470.82\n")
    assert "driver 470 is older than 525" in on_node(node, FILE).stderr
    assert node.calls("python3") == []


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    finished = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={PROJECT}", LAUNCH / script],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout


SHORT = ("--poll", "0", "--logs", "logs")


def once(lines):
    """Without the names of scratch folders, and without a question that is asked again."""
    lines = [re.sub(r"/tmp/tmp\.\w+", "SCRATCH", line) for line in lines]
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            "tpu_vm.sh",
            ["all", *MACHINES, *SHORT, "--dry-run", "--", FILE, "--workdir", BUCKET],
        ),
        ("tpu_queued.sh", [*MACHINES, *SHORT, "--dry-run", "--", FILE, "--workdir", BUCKET]),
        ("gpu_node.sh", ["--dry-run", FILE, "--set", "train.seed=1"]),
        ("gpu_slurm.sbatch", ["--dry-run", FILE, "--set", "train.seed=1"]),
    ],
)
def test_a_dry_run_prints_all_commands_and_runs_none(node, script, arguments):
    before = sorted(node.folder.rglob("*"))
    finished = node.run(f"{node.folder / 'launch' / script}", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert sorted(node.folder.rglob("*")) == before  # no stub was called: it would have noted it
    assert finished.stderr == ""
    if "tpu" in script:
        # What is printed is what a real run calls, in its order.
        assert node.run(script, *[a for a in arguments if a != "--dry-run"]).returncode == 0
        printed = [line for line in finished.stdout.splitlines() if line.startswith("'gcloud'")]
        called = [" ".join(f"'{a}'" for a in ["gcloud", *call]) for call in node.calls()]
        assert once(printed) == once(called)
    else:
        assert "'run' 'experiments/dpo_hh.py' '--set' 'train.seed=1'" in finished.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        ("tpu_vm.sh", ["al"], "name a verb"),
        ("tpu_vm.sh", ["all", "--zone", "z"], "--name is missing"),
        ("tpu_vm.sh", ["all", "--name", "n"], "--zone is missing"),
        ("tpu_vm.sh", ["create", "--name", "n", "--zone", "z"], "--type is missing"),
        ("tpu_vm.sh", ["create", "--name", "n", "--zone", "z", "--type", "tpu9-8"], "--version"),
        ("tpu_vm.sh", ["all", *MACHINES, "--", "no.py"], "no.py: no such file"),
        (
            "tpu_vm.sh",
            ["all", *MACHINES, "--tries", "few"],
            "--tries wants a whole number; got 'few'",
        ),
        ("tpu_vm.sh", ["all", *MACHINES, "--pol", "3"], "unknown argument '--pol'"),
        ("tpu_vm.sh", ["all", *MACHINES, "--env", "3=4"], "--env wants NAME=VALUE"),
        ("tpu_queued.sh", [*MACHINES], "name the experiment after --"),
        ("tpu_queued.sh", [*MACHINES, "--slices"], "--slices wants a value"),
        ("gpu_node.sh", ["--restart", "3"], "unknown argument '--restart'"),
        ("gpu_node.sh", [], "name the experiment"),
        ("gpu_slurm.sbatch", [FILE], "submit it"),
        ("gpu_slurm.sbatch", ["--dry-run", "no.py"], "name the experiment"),
    ],
)
def test_wrong_use_is_told_in_a_line_before_anything_is_done(world, script, arguments, error):
    finished = world.run(script, *arguments)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert f"{script}: error: " in line
    assert error in line
    assert not (world.folder / "calls").exists()


def test_codes_of_the_scripts_mean_nothing_else_in_paxo():
    text = (LAUNCH / "common.sh").read_text()
    code = {name: int(x) for name, x in re.findall(r"\b([A-Z_]+)=(\d+)\b", text)}
    assert (code["WRONG_USE"], code["NON_FINITE"]) == (cli.WRONG_USE, cli.NON_FINITE)
    taken = {cli.DONE, cli.CRASHED, cli.WRONG_USE, cli.NON_FINITE, cli.NO_ROUND, cli.INTERRUPTED}
    assert not {code["NO_QUOTA"], code["PREEMPTED"]} & taken


def test_no_project_zone_or_bucket_is_written_in(world):
    for path in LAUNCH.iterdir():
        text = path.read_text()
        assert set(re.findall(r"gs://([^/\s)\"]+)", text)) <= {
            "BUCKET",
            "...",
            "$BUCKET",
            "${BUCKET}",
        }, path
        assert not re.search(r"--project[= ](?!\$|PROJECT|\|)\w", text), path


def test_every_script_tells_its_use(world):
    for script in ("tpu_vm.sh", "tpu_queued.sh", "gpu_node.sh"):
        assert "launch/" in world.run(script, "--help").stdout


def test_the_job_set_is_kubernetes_yaml_with_every_placeholder_explained():
    yaml = pytest.importorskip("yaml")
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    names = set(re.findall(r"\$\{(\w+)\}", text))
    explained = (LAUNCH / "gke_xpk.md").read_text()
    assert {name for name in names if f"export {name}=" not in explained} == set()
    filled = yaml.safe_load(re.sub(r"\$\{\w+\}", "3", text))
    assert filled["kind"] == "JobSet"
    (slices,) = filled["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 3
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 3
    assert container["command"][:2] == ["paxo", "run"]
    assert filled["spec"]["failurePolicy"]["maxRestarts"] > 0
    final = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (final["containerName"], final["values"]) == (container["name"], [2, 3])
