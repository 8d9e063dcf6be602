"""The alignment rule, by hand-written tables."""

from dataclasses import replace

import pytest
import torch

from conftest import make_rollouts
from poweropd.batching import collate, group_by_tokens
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.types import Prompt, Rollout, ScoredRollout, TeacherScores

A = ScoredRollout(
    Rollout(Prompt("a", (11, 12)), (13, 9), (-0.1, -0.2), "stop"),
    TeacherScores(logprobs=torch.tensor([-1.0, -2.0]), entropies=torch.tensor([0.5, 0.6])),
)
B = ScoredRollout(
    Rollout(Prompt("b", (21,)), (22, 23, 24), (-0.3, -0.4, -0.5), "length"),
    TeacherScores(logprobs=torch.tensor([-3.0, -4.0, -5.0]), entropies=torch.tensor([0.7, 0.8, 0.9])),
)


def test_every_per_token_tensor_speaks_of_target_ids() -> None:
    batch = collate([A, B], pad_id=0)
    assert batch.input_ids.tolist() == [[11, 12, 13], [21, 22, 23]]
    assert batch.target_ids.tolist() == [[12, 13, 9], [22, 23, 24]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert batch.response_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.loss_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.inputs.target_ids.tolist() == [13, 9, 22, 23, 24]
    assert batch.inputs.teacher_logprobs is not None
    assert batch.inputs.teacher_logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert batch.inputs.rollout_logprobs is not None
    assert batch.inputs.rollout_logprobs.isnan().all()  # the student's own: nothing to correct
    assert batch.rows.tolist() == [0, 0, 1, 1, 1]
    assert batch.places.tolist() == [0, 1, 0, 1, 2]
    assert batch.ends.tolist() == [False, True, False, False, False]
    own = torch.tensor([-0.1, torch.nan, -0.3, -0.4, -0.5])  # merged end tokens have no counterpart in a sampler
    torch.testing.assert_close(batch.own_logprobs, own, equal_nan=True)
    assert batch.num_loss_tokens == 5


def test_off_policy_tokens_keep_their_sampling_probability() -> None:
    batch = collate([ScoredRollout(replace(A.rollout, source="teacher")), B], pad_id=0)
    assert batch.own_logprobs.isnan().tolist() == [True, True, False, False, False]
    assert batch.inputs.rollout_logprobs is not None
    torch.testing.assert_close(
        batch.inputs.rollout_logprobs, torch.tensor([-0.1, -0.2] + 3 * [torch.nan]), equal_nan=True
    )


def test_a_masked_token_leaves_the_loss_wherever_it_stands() -> None:
    batch = collate([A, B], pad_id=0, masked_ids=(13, 23))
    assert batch.loss_mask.tolist() == [[0, 0, 1], [1, 0, 1]]
    assert batch.inputs.target_ids.tolist() == [9, 22, 24]
    assert batch.inputs.teacher_logprobs is not None
    assert batch.inputs.teacher_logprobs.tolist() == [-2, -3, -5]
    assert batch.rows.tolist() == [0, 1, 1]
    assert batch.places.tolist() == [1, 0, 2]
    assert batch.ends.tolist() == [True, False, False]


def test_shorter_rows_are_padded_on_the_right_and_masked() -> None:
    long = ScoredRollout(Rollout(Prompt("c", (31, 32, 33)), (34, 35), (0.0, 0.0), "length"))
    short = ScoredRollout(Rollout(Prompt("d", (41,)), (42,), (0.0,), "length"))
    batch = collate([long, short], pad_id=7)
    assert batch.input_ids.tolist() == [[31, 32, 33, 34], [41, 7, 7, 7]]
    assert batch.target_ids.tolist() == [[32, 33, 34, 35], [42, 7, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert batch.inputs.teacher_logprobs is None


def test_a_masked_end_token_is_kept_in_the_response_but_not_in_the_loss() -> None:
    batch = collate([A, B], pad_id=0, masked_end_ids=(9, 24))
    assert batch.response_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.loss_mask.tolist() == [[0, 1, 0], [1, 1, 0]]


def test_whole_distributions_follow_the_loss_mask() -> None:
    head = LMHead(torch.ones(3, 1), vocab_size=3)

    def with_hidden(item: ScoredRollout, first: int) -> ScoredRollout:
        hidden = torch.arange(first, first + len(item.rollout))[:, None].float()
        return ScoredRollout(item.rollout, TeacherScores(distribution=Distribution((hidden,), (head,))))

    batch = collate([with_hidden(A, 0), with_hidden(B, 10)], pad_id=0, masked_end_ids=(9,))
    assert batch.inputs.teacher is not None
    assert batch.inputs.teacher.hidden[0][:, 0].tolist() == [0, 10, 11, 12]
    assert batch.loss_positions(batch.target_ids).tolist() == [13, 22, 23, 24]


def test_groups_hold_every_rollout_once_within_the_budget() -> None:
    rollouts = make_rollouts([(3, 5), (2, 40), (9, 9), (1, 1), (20, 2), (4, 4)])
    groups = group_by_tokens(rollouts, 40)
    assert sorted(index for group in groups for index in group) == list(range(6))
    for group in groups:
        longest = max(len(rollouts[i].prompt.prompt_ids) + len(rollouts[i]) for i in group)
        assert len(group) == 1 or len(group) * longest <= 40


@pytest.mark.parametrize("tokens", [1, 10, 10_000])
def test_groups_of_any_budget_cover_everything(tokens: int) -> None:
    rollouts = make_rollouts([(i % 5 + 1, i % 7 + 1) for i in range(30)])
    assert sorted(index for group in group_by_tokens(rollouts, tokens) for index in group) == list(range(30))
