"""What all tests share."""

from __future__ import annotations

from collections.abc import Generator

import hypothesis
import pytest

# no test is a matter of how busy the machine is
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

MAX_CHARS = 1_000_000  # kept of what a test printed or logged


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hostile text in what was printed can be sent on by the process that ran the test."""
    report = yield
    report.sections = [
        (name, text[-MAX_CHARS:].encode(errors="backslashreplace").decode())
        for name, text in report.sections
    ]
    return report
