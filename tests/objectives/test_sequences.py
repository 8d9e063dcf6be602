"""Whole sequences: every string up to three tokens is enumerated, so expected updates are exact.

Token 0 ends a string. Student, teacher and reference are tables of logits, one row a prefix; the gradient that an update
is held against is taken by autograd through the probability of every string.
"""

import itertools
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from poweropd.objectives import Objective, build
from poweropd.objectives.positions import Positions
from poweropd.objectives.shaping import StepTokens

VOCABULARY, LENGTH = 3, 3
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
STRINGS = [(*p, v) for p in PREFIXES for v in range(VOCABULARY) if v == 0 or len(p) == LENGTH - 1]
ROWS = torch.tensor([PREFIXES.index(s[:t]) for s in STRINGS for t in range(len(s))])
TOKENS = torch.tensor([v for s in STRINGS for v in s])
OWNERS = torch.tensor([i for i, s in enumerate(STRINGS) for _ in s])
COUNT = len(STRINGS)


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


STUDENT, TEACHER, REFERENCE = table(0), table(1), table(2)

RATIO_FORMS = {
    "reverse_kl": lambda u: -u.log(),
    "forward_kl": lambda u: u * u.log(),
    "jensen_shannon": lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2,
    "pearson_chi2": lambda u: (u - 1) ** 2,
}


def of_tokens(logits: Tensor) -> Tensor:
    """The log-probability of every token of every string, [T]."""
    return logits.log_softmax(-1)[ROWS, TOKENS]


def of_strings(per_token: Tensor) -> Tensor:
    """Sums over each string, [S]."""
    return per_token.new_zeros(COUNT).index_add(0, OWNERS, per_token)


def gradient(value) -> Tensor:
    """Of a function of the student's logits."""
    logits = STUDENT.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(logits), logits)
    return found


def of_whole_sequences(f) -> Tensor:
    """The gradient of E_y sum_t f(u_t), through both the strings' probabilities and u."""

    def value(logits: Tensor) -> Tensor:
        logq = of_tokens(logits)
        return of_strings(logq).exp() @ of_strings(f((of_tokens(TEACHER) - logq).exp()))

    return gradient(value)


def of_single_states(f) -> Tensor:
    """The same with the probability of reaching each prefix held fixed: sum over prefixes of Q(prefix) D_f there."""

    def value(logits: Tensor) -> Tensor:
        fixed = STUDENT.log_softmax(-1)
        reached = [sum(fixed[PREFIXES.index(p[:t]), p[t]] for t in range(len(p))) for p in PREFIXES]
        q, p = logits.softmax(-1), TEACHER.softmax(-1)
        return torch.tensor(reached, dtype=torch.float64).exp() @ (q * f(p / q)).sum(-1)

    return gradient(value)


def expected_length() -> Tensor:
    lengths = torch.tensor([len(s) for s in STRINGS], dtype=torch.float64)
    return gradient(lambda logits: of_strings(of_tokens(logits)).exp() @ lengths)


def to_reference(logits: Tensor) -> Tensor:
    """KL of the student's strings to those of the reference."""
    logq = of_strings(of_tokens(logits))
    return logq.exp() @ (logq - of_strings(of_tokens(REFERENCE)))


def step(objective: Objective) -> StepTokens:
    """Every string as one rollout, its rewards as the objective gives them."""
    logq, logp, log_reference = map(of_tokens, (STUDENT, TEACHER, REFERENCE))
    at = Positions(TOKENS, logprobs=logq, teacher_logprobs=logp, reference_logprobs=log_reference)
    nothing = torch.zeros_like(logq)
    return StepTokens(
        logprobs=logq,
        entropies=nothing,
        teacher_logprobs=logp,
        rewards=objective.score(at),
        divergences=nothing,
        reference_kl=logq - log_reference,
        rollouts=OWNERS,
        prompts=OWNERS,
    )


def ascent(advantages: Tensor) -> Tensor:
    """E_y sum_t A_t grad log q_t(y_t), with A_t [T] given for the tokens of every string."""
    weights = of_strings(of_tokens(STUDENT)).exp()[OWNERS]
    return gradient(lambda logits: (weights * advantages) @ of_tokens(logits))


def expected_update(name: str, **settings) -> Tensor:
    objective = build(name, estimator="sampled", **settings)
    return ascent(objective.shape(step(objective)).advantages)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_the_strings_are_all_there_are():
    assert COUNT == 15
    assert of_strings(of_tokens(STUDENT)).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("gauge", ["zero", "opd_plus"])
@pytest.mark.parametrize("name", RATIO_FORMS)
def test_discount_1_descends_the_divergence_of_whole_sequences(name, gauge):
    close(expected_update(name, discount=1, gauge=gauge), -of_whole_sequences(RATIO_FORMS[name]))


@pytest.mark.parametrize("gauge", ["zero", "opd_plus"])
@pytest.mark.parametrize("name", RATIO_FORMS)
def test_discount_0_descends_each_state_with_the_states_held_fixed(name, gauge):
    close(expected_update(name, gauge=gauge), -of_single_states(RATIO_FORMS[name]))


def test_discount_1_descends_the_sequence_kl():
    """E_y sum_t log q/p is the KL of the strings."""

    def value(logits: Tensor) -> Tensor:
        logq = of_strings(of_tokens(logits))
        return logq.exp() @ (logq - of_strings(of_tokens(TEACHER)))

    close(expected_update("log_ratio", discount=1), -gradient(value))


@pytest.mark.parametrize("name", RATIO_FORMS)
def test_discount_0_is_biased_for_whole_sequences(name):
    exact = -of_whole_sequences(RATIO_FORMS[name])
    assert cosine(expected_update(name), exact) < 0.99
    assert cosine(expected_update(name, discount=0.5), exact) > cosine(expected_update(name), exact)


def test_stop_gradient_with_discount_1_is_exact_for_the_reverse_kl_alone():
    for name, f in RATIO_FORMS.items():
        stopped, exact = expected_update(name, gauge="stop_gradient", discount=1), -of_whole_sequences(f)
        assert (cosine(stopped, exact) > 1 - 1e-9) == (name == "reverse_kl")
    close(
        expected_update("reverse_kl", gauge="stop_gradient", discount=1), -of_whole_sequences(RATIO_FORMS["reverse_kl"])
    )


def test_the_advantage_in_the_future_terms_adds_a_penalty_on_length():
    """log u - 1 in place of -f(u) = log u: one less for each token to come."""
    w = of_tokens(TEACHER) - of_tokens(STUDENT) - 1
    to_come = torch.stack([w[t:][OWNERS[t:] == OWNERS[t]].sum() for t in range(len(w))])
    wrong, exact = ascent(to_come), -of_whole_sequences(RATIO_FORMS["reverse_kl"])
    close(wrong - exact, -expected_length())
    assert expected_length().abs().max() > 0.01


@pytest.mark.parametrize("name", ["log_ratio", "power"])
def test_the_state_frozen_update_is_the_gradient_of_no_function(name):
    """A gradient has a symmetric Jacobian. The update at a prefix moves with the way there, not the other way round."""

    def field(logits: Tensor) -> Tensor:
        logq = of_tokens(logits)
        r = build(name).sampled(logq, of_tokens(TEACHER))
        score = torch.eye(VOCABULARY, dtype=torch.float64)[TOKENS] - logits.softmax(-1)[ROWS]
        weighted = (of_strings(logq).exp()[OWNERS] * r)[:, None] * score
        return torch.zeros_like(logits).index_add(0, ROWS, weighted).flatten()

    close(field(STUDENT).reshape(STUDENT.shape), expected_update(name))
    shifts = 1e-6 * torch.eye(STUDENT.numel(), dtype=torch.float64).reshape(-1, *STUDENT.shape)
    jacobian = torch.stack([(field(STUDENT + s) - field(STUDENT - s)) / 2e-6 for s in shifts])
    first, later = slice(0, VOCABULARY), slice(VOCABULARY, None)  # logits of the empty prefix, and of the others
    assert jacobian[first, later].abs().max() > 1e-3
    assert jacobian[later, first].abs().max() < 1e-8


@pytest.mark.parametrize(("name", "settings"), [("reverse_kl", {}), ("forward_kl", {}), ("jensen_shannon", {})])
def test_k1_in_the_reward_with_discount_1_descends_the_sequence_kl_to_the_reference(name, settings):
    weight = 0.3
    plain = expected_update(name, discount=1, **settings)
    held = expected_update(name, discount=1, reference_kl=weight, reference_kl_form="k1_reward", **settings)
    close(held - plain, -weight * gradient(to_reference))


def test_k1_in_the_reward_without_discount_holds_each_state_alone():
    plain = expected_update("log_ratio")
    held = expected_update("log_ratio", reference_kl=0.3, reference_kl_form="k1_reward")
    assert cosine(held - plain, -gradient(to_reference)) < 0.99


@pytest.mark.parametrize(
    ("name", "settings"),
    [("log_ratio", {}), ("log_ratio", {"discount": 1}), ("power", {"alpha": 1}), ("forward_kl", {"discount": 1})],
)
def test_leave_one_out_keeps_the_expected_update(name, settings):
    """Every pair of strings drawn for one prompt."""
    plain = build(name, estimator="sampled", **settings)
    objective = build(name, estimator="sampled", baseline="leave_one_out", **settings)
    pairs = torch.cartesian_prod(torch.arange(COUNT), torch.arange(COUNT))
    spans = [torch.nonzero(s == OWNERS)[:, 0] for s in range(COUNT)]
    drawn = [spans[s] for s in pairs.flatten().tolist()]
    where, rollouts = torch.cat(drawn), torch.repeat_interleave(torch.tensor([len(span) for span in drawn]))
    one = step(plain)
    picked = {f.name: getattr(one, f.name)[where] for f in fields(one)}
    tokens = StepTokens(**picked | {"rollouts": rollouts, "prompts": rollouts // 2})
    weights = of_strings(of_tokens(STUDENT)).exp()[pairs].prod(1)[rollouts // 2] / 2
    advantages, without = (kind.shape(tokens).advantages for kind in (objective, plain))
    got = gradient(lambda logits: (weights * advantages) @ of_tokens(logits)[where])
    close(got, expected_update(name, **settings))
    assert (advantages - without).abs().max() > 0.1
