"""How a process finds out whether it is one of several."""

import logging
import os
import socket
import sys

import jax
import pytest

from paxo import distributed
from paxo.clusters import Decision, decide
from paxo.distributed import on_first, start

TOLD = {"PAXO_COORDINATOR": "host0:1234", "PAXO_NUM_PROCESSES": "4", "PAXO_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def test_nothing_told_and_nothing_found_is_one_process():
    assert decide({}) == Decision("one process")
    # A job of one task, and a pod that is no part of an indexed job.
    assert decide({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}).arguments is None
    assert decide({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).arguments is None


def test_what_is_told_goes_before_what_is_found_and_flags_before_variables():
    found = decide(TOLD | SLURM, process_id=2, has_tpu=True)
    assert found.arguments == {
        "coordinator_address": "host0:1234",
        "num_processes": 4,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
    }
    assert decide(TOLD | SLURM).arguments["process_id"] == 3


def test_one_process_can_be_told_anywhere():
    for variables in (SLURM, POD, {"TPU_WORKER_HOSTNAMES": "a,b"}):
        alone = decide(variables | {"PAXO_NUM_PROCESSES": "1"}, has_tpu=True)
        assert alone == Decision("one process, as was told")


def test_a_pod_that_is_told_the_coordinator_knows_its_number():
    variables = {"PAXO_COORDINATOR": "job-0.job:1234", "PAXO_NUM_PROCESSES": "2"}
    assert decide(variables | POD).arguments["process_id"] == 1


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"PAXO_COORDINATOR": "host0:1234"}, "missing: --num-processes.*; --process-id"),
        ({"PAXO_NUM_PROCESSES": "2", "PAXO_PROCESS_ID": "0"}, "missing: --coordinator"),
        (TOLD | {"PAXO_COORDINATOR": "host0"}, "HOST:PORT of process 0; got 'host0'"),
        (TOLD | {"PAXO_PROCESS_ID": "4"}, "0 to 3 for 4 processes; got 4"),
        (TOLD | {"PAXO_NUM_PROCESSES": "two"}, "PAXO_NUM_PROCESSES is a whole number; got 'two'"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "8 tasks.*srun.*PAXO_NUM_PROCESSES=1"),
        (POD, r"pip install 'jax\[k8s\]'.*PAXO_COORDINATOR"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(variables, what):
    with pytest.raises(ValueError, match=what):
        decide(variables)


def test_slurm_tpu_and_pods_are_left_to_jax():
    assert decide(SLURM).arguments == {"cluster_detection_method": "slurm"}
    assert decide(SLURM).reason == "SLURM job 77"
    assert decide(POD, has_kubernetes=True).arguments == {"cluster_detection_method": "k8s"}
    gke = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
    assert decide(gke, has_tpu=True).arguments == {"cluster_detection_method": "gketpu"}
    slices = {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}
    assert decide(slices, has_tpu=True).arguments == {"cluster_detection_method": "gketpu"}
    assert decide({}, has_tpu=True).arguments == {"cluster_detection_method": "gcetpu"}


def test_a_tpu_of_one_host_waits_for_nobody():
    for variables in ({"TPU_PROCESS_ADDRESSES": "local"}, {"TPU_SKIP_MDS_QUERY": "1"}):
        assert decide(variables, has_tpu=True) == Decision("a TPU on one host")


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, [4, 5, 6, 7]),  # half of the node's
        ({"SLURM_GPUS_ON_NODE": "2"}, [1]),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, [0]),  # bound by SLURM
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
            list(range(8)),
        ),
    ],
)
def test_a_task_of_slurm_takes_its_share_of_the_gpus_it_sees(changes, devices):
    assert decide(SLURM | changes).arguments["local_device_ids"] == devices


class Joined:
    """Stands for `jax.distributed.initialize`: notes how it is called, or raises."""

    def __init__(self, error=None):
        self.error, self.arguments = error, None

    def __call__(self, **arguments):
        self.arguments = arguments
        if self.error:
            raise self.error


def test_start_joins_the_others_and_says_so(monkeypatch, caplog):
    joined = Joined()
    monkeypatch.setattr(jax.distributed, "initialize", joined)
    with caplog.at_level(logging.INFO, "paxo"):
        start("host0:1234", 2, 0)
    assert joined.arguments["coordinator_address"] == "host0:1234"
    assert caplog.messages == [f"coordinator host0:1234: {len(jax.devices())} cpu devices"]


def test_a_process_of_its_own_joins_nobody_and_says_so_on_request_alone(monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(jax.distributed, "initialize", Joined(AssertionError("was called")))
    with caplog.at_level(logging.INFO, "paxo"):
        start()
    assert not caplog.messages
    with caplog.at_level(logging.DEBUG, "paxo"):
        start()
    assert caplog.messages == [f"one process: {len(jax.devices())} cpu devices"]


def test_only_process_0_of_several_talks(monkeypatch, capsys):
    package = logging.getLogger("paxo")
    monkeypatch.setattr(package, "level", logging.INFO)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(jax.distributed, "initialize", Joined())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    start("host0:1234", 2, 0)
    print("printed")
    assert not package.isEnabledFor(logging.WARNING)
    sys.stdout.close()
    assert not capsys.readouterr().out


def test_what_jax_says_when_the_others_are_not_found_is_put_in_words(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", Joined(RuntimeError("no\n metadata")))
    with pytest.raises(ConnectionError, match=r"host0:1.*not found \(no metadata\).*PAXO_COORD"):
        start("host0:1", 2, 0)


def test_a_coordinator_that_does_not_listen_is_named(monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"nobody listens at the coordinator {address}"):
        distributed._wait_for(address, seconds=0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        distributed._wait_for(f"127.0.0.1:{listening.getsockname()[1]}", seconds=0)


def test_one_process_does_the_work_itself_and_fails_as_it_fails():
    done = []
    on_first(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(KeyError):
        on_first(lambda: {}["no"])
