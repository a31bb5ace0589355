"""The serving loop of one rank: all ranks of an engine take the same steps at the same time.

Every step begins with a header, one small sum over all ranks:

    [bytes of news, abort and stop flags, tokens of each dp group, bytes of its results]

Only rank 0 hears from outside. It deals new requests out to dp groups, by load and prompt, and
broadcasts them, with the uids to give up; they take part from the next step on. So the schedule
follows from the submissions alone. Groups send what they finished to rank 0 after the header that
announced it.

With nothing to do, rank 0 sleeps on its inbox and the others in the header's collective. Rank 0
sends an empty header every quarter of `timeout_s`, so the collective timeout bounds how long a dead
peer stays unnoticed, however long the engine idles.
"""

from __future__ import annotations

import functools
import pickle
import queue
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch

from miles_lite.algo.routing import RouterSizes
from miles_lite.parallel import EngineDims
from miles_lite.rollout.deal import deal
from miles_lite.rollout.embedded.cache import Cache
from miles_lite.rollout.embedded.comm import Comms, Store
from miles_lite.rollout.embedded.model import Model, Step
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.sampler import DRAW, draw, likeliest
from miles_lite.rollout.embedded.scheduler import Plan, Running, Scheduler
from miles_lite.types import NO_ROUTING, Completion, Request, Routing
from miles_lite.unpickle import unpickle

# Of the messages among the ranks of an engine, which come through ports that anybody can find.
_NAMES = frozenset(
    [f"miles_lite.types.{name}" for name in "Request Sampling Finish Completion _routing".split()]
    + ["builtins.frozenset"]
)
Done = list[tuple[int, Completion]]  # uid and completion
_read = functools.partial(unpickle, names=_NAMES, what="a message among ranks")

ABORT, STOP = 1, 2


@dataclass(slots=True)
class Inbox:
    """What rank 0 heard from outside since the last step; empty on other ranks."""

    requests: list[Request] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)  # uids
    flags: int = 0


class Listener(Protocol):
    """Hears of every token as it is drawn, on the serving thread: it must not wait."""

    def stepped(self, sequences: Sequence[Running]) -> None:
        """Each has one more token; or was given up (Finish.abort) and has not."""
        ...

    def failed(self, reason: str) -> None:
        """Nothing is served any more."""
        ...


@dataclass(slots=True)
class Load:
    """What rank 0 knows of unfinished requests: the dp group and the cost of each."""

    group_of: dict[int, int]  # uid -> dp group
    cost_of: dict[int, int]  # uid -> tokens it may take
    total: list[int]  # of each dp group

    def assign(self, requests: Sequence[Request]) -> list[int]:
        """The group of each."""
        costs = [len(one.tokens) + one.sampling.max_new_tokens for one in requests]
        groups = deal([one.tokens for one in requests], costs, self.total)
        for one, cost, group in zip(requests, costs, groups, strict=True):
            self.group_of[one.uid], self.cost_of[one.uid] = group, cost
            self.total[group] += cost
        return groups

    def release(self, uid: int) -> None:
        self.total[self.group_of.pop(uid)] -= self.cost_of.pop(uid)


class Server:
    """The thread that serves, and the queues between it and the callers on rank 0."""

    def __init__(self, model: Model, dims: EngineDims, rank: int, options: EngineOptions):
        self.model, self.dims, self.rank, self.options = model, dims, rank, options
        self.device = torch.device(options.device)
        self._routers = RouterSizes.of(model.config)
        self.cache: Cache | None = None  # there during Phase.generate
        self.version = -1
        self.scheduler = Scheduler(options.max_running, options.prefill_tokens)
        self.num_steps = 0  # in which the model ran, on any rank
        self.failure = ""
        self.listener: Listener | None = None  # then there is nothing to take
        self._inbox: queue.SimpleQueue[list[Request] | frozenset[int] | int] = queue.SimpleQueue()
        self._mail = threading.Condition()  # guards the two below
        self._done: Done = []
        self._turn = 0  # counts submissions and polls; a poll that is not the latest takes nothing
        self._load = Load({}, {}, [0] * dims.dp)
        self._unsent: Done = []  # finished here, not yet at rank 0
        self._state = threading.Condition()  # held during a step; guards all of the above
        self._thread = threading.Thread(target=self._run, name=f"serve-{rank}", daemon=True)

    # --- called from outside ---

    def start(self, comms: Comms, store: Store | None) -> None:
        self.comms = self.model.comms = comms
        self._store = store
        self._thread.start()

    def put(self, message: list[Request] | frozenset[int] | int) -> None:
        """Requests, uids to give up, ABORT or STOP, for the next step. Rank 0 only."""
        self.check()
        self._next_turn()
        self._inbox.put(message)

    def take(self, max_wait_s: float) -> Done:
        """What finished since the last call; waits max_wait_s for at least one. Rank 0 only."""
        turn = self._next_turn()
        with self._mail:
            self._mail.wait_for(
                lambda: self._done or self.failure or self._turn != turn, max_wait_s
            )
            # a caller may be gone while its poll still waits here: it must not take what came after
            done: Done = []
            if self._turn == turn:
                done, self._done = self._done, done
        self.check()
        return done

    def _next_turn(self) -> int:
        with self._mail:
            self._turn += 1
            self._mail.notify_all()
            return self._turn

    def check(self) -> None:
        """Raise what ended the serving thread, if it ended."""
        if self.failure:
            raise RuntimeError(self.failure)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the serving thread between steps, once all this rank's requests are finished."""

        def free() -> bool:
            return bool(self.failure) or (self.scheduler.idle and not self._unsent)

        with self._state:
            if not self._state.wait_for(free, self.options.timeout_s):
                raise RuntimeError(
                    f"engine rank {self.rank} still has {len(self.scheduler.running)} running and "
                    f"{len(self.scheduler.waiting)} waiting requests; abort before changing phase"
                )
            self.check()
            yield

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # --- the serving thread ---

    def _run(self) -> None:
        try:
            with torch.inference_mode():  # thread-local, hence here
                while self._step():
                    pass
        except BaseException as error:  # handed to the caller of take and put
            self._fail(error)
        finally:
            self.comms.close()

    def _step(self) -> bool:
        """One step of this rank together with all others; False after STOP."""
        inbox = self._read_inbox() if self.rank == 0 else Inbox()
        with self._state:
            plan = self.scheduler.plan()
        dealt = [*zip(self._load.assign(inbox.requests), inbox.requests, strict=True)]
        requests = pickle.dumps((dealt, inbox.cancelled))
        results = pickle.dumps(self._unsent)
        header = self._exchange(inbox, plan, len(requests), len(results))
        num_bytes, flags, counts, sizes = header[0], header[1], *_halves(header[2:])
        cancelled: Collection[int] = ()
        with self._state:
            if num_bytes:
                dealt, cancelled = _read(self.comms.control.broadcast(requests, num_bytes))
                mine = self.dims.dp_rank(self.rank)
                self.scheduler.add(request for group, request in dealt if group == mine)
            self._collect(results, sizes)
            if flags & ABORT:
                self._give_up(self.scheduler.abort())
            elif any(counts):
                self._finish(self._forward(plan, counts))
                self.num_steps += 1
            if cancelled:  # after the step, whose plan has them in it
                given_up, moves = self.scheduler.cancel(cancelled)
                if self.cache is not None:
                    self.cache.move(moves)
                self._give_up(given_up)
            self._state.notify_all()
        return not flags & STOP

    def _read_inbox(self) -> Inbox:
        """New requests up to the first flag. Waits for a message only when nothing is under way."""
        inbox = Inbox()
        try:
            wait_s = 0.0 if self._load.group_of else self.options.timeout_s / 4
            message = self._inbox.get(block=wait_s > 0, timeout=wait_s or None)
            while True:
                if isinstance(message, int):
                    inbox.flags = message
                    break
                if isinstance(message, frozenset):
                    inbox.cancelled |= message
                else:
                    inbox.requests.extend(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass
        return inbox

    def _exchange(
        self, inbox: Inbox, plan: Plan | None, request_bytes: int, result_bytes: int
    ) -> list[int]:
        """The header, summed over ranks: each number has one rank that fills it in."""
        header = [0] * (2 + 2 * self.dims.dp)
        if self.rank == 0 and (inbox.requests or inbox.cancelled):
            header[0] = request_bytes
        header[1] = inbox.flags
        if self.dims.attn_tp_rank(self.rank) == 0:
            group = self.dims.dp_rank(self.rank)
            header[2 + group] = plan.num_tokens if plan else 0
            header[2 + self.dims.dp + group] = result_bytes if self._unsent else 0
        return self.comms.control.sum(torch.tensor(header)).tolist()

    def _collect(self, results: bytes, sizes: Sequence[int]) -> None:
        """Bring results of other groups to rank 0."""
        for group, num_bytes in enumerate(sizes):
            leader = group * self.dims.attn_tp
            if num_bytes and self.rank == leader:
                self.comms.control.send(results, 0)
                self._unsent = []
            elif num_bytes and self.rank == 0:
                self._deliver(_read(self.comms.control.receive(num_bytes, leader)))

    def _forward(self, plan: Plan | None, counts: Sequence[int]) -> list[Running]:
        """Run the model with the other groups and book one token for each sequence of the plan."""
        assert self.cache is not None, "requests outside Phase.generate are refused"
        step = Step.of(plan, self.device) if plan else None
        chosen: list[torch.Tensor] | None = None
        # all ranks of a group choose the same experts; the one that answers takes note
        if plan and plan.wants_routing and self.dims.attn_tp_rank(self.rank) == 0:
            chosen = []
        logits = self.model.forward(step, counts, self.cache, chosen)
        if plan is None or logits is None:
            return []
        if chosen:
            plan.book_routing(self._to_host(chosen))
        owners = plan.owners
        given = None
        if any(s.request.scored for s in plan.sequences):
            answers = [s.request.scored or (DRAW,) for s in plan.sequences]
            given = torch.tensor(list(chain.from_iterable(answers)), device=self.device)
        samplings = [s.request.sampling for s in owners]
        drawn = draw(logits, samplings, [s.position for s in owners], given)
        tokens, logprobs = torch.stack([part.double() for part in drawn]).tolist()  # the one sync
        for sequence, logprob in zip(owners, logprobs, strict=True):
            if logprob != logprob:
                raise RuntimeError(f"logits of request {sequence.request.uid} are not finite")
        if any(sampling.top_logprobs for sampling in samplings):
            for sequence, top in zip(owners, likeliest(logits, samplings), strict=True):
                sequence.likeliest = top
        finished, moves = self.scheduler.advance(plan, [int(t) for t in tokens], logprobs)
        self.cache.move(moves)
        if self.listener:
            self.listener.stepped(plan.sequences)
        return finished

    def _give_up(self, sequences: Sequence[Running]) -> None:
        if self.listener and sequences:
            self.listener.stepped(sequences)
        self._finish(sequences)

    def _to_host(self, chosen: Sequence[torch.Tensor]) -> memoryview:
        """Bytes of [T, L, K], as `Routing` wants them."""
        packed = torch.uint8 if self._routers.dtype.itemsize == 1 else torch.int16
        choices: Any = torch.stack(list(chosen), 1).to(packed).cpu().numpy()
        return memoryview(choices).cast("B")

    def _routing(self, sequence: Running) -> Routing:
        sizes, size = self._routers, self._routers.dtype.itemsize
        if not sequence.routing:
            return NO_ROUTING
        num_tokens = len(sequence.routing) // (sizes.num_layers * sizes.top_k * size)
        shape = (num_tokens, sizes.num_layers, sizes.top_k)
        return Routing(bytes(sequence.routing), shape, size)

    def _finish(self, sequences: Sequence[Running]) -> None:
        """Hand out what ended: at once on rank 0, through the next header from other groups."""
        if not sequences or self.dims.attn_tp_rank(self.rank):
            return
        done: Done = []
        for s in sequences:
            assert s.finish is not None
            completion = Completion(
                tuple(s.tokens), tuple(s.logprobs), self.version, s.finish, self._routing(s)
            )
            done.append((s.request.uid, completion))
        if self.rank == 0:
            self._deliver(done)
        else:
            self._unsent.extend(done)

    def _deliver(self, done: Done) -> None:
        for uid, _ in done:
            self._load.release(uid)
        if self.listener:
            return
        with self._mail:
            self._done.extend(done)
            self._mail.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Keep the first cause of the engine, tell the others through the store, wake callers."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"engine rank {self.rank} stopped serving in {frame.filename}:{frame.lineno}"
        text = f"{where}: {type(error).__name__}: {error}"[:2000]  # torch can go on for pages
        try:
            if self._store is not None:
                if self._store.check(["failure"]):
                    text = self._store.get("failure").decode()
                else:
                    self._store.set("failure", text)
        except Exception:  # the store went with rank 0; our own text stands
            pass
        self.failure = text
        if self.listener:
            self.listener.failed(text)
        with self._mail:
            self._mail.notify_all()
        with self._state:
            self._state.notify_all()


def _halves(values: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
