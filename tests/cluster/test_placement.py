"""Groups stay on a host wherever one can hold them."""

from __future__ import annotations

import pytest

from miles_lite.cluster.placement import check_groups
from miles_lite.config import ConfigError


def hosts(*shares: int) -> list[str]:
    """Of each rank, in the order of placement, which is by number: .9 comes before .10."""
    return [f"10.0.0.{9 + i}" for i, share in enumerate(shares) for _ in range(share)]


def test_ultra_has_no_group_on_more_hosts_than_it_needs() -> None:
    check_groups(hosts(*[8] * 16), {"parallel.tp": 8, "ep": 32, "attention": 8, "engine": 32})


def test_a_group_larger_than_a_host_may_cross() -> None:
    check_groups(hosts(1, 1), {"parallel.tp": 2})
    check_groups(hosts(3, 1), {"parallel.expert_tp x ep": 4})


@pytest.mark.parametrize(
    ("shares", "size", "where"),
    [
        ((3, 1), 2, "ranks 2 to 3 would lie on 10.0.0.9 and 10.0.0.10"),
        ((4, 8, 4), 8, "ranks 0 to 7 would lie on 10.0.0.9 and 10.0.0.10"),
        ((6, 6), 4, "ranks 4 to 7 would lie on 10.0.0.9 and 10.0.0.10"),
    ],
)
def test_a_group_that_would_cross_without_need_is_refused(
    shares: tuple[int, ...], size: int, where: str
) -> None:
    with pytest.raises(ConfigError, match=f"parallel.tp = {size}: {where}, as the hosts give"):
        check_groups(hosts(*shares), {"parallel.tp": size})
