"""Whether this process is one of several, and how it joins them; called by the command line alone.

JAX finds the others by itself on Cloud TPU, in GKE and under SLURM; elsewhere a coordinator is
named, by flags or by variables:

    PAXO_COORDINATOR=host0:1234 PAXO_NUM_PROCESSES=2 PAXO_PROCESS_ID=0 paxo run FILE

`PAXO_NUM_PROCESSES=1` makes any process one of its own.
"""

import glob
import importlib.util
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from paxo.clusters import ALONE, COORDINATOR, NUM_PROCESSES, PROCESS_ID, Decision, decide

logger = logging.getLogger(__name__)

WAIT_SECONDS = 300


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    verbose: bool = False,
) -> None:
    """Joins the other processes of the run, if there are any, and says what was decided.

    Must come before anything is computed. Of several processes only process 0 writes to stdout and
    logs, the others their errors alone. One that found no others says so in the debug log.

    Args:
        coordinator: see `decide`, as for the next two.
        num_processes: of the run.
        process_id: of this one.
        verbose: let all processes log.

    Raises:
        ValueError: from `decide`.
        ConnectionError: if the others are not found.
    """
    decision = decide(
        os.environ,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        has_tpu=_has_tpu(),
        has_kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    import jax

    if decision.arguments is not None:
        _join(decision)
    here, everywhere = jax.local_devices(), jax.devices()
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        if not verbose:
            logging.getLogger("paxo").setLevel(logging.ERROR)
    # Where nothing was found, there is nothing to tell.
    level = logging.DEBUG if decision == Decision("one process") else logging.INFO
    logger.log(level, _in_words(decision.reason, jax.process_index(), here, everywhere))


def on_first(work: Callable[[], None]) -> None:
    """Does the work on process 0 while the others wait, who then fail too where it failed.

    Raises:
        ValueError: on the others, if the work raised something that a user can put right.
        RuntimeError: on the others, if it raised anything else.
    """
    import jax

    if jax.process_count() == 1:
        work()
        return
    import numpy as np
    from jax.experimental import multihost_utils

    outcome, failure = 0, None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as error:
            failure = error
            outcome = 1 if isinstance(error, ValueError | OSError) else 2
    outcome = int(multihost_utils.broadcast_one_to_all(np.int32(outcome)))
    if failure is not None:
        raise failure
    if outcome:
        kind = ValueError if outcome == 1 else RuntimeError
        raise kind("process 0 could not begin; its own message tells why")


def leave(code: int) -> NoReturn:
    """Ends this process at once with an exit code.

    After an error an ordinary exit would wait minutes for the others, which wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _in_words(reason: str, process: int, here: Sequence[Any], everywhere: Sequence[Any]) -> str:
    kind = f"{here[0].platform} device{'' if len(everywhere) == 1 else 's'}"
    processes = len({device.process_index for device in everywhere})
    if processes == 1:
        return f"{reason}: {len(everywhere)} {kind}"
    among = f"process {process} of {processes}"
    return f"{reason}: {among}, {len(everywhere)} {kind}, {len(here)} of them here"


def _has_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _join(decision: Decision) -> None:
    """`jax.distributed.initialize`, with its failures in words."""
    import jax

    # Collectives between processes that have no accelerators.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = decision.arguments.get("coordinator_address")
    if address is not None and decision.arguments["process_id"] != 0:
        _wait_for(address)
    try:
        jax.distributed.initialize(initialization_timeout=WAIT_SECONDS, **decision.arguments)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{decision.reason}: the others were not found ({reason}); {ALONE}, or name them by "
            f"{COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}"
        ) from error


def _wait_for(address: str, seconds: float = WAIT_SECONDS) -> None:
    """Returns when process 0 listens; JAX would abort without a word of Python's."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"nobody listens at the coordinator {address} after {seconds:.0f} s "
                    f"({error.strerror or error}): is process 0 running, and may this host reach "
                    "that port?"
                ) from error
        time.sleep(0.5)
