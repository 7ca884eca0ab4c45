"""Which of several processes this one is, by what it was told or by its environment.

JAX asks Cloud TPU, GKE and SLURM itself; here is decided whom it asks, or that nobody is asked.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "PAXO_COORDINATOR",
    "PAXO_NUM_PROCESSES",
    "PAXO_PROCESS_ID",
)
SLURM_STEP = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
ALONE = f"set {NUM_PROCESSES}=1 to run this process alone"


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a process runs.

    Attributes:
        reason: what was found, in words.
        arguments: those of `jax.distributed.initialize`; None for a process of its own.
    """

    reason: str
    arguments: Mapping[str, Any] | None = None


def decide(
    variables: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    has_tpu: bool = False,
    has_kubernetes: bool = False,
) -> Decision:
    """How this process runs: what it was told, else SLURM, Cloud TPU, an indexed job, or alone.

    Args:
        variables: the environment.
        coordinator: `HOST:PORT` of process 0; this and the next two go before the variables.
        num_processes: of the run.
        process_id: of this one, from 0.
        has_tpu: whether there are TPU chips and their library.
        has_kubernetes: whether the package is there by which JAX asks a cluster.

    Raises:
        ValueError: if what was told is incomplete or impossible, or the environment is that of
            several processes which cannot find one another.

    >>> decide({"PAXO_COORDINATOR": "host0:1234", "PAXO_NUM_PROCESSES": "2"}, process_id=1).reason
    'coordinator host0:1234'
    >>> decide({}).arguments is None
    True
    """
    told = _told(variables, coordinator, num_processes, process_id)
    tpu = _cloud_tpu(variables) if has_tpu else None
    found = told or _slurm(variables) or tpu or _indexed_job(variables, has_kubernetes)
    return found or Decision("one process")


def _told(
    variables: Mapping[str, str],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> Decision | None:
    coordinator = coordinator or variables.get(COORDINATOR)
    if num_processes is None:
        num_processes = _number(variables, NUM_PROCESSES)
    if process_id is None:
        process_id = _number(variables, PROCESS_ID)
    if coordinator and process_id is None:  # an indexed job tells it to each pod
        process_id = _number(variables, "JOB_COMPLETION_INDEX")
    if num_processes == 1:
        return Decision("one process, as was told")
    given = {
        f"--coordinator or {COORDINATOR}": coordinator,
        f"--num-processes or {NUM_PROCESSES}": num_processes,
        f"--process-id or {PROCESS_ID}": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(
            f"one of several processes is told the coordinator, their number and its own; missing: "
            f"{'; '.join(missing)}"
        )
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ValueError(f"the coordinator is given as HOST:PORT of process 0; got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process ids are 0 to {num_processes - 1} for {num_processes} processes; got "
            f"{process_id}"
        )
    return Decision(
        f"coordinator {coordinator}",
        {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        },
    )


def _slurm(variables: Mapping[str, str]) -> Decision | None:
    tasks = _number(variables, "SLURM_NTASKS") or 1
    if "SLURM_JOB_ID" not in variables or tasks == 1:
        return None
    if any(name not in variables for name in SLURM_STEP):
        raise ValueError(
            f"SLURM gives this job {tasks} tasks, but this process is none of them: start it by "
            f"srun, or {ALONE}"
        )
    arguments: dict[str, Any] = {"cluster_detection_method": "slurm"}
    devices = _slurm_devices(variables)
    if devices:
        arguments["local_device_ids"] = devices
    return Decision(f"SLURM job {variables['SLURM_JOB_ID']}", arguments)


def _slurm_devices(variables: Mapping[str, str]) -> list[int]:
    """The GPUs of this task among those it sees: JAX alone would take one, whatever their number.

    >>> _slurm_devices({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    seen = len(visible.split(",")) if visible else _number(variables, "SLURM_GPUS_ON_NODE") or 0
    per_node: list[int] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, nodes = part.partition("(x")
        per_node += [int(tasks)] * int(nodes.rstrip(")") or 1)
    node = _number(variables, "SLURM_NODEID") or 0
    tasks = per_node[min(node, len(per_node) - 1)]
    if seen < tasks:  # each task sees its own alone
        return list(range(seen))
    own, local = seen // tasks, _number(variables, "SLURM_LOCALID") or 0
    return list(range(local * own, (local + 1) * own))


def _cloud_tpu(variables: Mapping[str, str]) -> Decision | None:
    """Where there are chips: those of this host alone, or of all hosts of the slices."""
    slices = _number(variables, "MEGASCALE_NUM_SLICES") or 1
    hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        if slices * len(hosts.split(",")) == 1:
            return Decision("a TPU on one host")
        return Decision("Cloud TPU in GKE", {"cluster_detection_method": "gketpu"})
    if "TPU_SKIP_MDS_QUERY" in variables:
        return Decision("a TPU on one host")
    return Decision("Cloud TPU", {"cluster_detection_method": "gcetpu"})


def _indexed_job(variables: Mapping[str, str], has_kubernetes: bool) -> Decision | None:
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys():
        return None
    if not has_kubernetes:
        raise ValueError(
            "this is a pod of an indexed Kubernetes job, but the package by which it finds the "
            f"others is missing: pip install 'jax[k8s]', or give {COORDINATOR} and "
            f"{NUM_PROCESSES}, or {ALONE}"
        )
    return Decision("a pod of an indexed Kubernetes job", {"cluster_detection_method": "k8s"})


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} is a whole number; got {text!r}")
    return int(text)
