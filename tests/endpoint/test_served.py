"""How long answers took, as it is counted while a guest is served."""

from qmigrate.endpoint.served import Answered


def answered(*waited_us: int) -> Answered:
    counted = Answered()
    for each in waited_us:
        counted.add(each * 1000)
    return counted


def test_the_median_is_that_of_the_answers() -> None:
    assert answered().median_us is None
    assert answered(7).median_us == 7
    assert answered(3, 900, 5).median_us == 5
    assert answered(3, 5, 900, 901).median_us == 5


def test_of_answers_that_took_a_millisecond_or_more_no_median_is_told() -> None:
    assert answered(5000, 6000, 3).median_us is None


def test_an_answer_is_counted_by_its_power_of_two() -> None:
    counted = answered(0, 1, 2, 3, 4, 1023, 1024)
    assert [(power, count) for power, count in enumerate(counted.counts) if count] == [
        *((0, 2), (1, 2), (2, 1), (9, 1), (10, 1)),
    ]
    assert (counted.total_ns, counted.longest_ns) == (2057 * 1000, 1024 * 1000)
