"""Reward workers: verdicts arrive, whatever an answer or a reward function does to its process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_lite.config import RewardFunction
from miles_lite.rollout import reward_process
from miles_lite.rollout.reward_worker import load_reward
from miles_lite.rollout.rewards import NUM_QUICK, RewardLimits, RewardWorkers
from miles_lite.types import Prompt, Verdict

ROOT = Path(__file__).parents[2]

# One reward that does what it is told.
OBEY = """
import ctypes, os, stat, sys, time
from types import SimpleNamespace

def obey(response, label):
    word, _, rest = response.partition(" ")
    if word == "sleep": time.sleep(float(rest))
    elif word == "spin": 9**9**9  # holds the interpreter in C
    elif word == "compute":
        begin = time.process_time()
        while time.process_time() < begin + float(rest): pass
    elif word == "exit": os._exit(3)
    elif word == "sysexit": sys.exit(0)
    elif word == "segfault": ctypes.string_at(0)
    elif word == "memory": return len(bytearray(64 << 30))
    elif word == "hoard": return len([bytearray(1 << 20) for _ in range(1 << 20)])
    elif word == "raise": raise KeyError(rest)
    elif word == "forge": os.write(int(rest), b"[1.0, \\"\\"]\\n" * 99 + b"?\\n"); time.sleep(60)
    elif word == "flood":
        if not stat.S_ISFIFO(os.fstat(int(rest)).st_mode): raise OSError  # stderr, kept by pytest
        while True: os.write(int(rest), b"x" * 65536)
    elif word == "daemon":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if os.fork() == 0:
                with open(rest, "w") as file: file.write(f"{os.getpid()}\\n")
                time.sleep(600)
            os._exit(0)
        os.waitpid(pid, 0)
        os._exit(3)
    elif word == "print": print("[1.0, \\"\\"]")
    elif word == "read": return float(len(sys.stdin.read()))
    elif word == "pid": return os.getpid()
    elif word == "modules": return SimpleNamespace(reward=0.0, reason=",".join(sorted(sys.modules)))
    elif word == "has": return rest in sys.modules
    elif word == "count":
        with open(rest, "a") as file: file.write("x")
        return os.path.getsize(rest)
    elif word == "value": return eval(rest)
    return 1.0
"""


@pytest.fixture
def obey(tmp_path: Path) -> Path:
    file = tmp_path / "obey.py"
    file.write_text(OBEY)
    return file


@pytest.fixture
def workers(obey: Path) -> Iterator[RewardWorkers]:
    limits = RewardLimits(timeout_s=1.5, memory_bytes=512 << 20, response_len=100_000)
    with pool(obey, "obey", 2, limits) as workers:
        yield workers


def ask(label: str = "1", *, reward: str = "", text: str = "", **metadata: Any) -> Prompt:
    return Prompt("", (), text, label, reward, metadata)


ASK = ask()


def pool(
    file: Path, function: str, num_workers: int = 1, limits: RewardLimits | None = None, **options
) -> RewardWorkers:
    reward = RewardFunction(file=file, function=function, options=options)
    return RewardWorkers({"": reward}, num_workers, limits)


def grade_all(workers: RewardWorkers, responses: list[str]) -> list[Verdict]:
    async def grades() -> list[Verdict]:
        return await asyncio.gather(*(workers.grade(ASK, response) for response in responses))

    return asyncio.run(grades())


def grade(workers: RewardWorkers, response: str) -> Verdict:
    return grade_all(workers, [response])[0]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_death(pids: list[int], limit_s: float) -> list[int]:
    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


# ------------------------------------------------------------------ grading


def test_grades_come_back_in_order_over_several_loops(workers: RewardWorkers) -> None:
    for start in (0, 1000):
        values = range(start, start + 500)
        verdicts = grade_all(workers, [f"value {value}" for value in values])
        assert verdicts == [Verdict(float(value), "") for value in values]


@pytest.mark.parametrize("word", ["sleep 60", "spin"])
def test_only_the_stuck_answer_times_out(workers: RewardWorkers, word: str) -> None:
    """Also where the interpreter itself is stuck; the others of its batch are graded."""
    start = time.monotonic()
    verdicts = grade_all(workers, [f"value {i}" for i in range(50)] + [word] + ["value 7"] * 50)
    elapsed = time.monotonic() - start
    expected = [Verdict(float(i), "") for i in range(50)] + [Verdict(0.0, "timeout")]
    assert verdicts == expected + [Verdict(7.0, "")] * 50
    assert 1.5 <= elapsed < 10  # the limit, and a new worker for the rest


def test_other_lanes_proceed_while_one_is_stuck(workers: RewardWorkers) -> None:
    async def race() -> tuple[bool, Verdict]:
        stuck = asyncio.create_task(workers.grade(ASK, "sleep 60"))
        await asyncio.sleep(0.1)
        for i in range(20):
            assert (await workers.grade(ASK, f"value {i}")).reward == i
        return stuck.done(), await stuck

    was_done, verdict = asyncio.run(race())
    assert not was_done
    assert verdict == Verdict(0.0, "timeout")


def test_the_limit_is_for_each_answer_not_for_a_batch(workers: RewardWorkers) -> None:
    verdicts = grade_all(workers, [f"sleep 0.4{i:02d}" for i in range(12)])
    assert verdicts == [Verdict(1.0, "")] * 12


@pytest.mark.parametrize("word", ["exit", "sysexit", "segfault", "memory", "hoard"])
def test_a_crash_costs_one_answer(obey: Path, word: str) -> None:
    limits = RewardLimits(timeout_s=30, memory_bytes=256 << 20)
    with pool(obey, "obey", 2, limits) as workers:
        verdicts = grade_all(workers, ["value 1", "value 2", word, "value 3", "value 4"])
    assert verdicts == [
        Verdict(1.0, ""),
        Verdict(2.0, ""),
        Verdict(0.0, "crash"),
        Verdict(3.0, ""),
        Verdict(4.0, ""),
    ]


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("raise oh", Verdict(0.0, "error: KeyError")),
        ("value float('nan')", Verdict(0.0, "not_finite")),
        ("value -float('inf')", Verdict(0.0, "not_finite")),
        ("value 10**400", Verdict(0.0, "not_finite")),
        ("value SimpleNamespace(reward=float('nan'), reason='')", Verdict(0.0, "not_finite")),
        ("value SimpleNamespace(reward=0.25, reason='')", Verdict(0.25, "")),
        ("value SimpleNamespace(reward=1, reason='judge away')", Verdict(0.0, "judge away")),
        ("value None", Verdict(0.0, "bad_type")),
        ("value '1'", Verdict(0.0, "bad_type")),
        ("value {'score': 1}", Verdict(0.0, "bad_type")),
        ("value True", Verdict(1.0, "")),
        ("value -1", Verdict(-1.0, "")),
        ("value __import__('fractions').Fraction(1, 4)", Verdict(0.25, "")),
        ("x" * 100_001, Verdict(0.0, "too_long")),
        ("print", Verdict(1.0, "")),
        ("read", Verdict(0.0, "")),
        ("\x00\ud800\n\u2028", Verdict(1.0, "")),
    ],
)
def test_verdicts(workers: RewardWorkers, response: str, verdict: Verdict) -> None:
    assert grade(workers, response) == verdict


def test_a_worker_that_talks_nonsense_is_replaced(workers: RewardWorkers) -> None:
    for descriptor in range(3, 6):
        assert grade(workers, f"forge {descriptor}").reason in (
            "crash",
            "timeout",
            "error: OSError",
        )
    assert grade_all(workers, ["value 1", "value 2"]) == [Verdict(1.0, ""), Verdict(2.0, "")]


def test_a_worker_that_never_ends_its_line_is_replaced(workers: RewardWorkers) -> None:
    begin = time.monotonic()
    reasons = [grade(workers, f"flood {descriptor}").reason for descriptor in range(3, 9)]
    assert "crash" in reasons and set(reasons) <= {"crash", "timeout", "error: OSError"}
    assert time.monotonic() - begin < 20


def test_what_a_worker_left_behind_ends_with_it(obey: Path, tmp_path: Path) -> None:
    """Although it left session and group, and holds the pipes of the worker."""
    left = tmp_path / "left"
    with pool(obey, "obey", 2, RewardLimits(timeout_s=60)) as workers:
        begin = time.monotonic()
        assert grade(workers, f"daemon {left}") == Verdict(0.0, "crash")
        assert time.monotonic() - begin < 30  # it is known to be dead, before the time limit
        assert wait_for_death([int(left.read_text())], 5) == []


def test_big_batches_fit_through_the_pipe(workers: RewardWorkers) -> None:
    responses = [f"{i:03d} " + "y" * 90_000 for i in range(200)]
    assert grade_all(workers, responses) == [Verdict(1.0, "")] * 200


def test_verdicts_are_remembered_and_failures_are_not(
    workers: RewardWorkers, tmp_path: Path
) -> None:
    counter = tmp_path / "counter"
    assert [grade(workers, f"count {counter}").reward for _ in range(3)] == [1.0, 1.0, 1.0]
    assert grade(workers, "exit") == grade(workers, "exit") == Verdict(0.0, "crash")


def test_memory_of_verdicts_is_bounded(obey: Path, tmp_path: Path) -> None:
    count = f"count {tmp_path / 'counter'}"
    with pool(obey, "obey", 1, RewardLimits(cache_len=2)) as workers:
        assert [grade(workers, r).reward for r in (count, "a", count, "b", count)] == [1] * 5
        grade_all(workers, ["c", "d"])
        assert grade(workers, count).reward == 2.0
    with pool(obey, "obey", 1, RewardLimits(cache_len=0)) as workers:
        assert [grade(workers, count).reward for _ in range(2)] == [3.0, 4.0]


def test_a_cancelled_grade_leaves_the_rest_alone(workers: RewardWorkers) -> None:
    async def cancel() -> Verdict:
        task = asyncio.create_task(workers.grade(ASK, "sleep 0.5"))
        await asyncio.sleep(0.1)
        task.cancel()
        return await workers.grade(ASK, "value 5")

    assert asyncio.run(cancel()) == Verdict(5.0, "")
    assert grade(workers, "value 6") == Verdict(6.0, "")


MANY = """
def length(response, label): return float(len(response))
def asks(response, label, prompt, *, metadata, scale): return scale * (len(prompt) + metadata["n"])
def rank(responses, label): return [sorted(responses).index(r) for r in responses]
def short(responses, label): return [1.0]
def strict(responses, label): raise KeyError(label)
"""


@pytest.fixture
def many(tmp_path: Path) -> Iterator[RewardWorkers]:
    file = tmp_path / "many.py"
    file.write_text(MANY)
    functions = {
        "": RewardFunction(file=file, function="length"),
        "asks": RewardFunction(file=file, function="asks", options={"scale": 0.5}),
        **{name: RewardFunction(file=file, function=name) for name in ("rank", "short", "strict")},
    }
    with RewardWorkers(functions, 2) as workers:
        yield workers


def test_a_prompt_chooses_its_reward_and_is_shown_to_it(many: RewardWorkers) -> None:
    asks = ask(reward="asks", text="abcd", n=6)
    other = ask(reward="asks", text="abcdef", n=6)

    async def verdicts() -> list[Verdict]:
        return [await many.grade(prompt, "xyz") for prompt in (ASK, asks, other, asks)]

    assert [verdict.reward for verdict in asyncio.run(verdicts())] == [3.0, 5.0, 6.0, 5.0]
    with pytest.raises(ValueError, match="no reward 'asked' .* asks"):
        asyncio.run(many.grade(ask(reward="asked"), "xyz"))


def test_a_group_is_scored_as_a_whole(many: RewardWorkers) -> None:
    def scores(reward: str) -> list[Verdict]:
        return asyncio.run(many.grade_group(ask(reward=reward), ["b", "c", "aa"]))

    assert many.scores_groups("rank") and not many.scores_groups("")
    assert scores("rank") == [Verdict(1.0, ""), Verdict(2.0, ""), Verdict(0.0, "")]
    assert scores("short") == [Verdict(0.0, "bad_count: 1")] * 3
    assert scores("strict") == [Verdict(0.0, "error: KeyError")] * 3
    assert scores("") == [Verdict(1.0, ""), Verdict(1.0, ""), Verdict(2.0, "")]


@pytest.mark.parametrize("word", ["sleep", "spin"])
def test_nobody_waits_behind_stuck_answers(workers: RewardWorkers, word: str) -> None:
    """More stuck answers than workers: others take over, and all of them time out side by side."""
    finished: dict[str, float] = {}
    begin = time.monotonic()

    async def one(response: str) -> Verdict:
        verdict = await workers.grade(ASK, response)
        finished[response] = time.monotonic() - begin
        return verdict

    grade_all(workers, [f"value -{i}" for i in range(NUM_QUICK)])  # it is quick, as a rule

    async def race() -> list[Verdict]:
        stuck = [f"{word} 6{i}" for i in range(32)]
        return await asyncio.gather(*map(one, [*stuck, *(f"value {i}" for i in range(40))]))

    verdicts = asyncio.run(race())
    assert verdicts[:32] == [Verdict(0.0, "timeout")] * 32
    assert [verdict.reward for verdict in verdicts[32:]] == list(range(40))
    # 16 rounds of 1.5 s, one after the other, would be 24 s; five doublings and one limit are 2.5 s
    # on an idle machine.
    assert max(finished.values()) < 18


@pytest.mark.slow  # 60 answers that need 0.4 s of a core each
def test_answers_that_compute_for_long_do_not_rob_each_other(obey: Path) -> None:
    """All side by side on two cores, each would need 12 s."""
    with pool(obey, "obey", 2, RewardLimits(timeout_s=8)) as workers:
        verdicts = grade_all(workers, [f"compute 0.4{i:02d}" for i in range(60)])
    assert verdicts == [Verdict(1.0, "")] * 60


def test_a_whole_batch_of_stuck_answers_lets_others_through(obey: Path) -> None:
    """As when a policy falls in love with one endless formula, a group and a half of it."""

    async def race(workers: RewardWorkers) -> tuple[Verdict, bool]:
        stuck = [asyncio.create_task(workers.grade(ASK, f"sleep 6{i}")) for i in range(12)]
        await asyncio.sleep(0)  # they come first
        verdict = await workers.grade(ASK, "value 2")
        waiting = not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        return verdict, waiting

    with pool(obey, "obey", 2, RewardLimits(timeout_s=60)) as workers:
        assert asyncio.run(race(workers)) == (Verdict(2.0, ""), True)


def test_a_reward_may_use_signals(tmp_path: Path) -> None:
    """Libraries bound their own time with an alarm, which works in the main thread only."""
    (tmp_path / "alarmed.py").write_text(
        """
import signal, time

def alarmed(response, label):
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        time.sleep(float(response))
    except TimeoutError:
        return -1.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 1.0
"""
    )
    with pool(tmp_path / "alarmed.py", "alarmed") as workers:
        verdicts = grade_all(workers, ["0", "30", "0.0"])
    assert [verdict.reward for verdict in verdicts] == [1.0, -1.0, 1.0]


# ------------------------------------------------------------------ processes


def test_workers_are_light(workers: RewardWorkers) -> None:
    heavy = ["torch", "ray", "numpy", "sympy", "asyncio", "multiprocessing"]
    assert [grade(workers, f"has {name}").reward for name in heavy] == [0.0] * len(heavy)


def test_a_worker_killed_while_idle_is_replaced(workers: RewardWorkers) -> None:
    grade_all(workers, ["value 3", "value 4"])
    _, *pids = workers.pids
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_for_death(pids, 5) == []
    assert grade_all(workers, ["value 1", "value 2"]) == [Verdict(1.0, ""), Verdict(2.0, "")]


@pytest.mark.parametrize("victim", ["worker", "zygote"])
def test_an_answer_whose_worker_is_killed_is_graded_again(
    workers: RewardWorkers, victim: str
) -> None:
    async def race() -> Verdict:
        slow = asyncio.create_task(workers.grade(ASK, "sleep 0.7"))
        await asyncio.sleep(0.3)
        zygote, *pids = workers.pids
        for pid in [zygote] if victim == "zygote" else pids:
            os.kill(pid, signal.SIGKILL)
        return await slow

    assert asyncio.run(race()) == Verdict(1.0, "")


def test_a_stopped_zygote_is_replaced(
    workers: RewardWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles_lite.rollout.reward_process.FORK_S", 1.0)
    grade(workers, "value 1")
    zygote, *_ = workers.pids
    workers._zygote._control.settimeout(1.0)
    os.kill(zygote, signal.SIGSTOP)
    assert grade(workers, "exit") == Verdict(0.0, "crash")
    assert grade_all(workers, ["value 1", "value 2"]) == [Verdict(1.0, ""), Verdict(2.0, "")]
    assert wait_for_death([zygote], 5) == []


def test_a_killed_zygote_is_replaced(workers: RewardWorkers) -> None:
    grade_all(workers, ["value 3", "value 4"])
    pids = workers.pids
    os.kill(pids[0], signal.SIGKILL)
    assert wait_for_death(pids, 5) == []  # its workers die with it
    assert grade_all(workers, ["value 1", "value 2"]) == [Verdict(1.0, ""), Verdict(2.0, "")]
    assert pids[0] not in workers.pids


def test_nothing_runs_while_idle(workers: RewardWorkers) -> None:
    grade(workers, "value 1")
    mine, theirs = time.process_time(), [cpu_ticks(pid) for pid in workers.pids]
    time.sleep(1)
    assert time.process_time() - mine < 0.05
    assert [cpu_ticks(pid) for pid in workers.pids] == theirs


def cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_close_kills_the_workers_and_ends_the_waiting(obey: Path) -> None:
    async def close_early(workers: RewardWorkers) -> list[object]:
        tasks = [asyncio.create_task(workers.grade(ASK, f"sleep 6{i}")) for i in range(9)]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(workers.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    workers = pool(obey, "obey", 2)
    grade_all(workers, ["value 1", "value 2"])
    pids = workers.pids
    start = time.monotonic()
    outcomes = asyncio.run(close_early(workers))
    assert time.monotonic() - start < 30
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 9
    assert wait_for_death(pids, 1) == []
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        grade(workers, "value 1")


def test_a_worker_that_ends_while_it_is_looked_at_is_lost(
    obey: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file in /proc opens, and then has nothing to say."""
    with pool(obey, "obey") as workers:
        grade(workers, "value 1")
        _, pid = workers.pids

        def open_then_kill(path: str) -> Any:
            file = open(path)  # noqa: SIM115 - whoever asked for it closes it
            if path == f"/proc/{pid}/stat":
                os.kill(pid, signal.SIGKILL)
                workers._zygote.kill(pid)  # which waits for it
                wait_for_death([pid], 5)
            return file

        monkeypatch.setattr(reward_process, "open", open_then_kill, raising=False)
        assert grade(workers, "sleep 0.3") == Verdict(1.0, "")  # of its second try


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_of_ours_reaches_who_waits(obey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(RewardWorkers, "_wait_out", fail)
    with pool(obey, "obey", 2) as workers, pytest.raises(ZeroDivisionError, match="planted"):
        grade(workers, "sleep 1")


@pytest.mark.parametrize("busy", ["", "spin", "sleep 60"])
def test_no_worker_outlives_its_parent(obey: Path, busy: str) -> None:
    """Even if the parent gets kill -9 while the worker is stuck in C."""
    script = f"""
        import asyncio, os, signal
        from pathlib import Path
        from miles_lite.config import RewardFunction
        from miles_lite.rollout.rewards import NUM_QUICK, RewardLimits, RewardWorkers
        from miles_lite.types import Prompt

        async def run():
            obey = RewardFunction(file=Path({str(obey)!r}), function="obey")
            workers = RewardWorkers({{"": obey}}, 2, RewardLimits(timeout_s=60))
            for _ in range(9):
                await workers.grade(Prompt("", (), "", "0", "", {{}}), f"value {{_}}")
            if {busy!r}:
                asks = [Prompt("", (), "", str(i), "", {{}}) for i in range(2)]
                asyncio.gather(*(workers.grade(ask, {busy!r}) for ask in asks))
                await asyncio.sleep(0.5)
            print(*workers.pids, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(run())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 2  # the zygote and its workers
    assert wait_for_death(pids, 5) == []


# ------------------------------------------------------------------ reward files


def test_a_file_may_have_any_name_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "math.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "my-reward.py").write_text(
        "import math\nfrom .math import double\n"
        "def score(response, label, scale=1): return double(math.sqrt(len(response)))\n"
    )
    reward = load_reward(tmp_path / "my-reward.py", "score")
    assert reward.call("abcd", "") == 4.0
    with pool(tmp_path / "my-reward.py", "score", 1) as workers:
        assert grade(workers, "abcd") == Verdict(4.0, "")


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "fixed.py"
    for value in (1.0, 25.0):
        file.write_text(f"def fixed(response, label): return {value}")
        assert load_reward(file, "fixed").call("", "") == value


@pytest.mark.parametrize(
    ("code", "function", "message"),
    [
        ("def score(response, label): return 1", "scor", "did you mean 'score'"),
        ("def abc(response, label): return 1", "zzz", "it has abc"),
        ("score = 3", "score", "no function 'score'"),
        ("def score(response): return 1", "score", r"takes \(response\), but"),
        ("def score(response, label, args): return 1", "score", "but a reward takes"),
        ("async def score(response, label): return 1", "score", "is async"),
        ("import no_such_module", "score", "ModuleNotFoundError: No module named 'no_such"),
        ("import neighbour", "score", "from .neighbour import"),
        ("def score(:", "score", "SyntaxError"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, code: str, function: str, message: str) -> None:
    (tmp_path / "neighbour.py").touch()
    (tmp_path / "score.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        load_reward(tmp_path / "score.py", function)
    with pytest.raises(ValueError, match=message):
        pool(tmp_path / "score.py", function, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urll": "x"}, "no option 'urll' .*did you mean 'url'"),
        ({}, "missing a required argument: 'url'"),
        ({"label": "x"}, "no option 'label'"),
    ],
)
def test_unfit_options_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    (tmp_path / "score.py").write_text("def score(response, label, *, url, prompt=''): return 1")
    with pytest.raises(ValueError, match=message):
        load_reward(tmp_path / "score.py", "score", options)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "deepscaler.py").touch()
    with pytest.raises(ValueError, match=r"did you mean 'deepscaler\.py'"):
        load_reward(tmp_path / "deepscalar.py", "deepscaler")


def test_a_worker_that_dies_at_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text("import os\nos._exit(1)")
    with pytest.raises(ValueError, match="crash"):
        pool(tmp_path / "dead.py", "dead", 2)
