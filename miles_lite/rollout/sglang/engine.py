"""An SGLang engine as the driver sees it: HTTP to its server, actors for processes and weights."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from miles_lite.algo.routing import of_all_layers
from miles_lite.cluster.actor import Remote, RemoteError, call_all, gather
from miles_lite.cluster.lease import RESIDENT
from miles_lite.models.nemotron_h import NemotronH
from miles_lite.protocols import EngineError, Hosted, Phase
from miles_lite.rollout.layout import Param
from miles_lite.rollout.sglang.client import Client
from miles_lite.rollout.sglang.launch import Place
from miles_lite.rollout.sglang.options import EngineSpec
from miles_lite.types import NO_ROUTING, Completion, Finish, Request, Routing, Sampling

log = logging.getLogger(__name__)

WEIGHTS, CACHE, GRAPHS = "weights", "kv_cache", "cuda_graph"  # SGLang's names for what it may hold
_HOLDS = {
    Phase.generate: {WEIGHTS, CACHE, GRAPHS},
    Phase.train: set[str](),
    Phase.sync: {WEIGHTS},
}
POLL_S = 0.5  # between looks at a server that comes up, or at a sync that begins
WATCH_S = 2.0  # between looks at whether its processes are all there
LOADER = "miles_lite.rollout.sglang.loader.receive"  # runs in SGLang's processes


class SGLangEngine:
    """Implements protocols.Engine over the actors of one engine, in rank order."""

    def __init__(
        self,
        name: str,
        spawn: Callable[[], Sequence[Remote]],
        model: tuple[NemotronH, Sequence[Sequence[Param]]],
        spec: EngineSpec,
        log_folder: Path,
        deadline_s: float,
    ) -> None:
        """spawn: starts the actors of all ranks. model: and what each rank hosts of it.
        deadline_s: for one completion, and for a whole sync."""
        self.name, self.version, self.stall_s = name, -1, spec.stall_s
        self._spawn, self.ranks = spawn, spawn()
        self._start: tuple[Sequence[str], float] = ((), 0.0)  # hosts and deadline of `connect`
        self._model, self._params = model
        self._spec, self._log_folder = spec, log_folder
        self._deadline_s = deadline_s
        self._held = set(_HOLDS[Phase.generate])  # as a server comes up
        self._cache_bytes = self._graph_bytes = 0  # of all ranks
        self._requests = [0] * spec.dims.dp  # unfinished, by DP rank
        self._moved_at = 0.0  # when requests were last known to get on, or there were none
        self._heads: list[Remote] = []  # the actors that run a server
        self._client: Client | None = None
        self._update: Future[Any] | None = None  # the call during which weights come in

    # ------------------------------------------------------------------ life

    def connect(self, hosts: Sequence[str], deadline_s: float) -> None:
        """Start the servers, or start them anew, and wait until they could serve; they hold nothing
        then. hosts: of each rank. Raises EngineError with the end of a log."""
        if self._client is not None:
            self._client.close()
        self._held, self.version, self._update = set(_HOLDS[Phase.generate]), -1, None
        self._start = hosts, deadline_s
        nodes = list(dict.fromkeys(hosts))
        per_node = len(hosts) // len(nodes)
        if list(hosts) != [node for node in nodes for _ in range(per_node)]:
            raise ValueError(
                f"{self.name}: SGLang wants the same number of neighbouring ranks on every host; "
                f"its ranks are on {', '.join(hosts)}"
            )
        gpus: Sequence[str] = call_all(self.ranks, "gpu", deadline_s=self._deadline_s)
        self._heads = [self.ranks[hosts.index(node)] for node in nodes]
        port, meeting = self._heads[0].call("free_ports", 2, deadline_s=deadline_s)
        api_key = secrets.token_hex(32)
        for number, head in enumerate(self._heads):
            place = Place(
                node_rank=number,
                host=nodes[number],  # the others answer health checks there
                port=port,
                rendezvous=f"{nodes[0]}:{meeting}" if len(nodes) > 1 else "",
                gpus=self._gpus_of(number, gpus),
            )
            log_file = self._log_folder / f"{self.name.replace(' ', '-')}-node-{number}.log"
            head.call("start_server", place, api_key, log_file, deadline_s=deadline_s)
        self._client = Client(self.name, f"http://{nodes[0]}:{port}", api_key)
        self._await_ready(deadline_s)
        call_all(self._heads, "server_is_up", deadline_s=self._deadline_s)
        self._client.watch(lambda: self._why_lost() or self._why_stuck(), WATCH_S)
        info = self._client.get("/server_info", self._deadline_s)
        with _read(f"{self.name}: /server_info"):
            memory = [state["memory_usage"] for state in info["internal_states"]]
            gib = self._spec.dims.tp // len(memory) * 2**30
            self._cache_bytes = round(sum(m["kvcache"] for m in memory) * gib)
            self._graph_bytes = round(sum(sum(m["graph"].values()) for m in memory) * gib)
        self.enter(Phase.train)  # the device is the trainer's until the engine is called

    def _gpus_of(self, node: int, gpus: Sequence[str]) -> tuple[str, ...]:
        """Of all ranks on a host: the actor that starts its server sees its own only."""
        if self._spec.device == "cpu":
            return ()
        per_node = len(gpus) // self._spec.num_nodes
        return tuple(gpus[node * per_node : (node + 1) * per_node])

    def _await_ready(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while True:
            self._check_servers()
            try:
                self._http.get("/ready", self._deadline_s)
                return
            except EngineError as error:
                if time.monotonic() > end:
                    raise EngineError(
                        f"{self.name} is not ready after {deadline_s:g} s "
                        f"(cluster.start_timeout_s): {error}"
                    ) from None
            time.sleep(POLL_S)

    def _check_servers(self) -> None:
        """Raise EngineError with the reason when a server has ended."""
        if reason := self._why_lost():
            raise EngineError(reason)

    def _why_lost(self) -> str:
        """ "" while all processes of all servers run."""
        try:
            reasons = call_all(self._heads, "ended", deadline_s=self.stall_s)
        except RemoteError as error:  # the actor of a host, and its server with it
            return str(error)
        told = zip(self._heads, reasons, strict=True)
        return "; ".join(f"{head.name}: {reason}" for head, reason in told if reason)

    def _why_stuck(self) -> str:
        """ "" while requests under way get on, by what its scheduler says of itself. While it works
        it answers without drawing anything for it."""
        if any(self._requests) and self._update is None:
            try:
                self._http.get("/health_generate", self.stall_s)
            except EngineError as error:
                quiet_s = time.monotonic() - self._moved_at
                stuck = any(self._requests) and quiet_s > self.stall_s
                return (
                    f"{self.name}: nothing drawn for {quiet_s:.0f} s (rollout.engine.stall_s = "
                    f"{self.stall_s:g}): {error}"
                    if stuck
                    else ""
                )
        self._moved_at = time.monotonic()
        return ""

    def restart(self) -> None:
        try:
            self.close()
        except RemoteError as error:  # gone already, and its server with it
            log.info("%s: %s", self.name, error)
        self.ranks, self._requests = self._spawn(), [0] * self._spec.dims.dp
        self.connect(*self._start)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        calls = [rank.start("close") for rank in self.ranks]
        try:
            gather(calls, self.stall_s)
        finally:
            for rank in self.ranks:
                rank.kill()

    @property
    def _http(self) -> Client:
        assert self._client is not None, f"{self.name} is not connected"
        return self._client

    # ------------------------------------------------------------------ completions

    async def generate(self, request: Request) -> Completion:
        """One completion, by the DP rank with the fewest unfinished ones. Raises EngineError."""
        dp_rank = self._requests.index(min(self._requests))
        self._requests[dp_rank] += 1
        body = {
            "input_ids": list(request.tokens + request.scored),
            "sampling_params": sampling_params(request.sampling),
            "return_logprob": True,
            "logprob_start_len": len(request.tokens) - 1 if request.scored else -1,
            "rid": f"{self.name}-{request.uid}".replace(" ", "-"),
            "routed_dp_rank": dp_rank,
            "return_routed_experts": request.sampling.wants_routing,
        }
        if request.scored:
            body["sampling_params"]["max_new_tokens"] = 0
        try:
            answer = await self._http.call("/generate", body, self._deadline_s)
        except EngineError:
            await asyncio.to_thread(self._check_servers)  # a better explanation, if there is one
            raise
        finally:
            self._requests[dp_rank] -= 1
        with _read(f"{self.name}: request {request.uid}"):
            return completion(answer, self._model, request)

    def can_score(self, sampling: Sampling) -> bool:
        """Its server tells log-probs of input tokens at temperature 1, whatever is asked for."""
        return sampling.temperature == 1 and not sampling.truncated

    async def abort(self) -> None:
        await self._http.call("/abort_request", {"abort_all": True}, self._deadline_s)
        end = time.monotonic() + self._deadline_s
        while any(self._requests):
            if time.monotonic() > end:
                raise EngineError(
                    f"{self.name}: {sum(self._requests)} requests go on {self._deadline_s:g} s "
                    "after they were aborted"
                )
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------------ memory

    def enter(self, phase: Phase) -> Mapping[str, int]:
        """Give up first, then take. SGLang dies if it is told to release while it works, so it is
        paused, which ends what it still does."""
        self._end_update()
        wanted = _HOLDS[phase]
        if phase is Phase.generate and self.version < 0:
            raise EngineError(f"{self.name} was never sent weights, or has given them up since")
        if CACHE in self._held and phase is not Phase.generate:
            self._post("/pause_generation", {"mode": "abort"})
        if gone := sorted(self._held - wanted):
            self._post("/release_memory_occupation", {"tags": gone})
            if WEIGHTS in gone:
                self.version = -1
        if new := sorted(wanted - self._held):
            self._post("/resume_memory_occupation", {"tags": new})
        self._held = set(wanted)
        if phase is Phase.generate:
            self._post("/continue_generation", {})
        return self.held_bytes()

    def held_bytes(self) -> Mapping[str, int]:
        """Weights by the layout; caches and graphs as SGLang measured them when it came up; host
        memory of its largest process."""
        size = 4 if self._spec.dtype == "fp32" else 2
        weights = sum(
            math.prod(param.shape) * (4 if param.keep_fp32 else size)
            for rank in self._params
            for param in rank
        )
        held = {WEIGHTS: weights, CACHE: self._cache_bytes, GRAPHS: self._graph_bytes}
        tags = {"weights": WEIGHTS, "cache": CACHE, "graphs": GRAPHS}
        found = {kind: held[tag] if tag in self._held else 0 for kind, tag in tags.items()}
        try:
            resident = call_all(self._heads, "resident_bytes", deadline_s=self.stall_s)
        except RemoteError as error:
            raise EngineError(str(error)) from None
        return found | {RESIDENT: max(resident)}

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return self._http.post(path, body, self.stall_s)
        except EngineError:
            self._check_servers()
            raise

    # ------------------------------------------------------------------ weights

    def layout(self) -> Sequence[Sequence[Hosted]]:
        return [[hosted for param in rank for hosted in param.hosted] for rank in self._params]

    def receivers(self) -> Sequence[Any]:
        return self.ranks

    def begin_sync(self, version: int) -> None:
        """Have the SGLang process of every rank call its actor, and wait until all have."""
        self._end_update()
        self.version = -1
        self._post("/begin_weight_update", {})
        addresses = call_all(self.ranks, "address_text", deadline_s=self.stall_s)
        self._update = self._http.start(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": [_payload(address) for address in addresses],
                "load_format": LOADER,
                "weight_version": str(version),
                "flush_cache": True,
            },
            self._deadline_s,
        )
        waiting = list(self.ranks)
        end = time.monotonic() + self.stall_s
        while waiting:
            came = call_all(waiting, "accept", POLL_S, deadline_s=self.stall_s)
            waiting = [rank for rank, is_here in zip(waiting, came, strict=True) if not is_here]
            if waiting and self._update.done():
                self._check_servers()
                self._update.result()  # raises; or else SGLang did not do what it was asked
                raise EngineError(f"{self.name} took no weights: its loader was not called")
            if waiting and time.monotonic() > end:
                names = ", ".join(rank.name for rank in waiting)
                raise EngineError(f"no sync within {self.stall_s:g} s from: {names}")

    def commit(self, version: int) -> None:
        assert self._update is not None, "begin_sync comes first"
        self._end_update()
        self.version = version

    def _end_update(self) -> None:
        """Let SGLang's processes go on, if they wait for weights: until then they do nothing else.
        After a sync that failed the version stays -1, and the next sync fills all again."""
        update, self._update = self._update, None
        if update is None:
            return
        end = time.monotonic() + self.stall_s
        while True:
            call_all(self.ranks, "end_sync", POLL_S, deadline_s=self.stall_s)
            try:
                update.result(POLL_S)
                break
            except TimeoutError:
                if time.monotonic() > end:
                    raise EngineError(
                        f"{self.name} does not come back from a sync within {self.stall_s:g} s"
                    ) from None
        self._post("/end_weight_update", {})


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """SGLang says -1 where we say 0 for all tokens."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "sampling_seed": sampling.seed,
    }


@contextlib.contextmanager
def _read(what: str) -> Iterator[None]:
    """An answer: whatever is wrong with it, the engine that gave it is not to be believed."""
    try:
        yield
    except ValueError as error:
        raise EngineError(f"{what}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise EngineError(f"{what}: its answer is not one of SGLang's: {error!r}") from error


def completion(answer: Any, model: NemotronH, request: Request) -> Completion:
    """What a `/generate` answer says. Raises ValueError for what no training should see, and other
    errors for what is no such answer."""
    meta = answer["meta_info"]
    tokens, pairs = answer["output_ids"], meta["output_token_logprobs"]
    if request.scored:
        tokens = list(request.scored)
        pairs = meta["input_token_logprobs"][-len(tokens) :]
    if [token for _, token, *_ in pairs] != tokens:
        raise ValueError(f"{len(tokens)} tokens came with log-probs of {len(pairs)} or of others")
    logprobs = [logprob for logprob, *_ in pairs]
    if {*map(type, tokens)} - {int} or {*map(type, logprobs)} - {float, int, type(None)}:
        raise TypeError("tokens or log-probs that are not numbers")
    bad = [i for i, value in enumerate(logprobs) if value is None or not math.isfinite(value)]
    if bad:  # JSON has no NaN: SGLang says null
        raise ValueError(f"log-prob of token {bad[0]} is {logprobs[bad[0]]}: logits are not finite")
    versions = {span["version"] for span in meta.get("weight_versions") or []}
    if len(versions) > 1:
        raise ValueError(f"its tokens are of several versions of the weights: {sorted(versions)}")
    reason = meta["finish_reason"]["type"]
    routing = NO_ROUTING
    if request.sampling.wants_routing:
        num_read = len(request.tokens) + len(tokens) - 1  # the last token was never read
        routing = _routing(meta.get("routed_experts"), num_read, model)
    version = int(meta["weight_version"])
    return Completion(tuple(tokens), tuple(logprobs), version, Finish(reason), routing)


def _routing(told: str | None, num_read: int, model: NemotronH) -> Routing:
    """From base64 of int32 [num_read, all layers, top k]."""
    if told is None:
        raise ValueError("it was asked for the experts of its tokens and named none")
    ids = np.frombuffer(base64.b64decode(told), np.int32)
    shape = (num_read, model.num_layers, model.top_k)
    if ids.size != math.prod(shape):
        raise ValueError(f"it named {ids.size} experts; {list(shape)} were expected")
    return of_all_layers(ids.reshape(shape), model)


def _payload(address: str) -> str:
    """What SGLang wants for one rank: named tensors. Ours is a name and nothing: an empty tensor
    has no storage, so that no file descriptor has to reach SGLang, which would end it."""
    import torch

    buffer = io.BytesIO()
    ForkingPickler(buffer).dump([(address, torch.empty(0))])
    return base64.b64encode(buffer.getvalue()).decode()
