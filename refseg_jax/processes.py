"""The process and its peers: start-up, and ending together."""

import atexit
import collections
import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # Its key-value store has no public name.
from jax.experimental import multihost_utils
from tqdm import tqdm

from refseg_jax.errors import UserError, say


def keep_memory() -> None:
    """Lets this process keep the memory that large arrays leave behind, where glibc manages it.

    Given back it would come anew, page by page, at every step: small JMCELN trained at 76 instead
    of 82 images a second.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Another C library.
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # As malloc.h numbers them.
    for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
        mallopt(option, value)


def use_compile_cache() -> None:
    """Keeps compiled programs for the next start; call it before the first one is compiled.

    They lie in `refseg_jax/compiled` of the user's cache directory, or where the variable
    JAX_COMPILATION_CACHE_DIR says. JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        path = pathlib.Path(home, "refseg_jax", "compiled")
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # No home, or not one to write to.
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))


_PATIENCE = 3600  # Seconds to wait for processes that were told where to meet.


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> "Peers | None":
    """Makes this process one of several; call it before anything runs on a device.

    Without arguments the cluster is asked that JAX finds itself on (a TPU pod, SLURM, Open MPI,
    Kubernetes). Returns None where there are no others, as on a plain machine.

    Args:
      coordinator: "host:port" of process 0, which listens there.
      num_processes, process_id: how many there are, and which of them this is, from 0.

    Raises:
      UserError: the others are not found.
    """
    if num_processes != 1:
        # Where there is a coordinator, machines may come one by one, as a cloud has them.
        seconds = _PATIENCE if coordinator else 300
        told = threading.Timer(10, say, [f"waiting for the other processes at {coordinator}"])
        told.daemon = True
        try:
            if coordinator:
                told.start()
            if process_id:
                _wait_for(coordinator, seconds)
            elif coordinator:
                _check_free(coordinator)
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=seconds
            )
        except (ValueError, RuntimeError, OSError) as e:
            where = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
            if where or not isinstance(e, ValueError):  # Else no cluster was found.
                place = f" at {where}" if where else ""
                raise UserError(f"the other processes were not found{place}: {e}") from e
        finally:
            told.cancel()
    if distributed.global_state.num_processes > 1:
        return Peers()
    # On a cluster JAX now takes note of SIGTERM, for several to agree what to do: one ends as ever.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return None


def _wait_for(coordinator: str, seconds: float) -> None:
    """Returns when `coordinator` listens: JAX would abort the process if it never does."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as e:
            if time.monotonic() > deadline:
                raise UserError(f"no process 0 at --coordinator={coordinator}: {e}") from e
            time.sleep(0.5)


def _check_free(coordinator: str) -> None:
    """UserError: another program listens where process 0 is to, maybe process 0 of another run.

    Two of those would share the port, and each other's processes.
    """
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as e:
            raise UserError(f"--coordinator={coordinator}: port {port} cannot be had: {e}") from e


_FAILED = "refseg_jax/failed"


def report(message: str, status: int = 2) -> None:
    """Has all processes, if there are several, end with `status` and `message`, this one named.

    Any thread may say so; its own process ends within seconds, too.
    """
    state = distributed.global_state
    if state.client:  # Else this is the only one, or has taken leave.
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another failed first.
            state.client.key_value_set(_FAILED, f"{status} process {state.process_id}: {message}")


class Peers:
    """The other processes of the run: when one fails, all of them end, and say why.

    A process would otherwise wait in a collective for one that has gone.
    """

    _GRACE = 5.0  # Seconds to fail of itself (most faults are everybody's), or to take leave.

    def __init__(self):
        self._client = distributed.global_state.client
        self._leaving = threading.Lock()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._end)

    @property
    def ending(self) -> bool:
        """Whether the end has begun."""
        return self._leaving.locked()

    def fail(self, message: str, status: int = 2) -> NoReturn:
        """Ends every process with `status` and `message`, the others naming this one as well."""
        report(message, status)
        self._leave(message, status)

    def _watch(self):
        while not self._over.wait(1.0):
            # Asked, not waited for: no thread may be inside JAX when Python ends.
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # Not there, so all is well.
                status, _, message = self._client.key_value_try_get(_FAILED).partition(" ")
                if not self._over.wait(self._GRACE):
                    self._leave(message, int(status))

    def _end(self):
        self._over.set()
        self._watcher.join()

    def _leave(self, message, status):
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # The other thread is about to end this process.
        tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.stdout.flush()
        # Together, for the first to go would look like a crash to the others; but not forever.
        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(3 * self._GRACE)
        os._exit(status)


_meetings = itertools.count()


def meet() -> None:
    """Waits until all processes have come here, up to an hour.

    Collectives between CPUs wait half a minute, and a compiler may be slower than another by more.
    """
    if jax.process_count() > 1:
        name = f"refseg_jax/meeting {next(_meetings)}"
        distributed.global_state.client.wait_at_barrier(name, 3_600_000)


def wait_for_first() -> None:
    """Has the others wait until process 0 comes here, however long; signals are heard meanwhile.

    At the end JAX would have them wait five minutes at most.
    """
    if jax.process_count() == 1:
        return
    client, name = distributed.global_state.client, f"refseg_jax/first {next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(name, "is here")
        return
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # It is not there yet.
            client.key_value_try_get(name)
            return
        time.sleep(0.2)


def check_devices() -> None:
    """Raises a UserError where the processes have not as many devices each; before they meet."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} in process {i}" for i, n in sorted(counts.items()))
        raise UserError(
            f"the processes have different numbers of devices ({listed}): give each as many, on "
            "CPUs with config.mesh.cpu_devices, on GPUs with CUDA_VISIBLE_DEVICES"
        )


def check_same(what: str, values: Callable[[], dict[str, Any]]) -> None:
    """Raises a UserError where `values()`, as JSON, are not process 0's; call it on all of them.

    One process alone asks for none.
    """
    if jax.process_count() == 1:
        return
    here = json.loads(json.dumps(values()))
    client, name = distributed.global_state.client, f"refseg_jax/same {next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(name, json.dumps(here))
    first = json.loads(client.blocking_key_value_get(name, 3_600_000))
    differing = [
        f"{key}: {first.get(key)} in process 0, {here.get(key)} in process {jax.process_index()}"
        for key in sorted(first.keys() | here.keys())
        if first.get(key) != here.get(key)
    ]
    if differing:
        raise UserError(
            f"{what} must be the same for all processes, but is not ({'; '.join(differing[:8])})"
        )
    meet()


def sees_the_same(folder: str) -> bool:
    """Whether `folder`, which process 0 has made, is one for all processes; call it on all."""
    if jax.process_count() == 1:
        return True
    meet()
    mark = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    path = epath.Path(folder) / f".mark-{mark}"
    if jax.process_index() == 0:
        path.write_text("")
    meet()
    # A network file system may remember for a while that there was no such file.
    seen = any(path.exists() or time.sleep(1) for _ in range(30))
    same = agree(int(seen)) and seen
    if jax.process_index() == 0:
        path.unlink()
    return same


def agree(value: int) -> bool:
    """Whether `value` is the same on all processes; call it on all of them."""
    if jax.process_count() == 1:
        return True
    meet()
    return len(set(multihost_utils.process_allgather(np.int32(value)).tolist())) == 1
