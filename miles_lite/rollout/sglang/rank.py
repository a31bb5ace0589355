"""One rank of an SGLang engine as a Ray actor: the server process of its host, the weights' way in.

The actor sits on the bundle of the trainer rank whose device it shares. The first of an engine's
actors on each host runs the server there, with all ranks of that host as its children; every actor
hands the buckets of its rank to the SGLang process of that rank (see `loader`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import psutil

from miles_lite import log
from miles_lite.cluster.lease import resident_bytes
from miles_lite.cluster.network import ephemeral_range
from miles_lite.cluster.roll import Here
from miles_lite.protocols import Bucket, EngineError
from miles_lite.rollout.layout import Param
from miles_lite.rollout.sglang.launch import Place, launch
from miles_lite.rollout.sglang.model_folder import engine_folder
from miles_lite.rollout.sglang.options import EngineSpec
from miles_lite.rollout.sglang.wire import Address, Message, write_route
from miles_lite.weights.plan import Route

LOG_LINES = 15  # of a server that ended, shown with its error


class SGLangRank:
    """Life: start_server (first of a host), then for every sync: accept, load_bucket ...,
    finish_sync, end_sync. Methods may be called from several threads."""

    def __init__(self, name: str, spec: EngineSpec, params: Sequence[Param], timeout_s: float):
        log.setup("engine", -1)
        self._here = Here()
        self._name, self._spec, self._timeout_s = name, spec, timeout_s
        self._params = params
        self._routes: list[Route] = []
        self._check_names = True
        self._server: subprocess.Popen[bytes] | None = None
        self._processes: list[psutil.Process] = []  # the server's, once it is up
        self._connection: Connection | None = None
        self._lock = threading.Lock()  # one question at a time
        self._accepting = threading.Lock()  # one at a time takes the call of a sync
        self._folder = Path(tempfile.mkdtemp(prefix="miles-lite-"))  # of mode 0700
        self.address = Address(str(self._folder / "rank"), secrets.token_bytes(32))
        self._listener = Listener(self.address.path, "AF_UNIX", authkey=self.address.key)

    # ------------------------------------------------------------------ the server of this host

    def gpu(self) -> str:
        """The device that Ray gave this actor, as CUDA_VISIBLE_DEVICES names it."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def free_ports(self, count: int) -> list[int]:
        """Ports of this host that nobody uses, and that the system gives to nobody who asks for
        any: it takes a server a minute from here to their use."""
        found: set[int] = set()
        while len(found) < count:
            port = random.randrange(20_000, ephemeral_range()[0])
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("", port))
                found.add(port)
        return list(found)

    def start_server(self, place: Place, api_key: str, log_file: Path) -> None:
        """Begin to bring up the server of this host, in place of one that was; returns at once."""
        self._stop_server()
        folder = self._folder / "model"
        if not folder.exists():
            engine_folder(self._spec.folder, folder)
        command = launch(replace(self._spec, folder=folder), place, api_key)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log_file
        with log_file.open("ab") as output:
            self._server = command.start(output)

    def server_is_up(self) -> None:
        """All processes of the server are there: from now on `ended` misses each of them."""
        assert self._server is not None, "start_server comes first"
        self._processes = psutil.Process(self._server.pid).children(recursive=True)

    def ended(self) -> str:
        """Why the server of this host is no more; "" while it runs, or if another actor has it.

        A server notices that one of its ranks died, and then spends a minute on diagnostics."""
        if self._server is None:
            return ""
        gone = [process for process in self._processes if not _runs(process)]
        if self._server.poll() is not None:
            what = f"its server ended with code {self._server.returncode}"
        elif gone:
            what = f"process {gone[0].pid} of its server died"
        else:
            return ""
        lines = self._log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"{what}; {self._log_file} ends:", *lines])

    def resident_bytes(self) -> int:
        """The most that a process of this host's server holds, 0 without one."""
        held = [0]
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # `ended` tells
                held.append(resident_bytes(process))
        return max(held)

    def address_text(self) -> str:
        return str(self.address)

    def close(self) -> None:
        """Kill the server of this host and wait until it is gone."""
        self._stop_server()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop_server(self) -> None:
        server, self._server, self._processes = self._server, None, []
        if server is None:
            return
        if server.stdin is not None:
            server.stdin.close()  # on which it kills itself and its children
        try:
            server.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            server.kill()

    # ------------------------------------------------------------------ one sync

    def set_routes(self, routes: Sequence[Route]) -> None:
        """Once, before the first sync: the copies that will come."""
        self._routes = list(routes)
        self._check_names = True

    def accept(self, max_wait_s: float) -> bool:
        """Whether the SGLang process of this rank has called, within max_wait_s, and is ready."""
        with self._accepting:
            if not self._take_call(max_wait_s):
                return False
            self._start()
        return True

    def _take_call(self, max_wait_s: float) -> bool:
        inner: Any = self._listener  # has no deadline of its own
        inner._listener._socket.settimeout(max_wait_s)
        try:
            self._connection = self._listener.accept()
        except TimeoutError:
            return False
        return True

    def _start(self) -> None:
        self._ask(
            "start",
            name=self._name,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[self._spec.dtype],
            shapes={param.name: param.shape for param in self._params},
            padded=[param.name for param in self._params if param.padded],
            routes=[write_route(route) for route in self._routes],
            check_names=self._check_names,  # takes a while with many experts: once for all syncs
        )
        self._check_names = False

    def load_bucket(self, source: int, number: int, bucket: Bucket) -> None:
        """Have bucket `number` of trainer rank `source` copied into the live parameters."""
        self._ask(
            "load",
            source=source,
            number=number,
            handle=bucket.handle,
            num_bytes=bucket.num_bytes,
        )

    def finish_sync(self) -> dict[int, list[int]]:
        """All has arrived? Returns checksums of the live weights by source."""
        checksums: Mapping[str, list[int]] = self._ask("finish")["checksums"]
        return {int(source): sums for source, sums in checksums.items()}

    def end_sync(self, max_wait_s: float) -> None:
        """Let SGLang go on. Also after a failure, when it may not even have called yet: within
        max_wait_s, else this is to be called again."""
        with self._accepting:
            if self._connection is None:
                self._take_call(max_wait_s)
            connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(OSError, EOFError), connection:  # the rank may be gone
            connection.send_bytes(Message("goodbye", {}).encode())
            if connection.poll(self._timeout_s):
                connection.recv_bytes()

    def _ask(self, verb: str, **body: Any) -> dict[str, Any]:
        with self._lock:
            if self._connection is None:
                raise EngineError(f"{self._name} is not in a sync, and was told to {verb!r}")
            try:
                self._connection.send_bytes(Message(verb, body).encode())
                if not self._connection.poll(self._timeout_s):
                    raise EngineError(
                        f"{self._name}: its SGLang process did not answer {verb!r} within "
                        f"{self._timeout_s:g} s"
                    )
                answer = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError) as error:
                raise EngineError(
                    f"{self._name}: its SGLang process went away in {verb!r} of a sync "
                    f"({error or type(error).__name__}); {self.ended() or 'see the engine log'}"
                ) from None
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
