"""The contract of teachers, which every implementation runs; then what only the HF teacher promises."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from conftest import CHAT_END, END, make_model, make_rollouts
from fakes import FakeTeacher
from poweropd.errors import ConfigError
from poweropd.objectives import Objective, build
from poweropd.objectives.lm_head import LogProbs, head_logits
from poweropd.teacher.cache import CachedTeacher
from poweropd.teacher.client import ServedTeacher
from poweropd.teacher.ensemble import MixtureTeacher, RoutedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, check_serves
from poweropd.types import Rollout, TeacherScores
from serving import served, serving

LENGTHS = [(3, 5), (9, 2), (1, 20), (6, 12), (2, 1)]
WEIGHTS = [0.7, 0.3]


def make_two(**settings: object) -> list[HFTeacher]:
    """Of different width, their heads padded differently."""
    models = make_model(), make_model(hidden_size=24, rows=528, seed=1)
    return [HFTeacher(model, vocab_size=512, **settings) for model in models]


def behind_a_server(stack: ExitStack, **settings: object) -> ServedTeacher:
    return served(stack.enter_context(serving(make_model(rows=528))), **settings)


def with_cache(stack: ExitStack) -> CachedTeacher:
    folder = stack.enter_context(TemporaryDirectory())
    teacher = HFTeacher(make_model(), vocab_size=512)
    return CachedTeacher(teacher, Path(folder), fingerprint="a", vocab_size=512, end_ids=())


TEACHERS: dict[str, Callable[[ExitStack], TeacherScorer]] = {
    "hf": lambda _: HFTeacher(make_model(), vocab_size=512),
    "served": behind_a_server,
    "served in small requests": lambda stack: behind_a_server(stack, tokens_per_batch=20),
    "cached": with_cache,
    "mixture": lambda _: MixtureTeacher(make_two(), WEIGHTS),
    "mixture in small batches": lambda _: MixtureTeacher(make_two(), WEIGHTS, tokens_per_batch=20),
    "mixture with a served one": lambda stack: MixtureTeacher([make_two()[0], behind_a_server(stack)], WEIGHTS),
    "routed": lambda _: RoutedTeacher(dict(zip("ab", make_two(), strict=True))),
    "routed to a mixture": lambda _: RoutedTeacher({"a": MixtureTeacher(make_two(), WEIGHTS), "b": make_two()[1]}),
    "fake": lambda _: FakeTeacher(),
}


def routed(rollouts: list[Rollout]) -> list[Rollout]:
    """Every other prompt names the other teacher."""
    names = ["ab"[index % 2] for index in range(len(rollouts))]
    return [replace(r, prompt=replace(r.prompt, teacher=name)) for r, name in zip(rollouts, names, strict=True)]


@pytest.mark.parametrize("name", TEACHERS)
def test_contract(name: str) -> None:
    with ExitStack() as stack:
        keeps_its_promises(TEACHERS[name](stack), routed(make_rollouts(LENGTHS)))


def keeps_its_promises(teacher: TeacherScorer, rollouts: list[Rollout]) -> None:
    sampled = teacher.score(rollouts, needs="sampled")
    for rollout, scores in zip(rollouts, sampled, strict=True):
        assert scores.logprobs is not None
        assert scores.logprobs.shape == (len(rollout),)
        assert scores.logprobs.dtype == torch.float32
        assert (scores.logprobs <= 0).all()
        if scores.entropies is not None:
            assert scores.entropies.shape == (len(rollout),)
            assert (scores.entropies >= 0).all()
        if scores.top1_ids is not None:
            assert scores.top1_ids.shape == (len(rollout),)
    again = teacher.score(rollouts[::-1], needs="sampled")[::-1]
    for one, other in zip(sampled, again, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs)
    assert teacher.score(rollouts, needs="nothing") == [TeacherScores()] * len(rollouts)
    assert teacher.score([], needs="sampled") == []
    if "top_k" in teacher.provides:
        for rollout, scores in zip(rollouts, teacher.score(rollouts, needs="top_k", k=4), strict=True):
            assert scores.top_ids is not None
            assert scores.top_logprobs is not None
            assert scores.top_ids.shape == scores.top_logprobs.shape == (len(rollout), 4)
            assert (scores.top_logprobs.diff(dim=1) <= 0).all()
            assert scores.top1_ids is None or torch.equal(scores.top1_ids, scores.top_ids[:, 0])
    if "full" in teacher.provides:
        for rollout, scores in zip(rollouts, teacher.score(rollouts, needs="full"), strict=True):
            assert scores.distribution is not None
            for hidden, head in zip(scores.distribution.hidden, scores.distribution.heads, strict=True):
                assert hidden.shape == (len(rollout), head.weight.shape[1])


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
def test_logprobs_are_those_of_the_model_at_temperature_one(tokens_per_batch: int) -> None:
    model = make_model(rows=528)
    teacher = HFTeacher(model, vocab_size=512, tokens_per_batch=tokens_per_batch)
    rollouts = make_rollouts(LENGTHS)
    full = teacher.score(rollouts, needs="full")
    for rollout, scores, states in zip(rollouts, teacher.score(rollouts, needs="sampled"), full, strict=True):
        ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        start = len(rollout.prompt.prompt_ids) - 1
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, start:-1, :512].log_softmax(-1)
        expected = logprobs[range(len(rollout)), list(rollout.response_ids)]
        torch.testing.assert_close(scores.logprobs, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.entropies, -(logprobs.exp() * logprobs).sum(-1), rtol=1e-4, atol=1e-5)
        assert states.distribution is not None
        (hidden,), (head,) = states.distribution.hidden, states.distribution.heads
        torch.testing.assert_close(head_logits(hidden, head).log_softmax(-1), logprobs, rtol=1e-4, atol=1e-4)


def test_any_tokens_can_be_scored() -> None:
    """Merged end tokens too: each then has the log-probability of ending."""
    model, rollouts = make_model(rows=528), make_rollouts(LENGTHS)
    ids = [torch.randint(512, (len(rollout), 3)) for rollout in rollouts]
    for own in ids:
        own[:, 0] = CHAT_END
    teacher = HFTeacher(model, vocab_size=512, end_ids=(END, CHAT_END), tokens_per_batch=30)
    expected = [
        probabilities(teacher, rollout, (END, CHAT_END)).gather(1, torch.where(own == CHAT_END, END, own)).log()
        for rollout, own in zip(rollouts, ids, strict=True)
    ]
    with serving(model) as server:
        remote = served(server, end_ids=(END, CHAT_END), tokens_per_batch=30)
        for asked in (teacher, remote):
            torch.testing.assert_close(asked.logprobs_of(rollouts, ids), expected, rtol=1e-4, atol=1e-5)


def test_merged_end_tokens_raise_the_score_of_the_last_token_alone() -> None:
    model, rollouts = make_model(), make_rollouts(LENGTHS)
    plain, merged = (
        HFTeacher(model, vocab_size=512, end_ids=ends).score(rollouts, needs="sampled")
        for ends in ((), (END, CHAT_END))
    )
    for one, other in zip(plain, merged, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        torch.testing.assert_close(one.logprobs[:-1], other.logprobs[:-1])
        assert other.logprobs[-1] > one.logprobs[-1]


@torch.no_grad()
def probabilities(teacher: HFTeacher, rollout: Rollout, ends: tuple[int, ...]) -> Tensor:
    """[T, 512] of plain softmax, the end tokens as one outcome under the first of them."""
    ids = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
    start = len(rollout.prompt.prompt_ids) - 1
    every = teacher._model(input_ids=ids).logits[0, start:-1, :512].softmax(-1)
    if ends:
        every[:, ends[0]] = every[:, list(ends)].sum(1)
        every[:, list(ends[1:])] = 0
    return every


@pytest.mark.parametrize("ends", [(), (END, CHAT_END)])
def test_a_mixture_is_one_of_probabilities(ends: tuple[int, ...]) -> None:
    """Its scores, entropies and likeliest tokens are those of `sum_i w_i p_i`, and so is its distribution."""
    members, rollouts = make_two(end_ids=ends), make_rollouts(LENGTHS)
    mixture = MixtureTeacher(members, WEIGHTS, tokens_per_batch=30)
    sampled, top, full = (mixture.score(rollouts, needs=needs, k=4) for needs in ("sampled", "top_k", "full"))
    for place, rollout in enumerate(rollouts):
        mixed = sum(w * probabilities(m, rollout, ends) for w, m in zip(WEIGHTS, members, strict=True))
        close = {"rtol": 1e-4, "atol": 1e-5}
        expected = mixed[range(len(rollout)), list(rollout.response_ids)].log()
        for scores in (sampled[place], top[place]):
            torch.testing.assert_close(scores.logprobs, expected, **close)
            torch.testing.assert_close(scores.entropies, torch.special.entr(mixed).sum(1), **close)
        likeliest = mixed.topk(4, dim=1)
        assert torch.equal(top[place].top_ids, likeliest.indices)
        torch.testing.assert_close(top[place].top_logprobs, likeliest.values.log(), **close)
        assert full[place].distribution.weights == tuple(WEIGHTS)
        reader = LogProbs(full[place].distribution)
        reader.enter(slice(0, len(rollout)))
        torch.testing.assert_close(reader.of(slice(0, len(rollout))).exp(), mixed, **close)


def test_a_mixture_of_mixtures_multiplies_the_shares() -> None:
    inner = MixtureTeacher(make_two(), WEIGHTS)
    (scores,) = MixtureTeacher([inner, make_two()[0]], [0.5, 0.5]).score(make_rollouts([(2, 3)]), needs="full")
    assert scores.distribution.weights == pytest.approx((0.35, 0.15, 0.5))


def test_a_mixture_needs_whole_distributions() -> None:
    numbers_alone = FakeTeacher()
    numbers_alone.provides = frozenset({"nothing", "sampled"})
    with pytest.raises(ValueError, match="needs the whole distributions of its teachers"):
        MixtureTeacher([*make_two(), numbers_alone], [0.5, 0.3, 0.2])
    assert RoutedTeacher({"a": make_two()[0], "b": numbers_alone}).provides == {"nothing", "sampled"}


def test_each_rollout_is_judged_by_its_own_teacher() -> None:
    by_name = dict(zip("ab", make_two(), strict=True))
    rollouts = routed(make_rollouts(LENGTHS))
    for rollout, scores in zip(rollouts, RoutedTeacher(by_name).score(rollouts, needs="sampled"), strict=True):
        (own,) = by_name[rollout.prompt.teacher].score([rollout], needs="sampled")
        torch.testing.assert_close(scores.logprobs, own.logprobs)
    with pytest.raises(KeyError):
        RoutedTeacher(by_name).score(make_rollouts(LENGTHS), needs="sampled")


@pytest.mark.parametrize(
    ("objective", "advice"),
    [
        (build("reverse_kl"), "its whole distribution, and this teacher gives log-probabilities of sampled tokens only; "
         "set objective.estimator=sampled"),
        (build("forward_kl", estimator="top_k"), "its likeliest tokens, and"),
        (build("vopd"), "choose an objective such as power or log_ratio"),
    ],
)  # fmt: skip
def test_an_objective_that_the_teacher_cannot_serve_is_refused(objective: Objective, advice: str) -> None:
    teacher = FakeTeacher()
    check_serves(objective, teacher)
    teacher.provides = frozenset({"nothing", "sampled"})
    check_serves(build("power"), teacher)
    with pytest.raises(ConfigError, match=re.escape(advice)):
        check_serves(objective, teacher)
