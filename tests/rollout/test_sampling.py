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


LARGE = [1000, 4096, 20_000, 151_665]


@pytest.mark.parametrize("size", LARGE)
def test_draws_from_a_large_vocabulary_invert_its_cumulative_probability(size: int) -> None:
    """In float64 over the whole vocabulary, up to the rounding of the probabilities; tokens that cannot be are there too."""
    count = 60
    logits = 3 * torch.randn(1, size)
    logits[0, torch.randint(0, size, (size // 3,))] = -1e9
    uniform = torch.cat([torch.rand(count - 3, dtype=torch.float64), torch.tensor([0, 1e-300, 1 - 2**-53])])
    ids, logprobs = draw(logits.expand(count, -1), uniform, sampling())
    probabilities = logits[0].double().softmax(0)
    assert probabilities[ids].min() > 0
    cumulative = probabilities.cumsum(0)
    assert (cumulative[ids] - uniform).min() > -1e-6
    assert (uniform - (cumulative[ids] - probabilities[ids])).min() > -1e-6
    torch.testing.assert_close(logprobs, probabilities[ids].log().float(), rtol=1e-5, atol=1e-5)


def test_the_least_likely_tokens_come_as_often_as_they_should() -> None:
    """Half of the probability lies on one token, half on thousands, spread with a slope."""
    count, size = 20_000, 5_000
    weights = torch.linspace(1, 2, size, dtype=torch.float64)
    weights[777] = weights.sum() - weights[777]
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = weights.log().float()[None]
    ids = torch.cat([draw(logits.expand(len(part), -1), part, sampling())[0] for part in uniform.split(500)])
    drawn, expected = (
        values.split([777, 1, size - 778])[2].split(100)
        for values in (torch.bincount(ids, minlength=size).double(), count * weights / weights.sum())
    )
    for got, wanted in zip(drawn, expected, strict=True):
        assert got.sum().item() == pytest.approx(wanted.sum().item(), abs=1.5)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.97, "min_p": 0.01}, {"top_k": 700}])
def test_a_truncation_may_keep_many_tokens(settings: dict) -> None:
    """Against all tokens sorted, for rows of which some are flat and some sharp; none depends on the others."""
    size, count = 3000, 200
    logits = torch.randn(size) * torch.tensor([0.5, 1.0, 4.0])[:, None]
    rows = torch.arange(count) % 3
    uniform = torch.rand(count, dtype=torch.float64)
    ids, logprobs = draw(logits[rows], uniform, sampling(**settings))
    for row in range(3):
        descending, order = logits[row].double().softmax(0).sort(descending=True)
        descending[settings.get("top_k", size) :] = 0
        descending /= descending.sum()
        kept = (descending.cumsum(0) - descending < settings.get("top_p", 1.0)) & (
            descending >= settings.get("min_p", 0.0) * descending[0]
        )
        descending = descending * kept / descending[kept].sum()
        assert kept.sum() > 256 or row == 2
        mine = rows == row
        place = torch.searchsorted(descending.cumsum(0), uniform[mine], right=True).clamp(max=int(kept.sum()) - 1)
        assert (ids[mine] == order[place]).float().mean() > 0.97  # a uniform number may lie on a border
        expected = torch.zeros(size, dtype=torch.float64).scatter(0, order, descending)[ids[mine]].log()
        torch.testing.assert_close(
            logprobs[mine], expected.float(), rtol=0, atol=2e-3
        )  # one token more or less is kept
    alone = [
        draw(logits[row][None], each[None], sampling(**settings))[0].item()
        for row, each in zip(rows, uniform, strict=True)
    ]
    assert alone == ids.tolist()


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
