"""Where the threads of a process are, as its heartbeat tells."""

from __future__ import annotations

from types import FrameType, FunctionType

from miles_lite.cluster.roll import whereabouts


def paused(code_changes: dict[str, bytes]) -> FrameType:
    """Of a generator of ours that waits."""

    def waits():
        yield

    code = waits.__code__.replace(**code_changes)  # pyright: ignore[reportArgumentType]
    running = FunctionType(code, {"__name__": "miles_lite.made_up"})()
    next(running)
    frame = running.gi_frame
    assert isinstance(frame, FrameType)
    return frame


def test_a_thread_between_two_lines_does_not_end_the_heartbeat() -> None:
    nowhere = paused({"co_linetable": b""})
    assert nowhere.f_lineno is None
    assert whereabouts({1: nowhere}) == ("paused.waits", False)
    assert whereabouts({1: paused({})}) == ("paused.waits", False)
