"""The real SGLang, on a CPU, behind the same seam as the embedded engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from miles_lite.algo.drift_parts import flip_rate
from miles_lite.algo.routing import choices
from miles_lite.cluster.lease import RESIDENT
from miles_lite.parallel import EngineDims
from miles_lite.protocols import EngineError, Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.rollout.sglang.engine import SGLangEngine
from miles_lite.types import Completion, Finish, Request, Sampling
from miles_lite.weights.plan import Copy, Place, Route
from tests.rollout.embedded.helpers import GREEDY, ONE, SAMPLED, Tiny, build, random_prompt, run
from tests.rollout.sglang.engines import Trainer, ask, serving, started

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

LAYOUTS = [EngineDims(tp=1, dp=1, ep=1), EngineDims(tp=2, dp=1, ep=2), EngineDims(tp=2, dp=2, ep=2)]
REQUESTS = [
    Request(number, random_prompt(length, seed=number), replace(base, seed=number + 1))
    for number, (length, base) in enumerate(
        [(5, GREEDY), (9, SAMPLED), (17, GREEDY), (3, SAMPLED), (30, GREEDY), (12, SAMPLED)]
    )
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def pair(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SGLangEngine, Trainer]]:
    """An engine and who sends its weights, one after the other for each layout."""
    with started(tiny.folder, request.param, tmp_path_factory.mktemp("log")) as engine:
        yield engine, Trainer(tiny.folder, engine)


Pair = tuple[SGLangEngine, Trainer]


def test_it_refuses_to_serve_weights_it_never_got(pair: Pair) -> None:
    engine, _ = pair
    engine.enter(Phase.sync)
    with pytest.raises(EngineError, match="engine 0 was never sent weights"):
        engine.enter(Phase.generate)


def test_a_sync_brings_what_sglangs_own_loader_reads(pair: Pair, tiny: Tiny) -> None:
    """Every tensor of every rank, by SGLang's checker; and not a byte more than is hosted."""
    engine, trainer = pair
    engine.enter(Phase.sync)
    sent = trainer.send(1)
    assert sent == engine.held_bytes()["weights"]
    ours = _checksums(engine)
    view = engine._http.get("/model_info", 60)["model_path"]
    engine._post("/update_weights_from_disk", {"model_path": view, "load_format": "auto"})
    assert len(ours) == engine._spec.dims.tp
    assert ours == _checksums(engine)


def _checksums(engine: SGLangEngine) -> dict[int, dict[str, str]]:
    """By rank and tensor, from SGLang's own checker; every DP rank answers for all."""
    ranks = engine._post("/weights_checker", {"action": "checksum"})["ranks"]
    return {rank["parallelism_info"][0]["tp_rank"]: rank["checksums"] for rank in ranks}


def test_it_says_what_transformers_and_the_embedded_engine_say(pair: Pair, tiny: Tiny) -> None:
    engine, trainer = pair
    serving(engine, trainer, 2)
    answers = ask(engine, REQUESTS)
    embedded = _embedded(tiny, REQUESTS)
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert answer.version == 2
        assert answer.finish is Finish.length
        assert len(answer.tokens) == request.sampling.max_new_tokens
        _check_logprobs(tiny, request, answer)
        if request.sampling.temperature == 0:
            assert answer.tokens == embedded[request.uid].tokens
            assert answer.logprobs == pytest.approx(embedded[request.uid].logprobs, abs=1e-4)


def test_a_prefill_scores_what_was_decoded(pair: Pair, tiny: Tiny) -> None:
    """With the experts of all tokens, beside requests that draw."""
    engine, trainer = pair
    serving(engine, trainer, 7)
    plain = REQUESTS[0].sampling
    for changes, can in (({}, True), ({"temperature": 0.7}, False), ({"truncated": True}, False)):
        assert engine.can_score(replace(plain, **({"temperature": 1.0} | changes))) is can
    drawing = [r for r in REQUESTS if r.sampling.temperature == 1]
    drawn = ask(engine, [replace(r, sampling=_telling(r.sampling)) for r in drawing])
    scoring = [
        Request(100 + r.uid, r.tokens, _telling(r.sampling, len(answer.tokens)), answer.tokens)
        for r, answer in zip(drawing, drawn, strict=True)
    ]
    scored = ask(engine, [*scoring, REQUESTS[0]])[:-1]
    for request, before, after in zip(drawing, drawn, scored, strict=True):
        assert after.tokens == before.tokens and after.version == 7
        _check_logprobs(tiny, request, after)
        assert flip_rate(before.routing, after.routing) < 0.1


def _telling(sampling: Sampling, max_new_tokens: int = 12) -> Sampling:
    return replace(sampling, max_new_tokens=max_new_tokens, wants_routing=True)


def _check_logprobs(tiny: Tiny, request: Request, answer: Completion) -> None:
    logits = tiny.logits(request.tokens + answer.tokens)
    expected = logits.log_softmax(-1)[len(request.tokens) - 1 : -1]
    picked = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(picked.tolist(), abs=1e-4)


def _embedded(tiny: Tiny, requests: list[Request]) -> dict[int, Completion]:
    options = EngineOptions(
        dtype="float32",
        device="cpu",
        max_running=8,
        max_seq_len=256,
        prefill_tokens=1024,
        timeout_s=60.0,
    )
    rank = EngineRank(tiny.model, ONE, 0, options)
    rank.connect("")
    rank.load_hf(tiny.folder)
    rank.set_version(0)
    rank.enter(Phase.generate)
    try:
        return run(rank, requests)
    finally:
        rank.close()


def test_a_seed_draws_the_same_whatever_else_runs(pair: Pair) -> None:
    """Among requests that sample alike, as those of a rollout do: SGLang draws in another way as
    soon as a batch holds one that is greedy or has top-p or top-k."""
    engine, trainer = pair
    serving(engine, trainer, 3)
    sampled = [r for r in REQUESTS if r.sampling.temperature > 0]
    together = ask(engine, [replace(r, uid=100 + r.uid) for r in sampled])
    alone = [ask(engine, [replace(r, uid=200 + r.uid)])[0] for r in reversed(sampled)]
    assert [a.tokens for a in together] == [a.tokens for a in reversed(alone)]
    assert len({a.tokens for a in alone}) == len(alone)


def test_it_names_the_experts_that_the_embedded_engine_chooses(pair: Pair, tiny: Tiny) -> None:
    engine, trainer = pair
    serving(engine, trainer, 15)
    asked = [
        replace(r, uid=900 + r.uid, sampling=replace(r.sampling, wants_routing=True))
        for r in REQUESTS
        if r.sampling.temperature == 0
    ]
    answers = ask(engine, asked)
    embedded = _embedded(tiny, asked)
    for request, answer in zip(asked, answers, strict=True):
        ours, theirs = choices(answer.routing), choices(embedded[request.uid].routing)
        assert ours.shape == (len(request.tokens) + len(answer.tokens) - 1, 2, 3)
        assert (np.sort(ours) == np.sort(theirs)).all()


def test_stop_tokens_end_an_answer_and_are_its_last(pair: Pair) -> None:
    engine, trainer = pair
    serving(engine, trainer, 4)
    (free,) = ask(engine, [replace(REQUESTS[0], uid=300)])
    stop = free.tokens[3]
    sampling = replace(REQUESTS[0].sampling, stop_token_ids=(stop,))
    (stopped,) = ask(engine, [replace(REQUESTS[0], uid=301, sampling=sampling)])
    assert stopped.finish is Finish.stop
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_abort_ends_what_runs_and_leaves_it_usable(pair: Pair) -> None:
    engine, trainer = pair
    serving(engine, trainer, 5)
    long = replace(GREEDY, max_new_tokens=200)
    requests = [Request(400 + i, random_prompt(20, seed=i), long) for i in range(6)]

    async def cut_short() -> list[Completion]:
        tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.3)
        await engine.abort()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(cut_short())
    assert Finish.abort in {answer.finish for answer in answers}
    for answer in answers:
        assert len(answer.logprobs) == len(answer.tokens) <= 200
    (after,) = ask(engine, [replace(REQUESTS[0], uid=450)])
    assert after.finish is Finish.length


def test_leaving_generate_ends_requests_that_nobody_waits_for(pair: Pair) -> None:
    engine, trainer = pair
    serving(engine, trainer, 6)

    async def give_up() -> None:
        request = Request(500, random_prompt(20, seed=0), replace(GREEDY, max_new_tokens=200))
        task = asyncio.ensure_future(engine.generate(request))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(give_up())
    engine.enter(Phase.train)
    held = dict(engine.held_bytes())
    assert held.pop(RESIDENT) > 100 << 20  # an interpreter with torch
    assert held == {"weights": 0, "cache": 0, "graphs": 0}
    assert engine.version == -1


def test_released_weights_that_were_not_sent_again_are_noticed(pair: Pair) -> None:
    """What comes back after a release is garbage (NaN in the CPU's memory saver)."""
    engine, trainer = pair
    serving(engine, trainer, 7)
    engine.enter(Phase.train)
    engine.enter(Phase.sync)
    engine.version = 7  # a driver that forgot
    engine.enter(Phase.generate)
    with pytest.raises(EngineError, match=r"engine 0: request 600: .* not finite"):
        ask(engine, [replace(REQUESTS[0], uid=600)])
    serving(engine, trainer, 8)
    (answer,) = ask(engine, [replace(REQUESTS[0], uid=601)])
    assert answer.version == 8


def test_a_dropped_expert_is_named_and_the_next_sync_mends_it(pair: Pair) -> None:
    engine, trainer = pair
    lost = "backbone.layers.1.mixer.experts.3.up_proj.weight"

    def elsewhere(plan: list[Route]) -> list[Route]:
        """The engine writes the expert where another one comes to lie."""
        return [
            replace(
                route,
                buckets=tuple(
                    tuple(moved(c) if c.tensor == lost else c for c in b) for b in route.buckets
                ),
            )
            for route in plan
        ]

    def moved(copy: Copy) -> Copy:
        target = copy.target._replace(index=(copy.target.index + 1) % 4)
        return copy._replace(target=target)

    engine.enter(Phase.sync)
    with pytest.raises(RuntimeError, match=rf"engine 0 rank \d: the sync puts '{lost}' into .* at"):
        trainer.send(9, elsewhere)
    serving(engine, trainer, 10)
    assert ask(engine, [replace(REQUESTS[0], uid=700)])[0].version == 10


def test_swapped_names_are_named(pair: Pair) -> None:
    engine, trainer = pair
    swap = {
        "model.layers.0.mixer.D": "model.layers.0.mixer.dt_bias",
        "model.layers.0.mixer.dt_bias": "model.layers.0.mixer.D",
    }

    def swapped(plan: list[Route]) -> list[Route]:
        def turned(place: Place) -> Place:
            return place._replace(param=swap.get(place.param, place.param))

        return [
            replace(
                route,
                buckets=tuple(
                    tuple(c._replace(target=turned(c.target)) for c in bucket)
                    for bucket in route.buckets
                ),
            )
            for route in plan
        ]

    engine.enter(Phase.sync)
    with pytest.raises(RuntimeError, match=r"puts '.*mixer\.D' into '.*mixer\.dt_bias', SGLang"):
        trainer.send(11, swapped)
    serving(engine, trainer, 12)


def test_a_rank_killed_in_a_sync_is_named_and_the_engine_comes_up_again(pair: Pair) -> None:
    """Last for each layout: it costs a server."""
    engine, trainer = pair
    engine.enter(Phase.sync)
    engine.begin_sync(13)
    victim = _schedulers()[-1]
    victim.kill()
    lost = trainer._sender.send(60).lost.values()
    assert any("failed in 'load_bucket'" in why and "went away" in why for why in lost), lost
    engine.connect(["127.0.0.1"] * engine._spec.dims.tp, 400)
    serving(engine, trainer, 14)
    assert ask(engine, [replace(REQUESTS[0], uid=800)])[0].version == 14
    _schedulers()[0].kill()
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"engine 0 rank 0: .*(died|ended)"):
        ask(engine, [replace(REQUESTS[0], uid=801)])
    assert time.monotonic() - begin < 20


def _schedulers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("sglang::sched") or "sglang::scheduler" in " ".join(
            process.cmdline()
        ):
            found.append(process)
    assert found, [p.cmdline() for p in psutil.Process().children(recursive=True)]
    return found
