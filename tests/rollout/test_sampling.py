"""Drawing tokens: the distribution drawn from is the one that is reported."""

import math

import pytest
import torch

from conftest import make_rollouts
from poweropd.rollout.engine import Sampling
from poweropd.rollout.sampling import draw, uniforms

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log() + 3.0


def sampling(**settings: float) -> Sampling:
    return Sampling(stop_ids=(0,), max_new_tokens=8, **settings)


# The kept set of each truncation, written down by hand; probabilities are renormalised over it.
CASES = [
    ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
    ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
    ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
    ({"top_p": 0.7}, [0.4, 0.3, 0, 0, 0]),
    ({"top_p": 0.71}, [0.4, 0.3, 0.15, 0, 0]),
    ({"top_p": 0.01}, [0.4, 0, 0, 0, 0]),
    ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
    ({"top_k": 4, "top_p": 0.75}, [0.4, 0.3, 0.15, 0, 0]),  # top_p of the renormalised four: 0.42 + 0.32 < 0.75
]


@pytest.mark.parametrize(("settings", "weights"), CASES)
def test_draws_follow_the_truncated_distribution_and_report_it(settings: dict, weights: list[float]) -> None:
    expected = torch.tensor(weights) / sum(weights)
    count = 40_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, logprobs = draw(LOGITS.expand(count, -1), uniform, sampling(**settings))
    shares = torch.bincount(ids, minlength=5) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / count)  # evenly spread uniforms: exact to one draw
    torch.testing.assert_close(logprobs.exp(), expected[ids], rtol=1e-5, atol=0)


def test_temperature_zero_is_greedy() -> None:
    ids, logprobs = draw(LOGITS[None], torch.tensor([0.99], dtype=torch.float64), sampling(temperature=0))
    assert ids.tolist() == [0]
    assert logprobs.tolist() == [0.0]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 0.4999, 0.5, 1 - 2**-53):
        ids, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), sampling())
        assert ids.item() in (1, 3)


def test_uniforms_depend_on_seed_prompt_and_sample_alone() -> None:
    prompt, other = (rollout.prompt for rollout in make_rollouts([(2, 2), (2, 2)]))
    first = uniforms(prompt, 0, seed=1, count=5)
    assert torch.equal(first, uniforms(prompt, 0, seed=1, count=5))
    assert torch.equal(first, uniforms(prompt, 0, seed=1, count=50)[:5])
    for changed in (
        uniforms(prompt, 1, seed=1, count=5),
        uniforms(prompt, 0, seed=2, count=5),
        uniforms(other, 0, seed=1, count=5),
    ):
        assert not torch.equal(first, changed)
    many = uniforms(prompt, 0, seed=3, count=20_000)
    assert 0 <= many.min() < many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
