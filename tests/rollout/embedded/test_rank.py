"""One rank: batches and slots, life cycle, memory, weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file

from miles_lite.cluster.lease import RESIDENT
from miles_lite.parallel import EngineDims
from miles_lite.protocols import Phase
from miles_lite.rollout.embedded.options import EngineOptions
from miles_lite.rollout.embedded.rank import EngineRank
from miles_lite.rollout.layout import params
from miles_lite.types import Finish, Request
from tests.rollout.embedded.helpers import (
    GREEDY,
    ONE,
    SAMPLED,
    StartRank,
    Tiny,
    drain,
    random_prompt,
    run,
)

LENGTHS = (40, 1, 3, 17, 8, 30, 2, 25, 5, 11, 4, 9)


def requests(**changes) -> list[Request]:
    return [
        Request(uid, random_prompt(n, uid), replace(SAMPLED, seed=uid, **changes))
        for uid, n in enumerate(LENGTHS)
    ]


def test_results_do_not_depend_on_batch_or_order(start: StartRank):
    batch = requests()
    together = run(start(max_running=16), batch)
    few_slots = run(start(max_running=3, prefill_tokens=32), batch)
    rank = start()
    backwards = run(rank, batch[::-1])
    for request in batch[:4]:  # alone, later, in a cache that others have used
        backwards[request.uid] = run(rank, [request])[request.uid]
    for uid, completion in together.items():
        for other in (few_slots[uid], backwards[uid]):
            assert other.tokens == completion.tokens
            assert other.logprobs == pytest.approx(completion.logprobs, abs=1e-4)


def test_seeds(start: StartRank):
    rank, prompt = start(max_running=16), random_prompt(12, 0)
    group = [Request(uid, prompt, replace(SAMPLED, seed=uid % 6)) for uid in range(12)]
    done = run(rank, group)
    for uid in range(6):
        assert done[uid].tokens == done[uid + 6].tokens
    assert len({completion.tokens for completion in done.values()}) == 6


def test_a_slot_keeps_nothing_of_its_last_sequence(start: StartRank):
    """With a single slot B runs where A ran. The converse, a leak, is seen in test_leak_is_seen."""
    first = Request(1, random_prompt(33, 1), replace(GREEDY, max_new_tokens=20))
    second = Request(2, random_prompt(2, 2), replace(GREEDY, max_new_tokens=20))
    alone = run(start(max_running=1), [second])[2]
    after = run(start(max_running=1), [first, second])[2]
    assert after == alone


def test_leak_is_seen(start: StartRank):
    """The test above has teeth: state of another sequence in the slot does change the answer."""
    rank = start(max_running=1)
    request = Request(1, random_prompt(2, 2), replace(GREEDY, max_new_tokens=20))
    expected = run(rank, [request])[1]
    ssm = rank.server.cache.ssm[0]
    scan = rank.model.mixers["M"]

    def leaky(layer, u, step, cache):
        before = ssm.clone()
        out = scan(layer, u, step, cache)
        if layer == 0 and step.pad is not None:
            ssm.add_(before)
        return out

    rank.model.mixers["M"] = leaky
    assert run(rank, [replace(request, uid=2)])[2] != expected


def test_stop_token_ends_a_completion_and_is_its_last_token(start: StartRank):
    rank, prompt = start(), random_prompt(9, 4)
    free = run(rank, [Request(0, prompt, GREEDY)])[0]
    assert free.finish is Finish.length and len(free.tokens) == GREEDY.max_new_tokens
    stop = next(i for i, token in enumerate(free.tokens) if token not in free.tokens[:i] and i > 1)
    sampling = replace(GREEDY, stop_token_ids=(free.tokens[stop], 127))
    cut = run(rank, [Request(1, prompt, sampling)])[1]
    assert cut.finish is Finish.stop and cut.tokens == free.tokens[: stop + 1]
    assert len(cut.logprobs) == len(cut.tokens)


def test_cancelled_requests_do_not_disturb_the_others(start: StartRank):
    endless = [Request(uid, (uid, 3), replace(GREEDY, max_new_tokens=90)) for uid in (20, 21, 22)]
    expected = run(start(max_running=16), requests(max_new_tokens=40))
    rank = start(max_running=16)
    rank.submit([*requests(max_new_tokens=40), *endless])
    rank.cancel([20, 22])
    done = drain(rank, len(LENGTHS) + 3)
    assert [done[uid].finish for uid in (20, 21, 22)] == [
        Finish.abort,
        Finish.length,
        Finish.abort,
    ]
    for uid, completion in expected.items():
        assert done[uid].tokens == completion.tokens
    rank.cancel([21, 22, 99])  # over already, or never heard of
    assert run(rank, [Request(30, (1, 2), GREEDY)])[30].finish is Finish.length


def test_abort_returns_what_there_is(start: StartRank):
    rank = start(max_running=2, max_seq_len=100_000)
    endless = replace(GREEDY, max_new_tokens=90_000)
    rank.submit([Request(uid, (uid, 3), endless) for uid in range(4)])
    time.sleep(0.3)
    rank.abort()
    done = drain(rank, 4)
    assert {completion.finish for completion in done.values()} == {Finish.abort}
    assert [len(done[uid].tokens) > 0 for uid in range(4)] == [True, True, False, False]
    assert run(rank, requests()[:3])  # and it goes on


def test_phases_take_and_drop_the_cache(tiny: Tiny, start: StartRank):
    rank = start()
    first = run(rank, requests())
    size = {**rank.held_bytes(), RESIDENT: ANY}
    assert size["cache"] > 0 and first[0].version == 0
    rank.enter(Phase.train)
    assert rank.held_bytes() == size | {"cache": 0}
    with pytest.raises(RuntimeError, match=r"rank 0 takes requests in Phase\.generate only"):
        rank.submit(requests())
    rank.enter(Phase.sync)
    assert rank.held_bytes()["cache"] == 0
    rank.tensor("norm_f").mul_(0.5)
    rank.set_version(5)
    rank.enter(Phase.generate)
    assert rank.held_bytes() == size
    second = run(rank, requests())
    assert all(completion.version == 5 for completion in second.values())
    assert second[0].logprobs != first[0].logprobs


def test_refusals(tiny: Tiny, start: StartRank):
    rank = start(max_seq_len=50)
    good = Request(0, random_prompt(38, 0), GREEDY)
    assert run(rank, [good])[0].finish is Finish.length
    bad = {
        r"39 prompt tokens \+ max_new_tokens = 12 exceed max_seq_len = 50": random_prompt(39, 0),
        "empty prompt": (),
        r"token ids 3 \.\. 128; vocab_size is 128": (3, 128),
    }
    for message, prompt in bad.items():
        with pytest.raises(ValueError, match=message):
            rank.submit([good, Request(1, prompt, GREEDY)])
    with pytest.raises(ValueError, match="top_p = 0"):
        rank.submit([replace(good, sampling=replace(GREEDY, top_p=0.0))])
    assert rank.poll(0.2) == []  # nothing of a refused submission runs

    empty = EngineRank(tiny.model, ONE, 0, EngineOptions())
    with pytest.raises(RuntimeError, match="never sent weights"):
        empty.enter(Phase.generate)


def test_a_crash_reaches_the_caller(start: StartRank):
    rank = start()
    rank.tensor("layers.0.in_proj").fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"engine rank 0 stopped.*request 3 are not finite"):
        run(rank, [Request(3, (1, 2), GREEDY)])
    with pytest.raises(RuntimeError, match="not finite"):
        rank.submit([Request(4, (1, 2), GREEDY)])


@pytest.mark.parametrize(
    "dims",
    [ONE, EngineDims(tp=4, dp=1, ep=4), EngineDims(tp=4, dp=2, ep=2), EngineDims(tp=2, dp=2, ep=1)],
    ids=str,
)
def test_hosted_covers_every_element_and_every_tensor(tiny: Tiny, dims: EngineDims):
    """Load a model of ones over NaN: no NaN may stay, and all ranks together need every HF row."""
    disk = load_file(tiny.folder / "model.safetensors")
    wanted = {name: torch.zeros(value.shape[: value.dim()]) for name, value in disk.items()}
    for index in range(dims.tp):
        rank = EngineRank(tiny.model, dims, index, EngineOptions())
        for param in rank.model.params:
            rank.tensor(param.name).fill_(float("nan"))
        rank.load_hf(tiny.folder)
        covered = {
            param.name: torch.zeros(param.shape) for param in params(tiny.model, dims, index)
        }
        for hosted in rank.hosted():
            target = covered[hosted.param]
            target = target if hosted.index < 0 else target[hosted.index]
            start = 0
            for segment in hosted.segments:
                target.narrow(hosted.dim, start, len(segment)).add_(1)
                wanted[segment.tensor].narrow(hosted.dim, segment.start, len(segment)).add_(1)
                start += len(segment)
        for name, times in covered.items():
            assert (times == 1).all(), name
            assert rank.tensor(name).isfinite().all(), name
    for name, times in wanted.items():
        assert (times >= 1).all(), name


def test_parameters_that_stay_fp32(tiny: Tiny):
    rank = EngineRank(tiny.model, ONE, 0, EngineOptions(dtype="bfloat16"))
    kept = {p.name.split(".")[-1] for p in rank.model.params if p.keep_fp32}
    assert kept == {"A_log", "D", "dt_bias", "correction_bias"}
    for param in rank.model.params:
        expected = torch.float32 if param.keep_fp32 else torch.bfloat16
        assert rank.tensor(param.name).dtype is expected


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (EngineDims(tp=8, dp=1, ep=1), "n_groups = 4 .* 8 ranks of an attention group"),
        (EngineDims(tp=3, dp=3, ep=3), "n_routed_experts = 8 over ep = 3"),
        (EngineDims(tp=4, dp=3, ep=1), "tp = 4 is no multiple of dp = 3"),
    ],
)
def test_impossible_layouts_are_refused(tiny: Tiny, dims: EngineDims, message: str):
    with pytest.raises(ValueError, match=message):
        EngineRank(tiny.model, dims, 0, EngineOptions())


def test_a_forgotten_poll_takes_nothing(start: StartRank):
    """A caller that is gone leaves a poll waiting; what is submitted later is not for it."""
    rank = start()
    with ThreadPoolExecutor() as pool:
        forgotten = pool.submit(rank.poll, 30.0)
        time.sleep(0.1)
        rank.submit([Request(0, (1, 2), GREEDY)])
        assert forgotten.result(5) == []
        assert drain(rank, 1)
