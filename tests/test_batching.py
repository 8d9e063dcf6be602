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


def test_every_per_token_tensor_speaks_of_the_token_that_its_position_predicts() -> None:
    batch = collate([A, B])
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 23]
    assert batch.lengths == (3, 3)
    assert batch.loss_positions.tolist() == [1, 2, 3, 4, 5]
    assert batch.inputs.target_ids.tolist() == [13, 9, 22, 23, 24]
    assert batch.inputs.teacher_logprobs is not None
    assert batch.inputs.teacher_logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert batch.inputs.rollout_logprobs is None  # the student's own: nothing to correct
    assert batch.rows.tolist() == [0, 0, 1, 1, 1]
    assert batch.places.tolist() == [0, 1, 0, 1, 2]
    assert batch.ends.tolist() == [False, True, False, False, False]
    torch.testing.assert_close(batch.own_logprobs, torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]))
    assert batch.num_loss_tokens == 5


def test_what_an_engine_cannot_tell_stays_unknown() -> None:
    untold = replace(A.rollout, rollout_logprobs=(-0.1, float("nan")))
    batch = collate([ScoredRollout(untold), B])
    assert batch.own_logprobs.isnan().tolist() == [False, True, False, False, False]
    batch = collate([ScoredRollout(replace(untold, source="mixture")), B])
    assert batch.inputs.rollout_logprobs is not None
    assert batch.inputs.rollout_logprobs.isnan().tolist() == [False, True, True, True, True]


def test_off_policy_tokens_keep_their_sampling_probability() -> None:
    batch = collate([ScoredRollout(replace(A.rollout, source="teacher")), B])
    assert batch.own_logprobs.isnan().tolist() == [True, True, False, False, False]
    assert batch.inputs.rollout_logprobs is not None
    torch.testing.assert_close(
        batch.inputs.rollout_logprobs, torch.tensor([-0.1, -0.2] + 3 * [torch.nan]), equal_nan=True
    )


def test_a_masked_token_leaves_the_loss_wherever_it_stands() -> None:
    batch = collate([A, B], masked_ids=(13, 23))
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 23]
    assert batch.loss_positions.tolist() == [2, 3, 5]
    assert batch.inputs.target_ids.tolist() == [9, 22, 24]
    assert batch.inputs.teacher_logprobs is not None
    assert batch.inputs.teacher_logprobs.tolist() == [-2, -3, -5]
    assert batch.rows.tolist() == [0, 1, 1]
    assert batch.places.tolist() == [1, 0, 2]
    assert batch.ends.tolist() == [True, False, False]


def test_rows_of_any_length_lie_end_to_end() -> None:
    long = ScoredRollout(Rollout(Prompt("c", (31, 32, 33)), (34, 35), (0.0, 0.0), "length"))
    short = ScoredRollout(Rollout(Prompt("d", (41,)), (42,), (0.0,), "length"))
    batch = collate([long, short, A])
    assert batch.input_ids.tolist() == [31, 32, 33, 34, 41, 11, 12, 13]
    assert batch.lengths == (4, 1, 3)
    assert batch.loss_positions.tolist() == [2, 3, 4, 6, 7]
    assert batch.inputs.target_ids.tolist() == [34, 35, 42, 13, 9]
    assert batch.rows.tolist() == [0, 0, 1, 2, 2]
    assert batch.inputs.teacher_logprobs is None  # of two of them


def test_a_masked_end_token_leaves_the_loss_at_the_end_alone() -> None:
    batch = collate([A, B], masked_end_ids=(9, 23, 24))
    assert batch.inputs.target_ids.tolist() == [13, 22, 23]
    assert batch.loss_positions.tolist() == [1, 3, 4]
    assert batch.ends.tolist() == [False, False, False]


def test_no_rollouts_and_no_loss_tokens_are_batches_too() -> None:
    nothing, masked = collate([]), collate([A], masked_ids=(13, 9))
    assert (nothing.num_loss_tokens, nothing.lengths, len(nothing.input_ids)) == (0, (), 0)
    assert (masked.num_loss_tokens, masked.lengths, len(masked.input_ids)) == (0, (3,), 3)
    assert masked.inputs.teacher_logprobs is not None
    assert masked.inputs.teacher_logprobs.shape == masked.own_logprobs.shape == (0,)


def test_whole_distributions_follow_the_loss_mask() -> None:
    head = LMHead(torch.ones(3, 1), vocab_size=3)

    def with_hidden(item: ScoredRollout, first: int) -> ScoredRollout:
        hidden = torch.arange(first, first + len(item.rollout))[:, None].float()
        return ScoredRollout(item.rollout, TeacherScores(distribution=Distribution((hidden,), (head,))))

    batch = collate([with_hidden(A, 0), with_hidden(B, 10)], masked_end_ids=(9,))
    assert batch.inputs.teacher is not None
    assert batch.inputs.teacher.hidden[0][:, 0].tolist() == [0, 10, 11, 12]
    assert batch.inputs.target_ids.tolist() == [13, 22, 23, 24]


def sizes_of(groups: list[list[int]], rollouts: list[Rollout]) -> list[tuple[int, int]]:
    """Tokens that are fed of each group, without padding and with it."""
    fed = [[len(rollouts[i].prompt.prompt_ids) + len(rollouts[i]) - 1 for i in group] for group in groups]
    return [(sum(lengths), len(lengths) * max(lengths)) for lengths in fed]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 10, 40, 100, 10_000])
def test_groups_hold_every_rollout_once_within_the_budget(tokens: int, *, packed: bool) -> None:
    rollouts = make_rollouts(
        [(3, 5), (2, 40), (9, 9), (1, 1), (20, 2), (4, 4), *((i % 5 + 1, i % 7 + 1) for i in range(30))]
    )
    groups = group_by_tokens(rollouts, tokens, packed=packed)
    assert sorted(index for group in groups for index in group) == list(range(36))
    for group, (real, padded) in zip(groups, sizes_of(groups, rollouts), strict=True):
        assert len(group) == 1 or (real if packed else padded) <= tokens


def test_groups_are_of_nearly_equal_size() -> None:
    """Two full ones and a rest would do, and waste nothing; but the rest would be a few rows."""
    rollouts = make_rollouts([(10, 11 + i % 20) for i in range(60)])
    sizes = [real for real, _ in sizes_of(group_by_tokens(rollouts, 800, packed=True), rollouts)]
    assert len(sizes) == -(-sum(sizes) // 800)
    assert max(sizes) - min(sizes) <= 40


def test_padded_groups_have_little_padding() -> None:
    rollouts = make_rollouts([(30, 1 + 37 * i % 400) for i in range(300)])
    groups = group_by_tokens(rollouts, 16384, packed=False)
    real, padded = map(sum, zip(*sizes_of(groups, rollouts), strict=True))
    assert padded <= 1.05 * real
    assert len(groups) <= 40


def test_there_may_be_nothing_to_group() -> None:
    assert group_by_tokens([], 100, packed=True) == []
