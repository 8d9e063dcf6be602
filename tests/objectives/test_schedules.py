"""Schedules of a coefficient: exact values."""

import pytest

from poweropd.objectives.schedules import Coefficient


def test_constant_and_linear() -> None:
    assert [Coefficient(0.5).at(step, 5) for step in range(5)] == [0.5] * 5
    assert [Coefficient(0.5, "linear").at(step, 5) for step in range(5)] == [0.5, 0.375, 0.25, 0.125, 0]
    assert Coefficient(0.5, "linear").at(0, 1) == 0.5


@pytest.mark.parametrize(
    ("measured", "factor"), [(0.1, 1), (0.11, 1.01), (0.09, 0.99), (5.0, 1.02), (0.0, 0.98), (0.12, 1.02)]
)
def test_adaptive_is_the_proportional_controller(measured: float, factor: float) -> None:
    """arXiv 1909.08593, section 2.2: an error of 10 % changes the weight by 1 %, and at most 2 % a step."""
    coefficient = Coefficient(0.5, "adaptive", target=0.1)
    coefficient.observe(measured)
    assert coefficient.at(3, 5) == pytest.approx(0.5 * factor)
    coefficient.observe(measured)
    assert coefficient.at(3, 5) == pytest.approx(0.5 * factor**2)


def test_adaptive_finds_the_weight_that_holds_the_target() -> None:
    """A penalty that falls as its weight grows, `measured = 1 / weight`: the target 0.1 asks for a weight of 10."""
    coefficient = Coefficient(0.5, "adaptive", target=0.1)
    for _ in range(1000):
        coefficient.observe(1 / coefficient.at(0, 1))
    assert coefficient.at(0, 1) == pytest.approx(10, rel=1e-3)


def test_others_take_no_notice_of_measurements() -> None:
    coefficient = Coefficient(0.5)
    coefficient.observe(100.0)
    assert coefficient.at(0, 5) == 0.5


def test_raised_now_and_later() -> None:
    coefficient = Coefficient(0.5, "linear")
    coefficient.raise_()
    assert [coefficient.at(step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    coefficient.raise_(1.5)
    assert coefficient.at(0, 5) == 1.5


@pytest.mark.parametrize(
    "zero", [Coefficient(0.0), Coefficient(0.0, "linear"), Coefficient(0.0, "adaptive", target=0.1)]
)
def test_nothing_stays_nothing(zero: Coefficient) -> None:
    zero.observe(7.0)
    zero.raise_()
    assert zero.at(1, 5) == 0


def test_state_is_all_of_it() -> None:
    one, other = Coefficient(0.5, "adaptive", target=0.1), Coefficient(0.5, "adaptive", target=0.1)
    one.observe(3.0)
    one.raise_()
    other.load_state(one.state())
    one.observe(0.2)
    other.observe(0.2)
    assert other.at(2, 5) == one.at(2, 5) != 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, "adaptive"), "schedule adaptive needs a target above 0, got None"),
        ((0.5, "adaptive", 0.0), "schedule adaptive needs a target above 0, got 0"),
        ((0.5, "linear", 0.1), "schedule linear takes no target"),
        ((0.5, "cosine"), "unknown schedule 'cosine'; known: constant, linear, adaptive"),
        ((-0.5,), "it must be 0 or more"),
        ((float("nan"),), "it must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coefficient(*arguments)
