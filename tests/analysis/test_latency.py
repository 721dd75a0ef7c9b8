"""What a destination says of how long its guest waited for pages."""

from typing import Any

import pytest

from qmigrate.analysis.latency import Bucket, latency_in

# As QEMU 11.1.3 answered, shortened to eight buckets.
ANSWER = {
    "postcopy-blocktime": 4,
    "postcopy-vcpu-blocktime": [4],
    "postcopy-latency": 26_211,
    "postcopy-vcpu-latency": [26_211],
    "postcopy-latency-dist": [1, 0, 0, 0, 10, 7, 0, 2],
}


def test_a_bucket_reaches_from_a_power_of_two_to_the_next() -> None:
    """As `info migrate -a` of QEMU 11.1 prints them: 1 us - 2 us, 2 us - 4 us..., but what lies outside is in them."""
    buckets = latency_in(ANSWER).buckets
    assert buckets[0] == Bucket(0, 2, 1)
    assert buckets[4] == Bucket(16, 32, 10)
    assert buckets[7] == Bucket(128, None, 2)
    assert latency_in(ANSWER).count == 20


def test_a_share_is_reached_in_its_bucket() -> None:
    latency = latency_in(ANSWER)
    assert latency.percentile(0.5) == Bucket(16, 32, 10)
    assert latency.percentile(0.99) == Bucket(128, None, 2)
    assert latency_in({}).percentile(0.5) is None


def test_a_mean_that_its_own_distribution_contradicts_is_found() -> None:
    bounded = {"postcopy-latency-dist": [0, 0, 4, 0]}
    assert latency_in({**bounded, "postcopy-latency": 5_000}).mean_fits
    assert not latency_in({**bounded, "postcopy-latency": 9_000}).mean_fits
    assert not latency_in({**bounded, "postcopy-latency": 3_000}).mean_fits
    assert latency_in({"postcopy-latency-dist": [0, 0, 0, 4], "postcopy-latency": 10**12}).mean_fits


def test_older_qemus_tell_only_for_how_long_cpus_waited() -> None:
    latency = latency_in({"postcopy-blocktime": 6, "postcopy-vcpu-blocktime": [6, 2]})
    assert (latency.known, latency.buckets, latency.blocktime_ms, latency.vcpu_blocktime_ms) == (True, [], 6, [6, 2])
    assert not latency_in({"status": "completed"}).known


@pytest.mark.parametrize("nonsense", [[1, -1], [1, "2"], [1, None], "12", 12, [1 << 64], [0] * 65, [True], {"a": 1}])
def test_a_distribution_that_is_none_is_left_out(nonsense: Any) -> None:
    assert latency_in({"postcopy-latency-dist": nonsense}).buckets == []
