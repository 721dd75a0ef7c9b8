"""Page requests are matched with the pages that pass after them."""

from qmigrate.analysis.latency import Bucket
from qmigrate.analysis.requests import PageRequest, Requests

PAGE = 4096


def ask(requests: Requests, start: int, *, at_us: int, block: str | None = "pc.ram", length: int = PAGE) -> PageRequest:
    request = requests.asked(block, start, length, at_ns=at_us * 1000, connection=0, page_size=PAGE)
    assert request is not None
    return request


def send(requests: Requests, start: int, end: int, *, at_us: int, block: str = "pc.ram") -> list[PageRequest]:
    return list(requests.passed(block, [(start, end)], at_ns=at_us * 1000, connection=1, page_size=PAGE))


def test_the_answer_is_the_page_that_passes_next() -> None:
    requests = Requests()
    first, second = ask(requests, 0x5000, at_us=10), ask(requests, 0x9000, at_us=20, block=None)
    assert send(requests, 0x1000, 0x5000, at_us=30) == []
    assert send(requests, 0x5000, 0x9000, at_us=140) == [first]
    assert send(requests, 0x9000, 0xA000, at_us=1020) == [second]
    assert (first.delay_ns, first.answered_on, second.delay_ns) == (130_000, 1, 1_000_000)
    assert (requests.count, requests.answered, requests.unanswered, requests.longest_ns) == (2, 2, 0, 1_000_000)
    assert requests.histogram[0] == Bucket(128, 256, 1)
    assert requests.histogram[-1] == Bucket(512, 1024, 1)
    assert sum(bucket.count for bucket in requests.histogram) == 2


def test_a_page_of_another_block_is_no_answer() -> None:
    requests = Requests()
    ask(requests, 0x5000, at_us=10)
    assert send(requests, 0x5000, 0x6000, at_us=20, block="pc.rom") == []
    assert requests.unanswered == 1


def test_what_had_passed_already_was_on_its_way() -> None:
    requests = Requests()
    send(requests, 0x5000, 0x6000, at_us=5)
    assert ask(requests, 0x5000, at_us=10).on_way
    assert (requests.answered, requests.on_way, requests.histogram) == (0, 1, [])


def test_after_a_recovery_what_passed_before_may_be_lost() -> None:
    requests = Requests()
    send(requests, 0x5000, 0x6000, at_us=5)
    requests.resumed()
    request = ask(requests, 0x5000, at_us=10)
    assert send(requests, 0x5000, 0x6000, at_us=20) == [request]


def test_a_host_page_is_answered_when_all_of_it_has_passed() -> None:
    requests = Requests()
    request = ask(requests, 0x200000, at_us=10, length=2 << 20)
    assert send(requests, 0x200000, 0x3FF000, at_us=20) == []
    assert send(requests, 0x3FF000, 0x400000, at_us=30) == [request]


def test_one_page_answers_all_who_asked_for_it() -> None:
    requests = Requests()
    twice = [ask(requests, 0x5000, at_us=10), ask(requests, 0x5000, at_us=12)]
    assert send(requests, 0x4000, 0x7000, at_us=20) == twice
    assert requests.repeated == 1


def test_a_request_without_a_block_before_it_is_none() -> None:
    assert Requests().asked(None, 0, PAGE, at_ns=0, connection=0, page_size=PAGE) is None


def test_a_length_that_lies_costs_no_memory() -> None:
    requests = Requests()
    request = ask(requests, 0, at_us=10, length=0xFFFFFFFF)
    assert ask(requests, 0x1000, at_us=11, length=0).length == 0
    assert request.delay_ns is None
