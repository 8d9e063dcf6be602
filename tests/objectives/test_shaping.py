"""Sums over the tokens of a rollout, against the recursion that defines them."""

import pytest
import torch

from poweropd.objectives.shaping import discounted_future


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("lengths", [(), (1,), (5,), (1, 1, 7, 2, 64, 1, 33)])
def test_the_future_of_a_token_is_that_of_its_own_rollout(lengths: tuple[int, ...], discount: float) -> None:
    rewards = torch.randn(sum(lengths), dtype=torch.float64)
    rollouts = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    expected = []
    for own in rewards.split(lengths):
        future, rest = [], 0.0
        for reward in reversed(own.tolist()):
            future.append(rest)
            rest = discount * (reward + rest)
        expected += reversed(future)
    given = rewards.clone()
    torch.testing.assert_close(
        discounted_future(rewards, rollouts, discount), torch.tensor(expected, dtype=torch.float64)
    )
    assert torch.equal(rewards, given)


def test_a_reward_that_is_not_finite_spoils_its_own_rollout_alone() -> None:
    rewards, rollouts = torch.tensor([1.0, 2.0, torch.inf, 3.0, 4.0, 5.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert discounted_future(rewards, rollouts, 0.5).tolist() == [1.0, 0.0, 1.5, 0.0, 2.5, 0.0]
