"""Every row of the objective table passes every generic property, and each property can fail."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poweropd.objectives import (
    OBJECTIVES,
    Divergence,
    Number,
    Row,
    build,
    divergence_of,
    from_derivative,
    from_generator,
    row_of,
    settings_of,
)
from poweropd.objectives.conformance import PROPERTIES, check, inputs_of, of_logits
from poweropd.objectives.fused import token_scores
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.objectives.loss import loss_of, unshaped_terms
from poweropd.objectives.shaping import StepTokens, zscore

RATIO = [name for name, row in OBJECTIVES.items() if "gauge" in settings_of(row)]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OBJECTIVES),
    *((name, {"alpha": a}) for name in ("power", "box_cox", "exact_power") for a in (0.1, 0.5, 1, 10)),
    *(("cressie_read", {"alpha": a}) for a in (-1, -0.5, 0.3, 2)),
    *(("generalized_jsd", {"weight": w}) for w in (0.1, 0.9)),
    *((name, {"estimator": "sampled"}) for name in RATIO if OBJECTIVES[name].estimators[0] == "full"),
    *(("forward_kl", {"estimator": "sampled", "gauge": gauge}) for gauge in ("opd_plus", "stop_gradient")),
    ("forward_kl", {"estimator": "sampled", "ratio_limit": 2}),
    ("jeffreys", {"estimator": "sampled", "ratio_limit": 0.5}),
    ("clip", {"low": -0.2, "high": 3}),
    ("power", {"baseline": "exact"}),
    ("power", {"baseline": "exact", "normalize": "zscore"}),
    ("power", {"baseline": "leave_one_out"}),
    ("log_ratio", {"discount": 0.9}),
    ("log_ratio", {"discount": 1, "baseline": "exact", "normalize": "sign_max_abs"}),
    ("reverse_kl", {"estimator": "top_k", "k": 3}),
    ("reverse_kl", {"estimator": "top_k", "k": 2, "tail": "sample"}),
    ("power", {"estimator": "top_k", "k": 2, "tail": "renormalize"}),
    ("eopd", {"tail": "bucket", "estimator": "full", "k": 3, "threshold": 0.2}),
    ("aopd", {"threshold": -1}),
    ("veto", {"beta": 0}),
    ("reopold", {"switch": 0}),
    ("tip", {"share": 0.2}),
    ("power", {"reference_kl": 0.1}),
    ("reverse_kl", {"reference_kl": 0.1, "reference_kl_form": "k2_loss"}),
    ("log_ratio", {"reference_kl": 0.1, "reference_kl_form": "k1_reward"}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda value: str(value))
def test_every_property_holds(name: str, settings: dict[str, Any]) -> None:
    assert not [f"{finding.title}: {finding.problem}" for finding in check(name, **settings) if not finding.holds]


# Objectives of this file, as a user would write them: `tests.objectives...:name` is not importable, so `plugged` does it.

GOOD = OBJECTIVES["squared_hellinger"]
OWN: dict[str, Row | Divergence] = {
    "own_root": from_derivative(lambda x: x.sqrt()),
    "own_hellinger": from_generator(lambda u: (u.sqrt() - 1).square()),
    "own_clip": divergence_of(lambda r: r.clamp(-1, 1)),
    "own_log": from_derivative(torch.log),
    "own_reciprocal": from_derivative(lambda x: -1 / x),
    "own_softsign": divergence_of(lambda r: r / (1 + r.abs())),
    "own_row": Row(
        "a third root", "r = p^(1/3) - q^(1/3)", "-B_phi(q || p)", "nowhere",
        lambda beta: from_derivative(lambda x: x**beta), ("sampled", "top_k", "full"),
        {"beta": Number(1 / 3, "exponent", low=0.0)},
    ),
}  # fmt: skip


def wrong(**changes: Any) -> Divergence:
    assert GOOD.divergence is not None
    return replace(GOOD.divergence(), **changes)


def advantage(logq: Tensor, logp: Tensor) -> Tensor:
    return torch.expm1((logp - logq) / 2)


BROKEN: dict[str, tuple[Row | Divergence, str]] = {
    "silent": (replace(GOOD, gradient_of=""), "says what it is"),
    "attached": (wrong(advantage=lambda q, p: advantage(q, p) + 1), "nothing moves where student and teacher agree"),
    "infinite": (wrong(advantage=lambda q, p: torch.expm1(4 * (p - q))), "rewards are detached and finite"),
    "shifted": (
        wrong(term=lambda q, p: ((p / 2).exp() - (q / 2).exp()).square() + 0.1),
        "value is zero at the teacher, positive elsewhere",
    ),
    "cut_graph": (
        wrong(term=lambda q, p: ((p / 2).exp() - (q / 2).exp().detach()).square() + 0 * q),
        "gradient is that of its value",
    ),
    "wrong_sign": (wrong(advantage=lambda q, p: -advantage(q, p)), "estimators agree in expectation"),
    "stop_gradient": (wrong(advantage=lambda q, p: -advantage(q, p).square()), "estimators agree in expectation"),
    "falling": (wrong(advantage=lambda q, p: torch.sin(3 * (p - q))), "advantage grows with p and falls with q"),
    "turning": (from_derivative(lambda x: torch.sin(3 * x)), "advantage grows with p and falls with q"),
    "raising": (wrong(advantage=lambda q, p: q.nonsense), "rewards are detached and finite"),
}


@pytest.fixture
def plugged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], str]:
    """Makes an objective importable from the folder that the user is in."""

    def plug(name: str, value: Any) -> str:
        import sys
        from types import ModuleType

        module = ModuleType("own_objectives")
        setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "own_objectives", module)
        return f"own_objectives:{name}"

    monkeypatch.chdir(tmp_path)
    return plug


@pytest.mark.parametrize("name", OWN)
def test_an_objective_of_the_users_own_is_built_and_checked(name: str, plugged: Callable[[str, Any], str]) -> None:
    full_name = plugged(name, OWN[name])
    assert not [f"{f.title}: {f.problem}" for f in check(full_name) if not f.holds]
    assert build(full_name, estimator="full").needs == "full"
    assert full_name in str(build(full_name))


@pytest.mark.parametrize("name", [name for name, (_, caught) in BROKEN.items() if caught])
def test_each_fault_is_caught_by_its_property(name: str, plugged: Callable[[str, Any], str]) -> None:
    broken, caught_by = BROKEN[name]
    failed = [finding.title for finding in check(plugged(name, broken)) if not finding.holds]
    assert caught_by in failed


def test_a_file_of_the_users_own_is_imported_from_where_they_are(own_folder: Path) -> None:
    (own_folder / "mine.py").write_text(
        "from poweropd.objectives import from_derivative\nroot = from_derivative(lambda x: x.sqrt())\nnumber = 3\n"
    )
    (own_folder / "broken.py").write_text("raise RuntimeError('boom')")
    (own_folder / "typo.py").write_text("root = (")
    (own_folder / "late.py").write_text("import torch\nfrom mine import root\ntorch.nosuchfunction")
    q, p = torch.tensor([0.2, 0.8]).log(), torch.tensor([0.5, 0.5]).log()
    torch.testing.assert_close(build("mine:root").sampled(q, p), build("power", alpha=0.5).sampled(q, p))
    for name, message in {
        "mine:absent": "module 'mine' has no 'absent'",
        "absent:root": "cannot import 'absent'",
        "mine:roott": "did you mean 'root'",
        "broken:root": "cannot import 'broken'",
        "typo:root": "SyntaxError: ",
        "late:root": "AttributeError: module 'torch' has no attribute 'nosuchfunction'",
        "mine:number": "mine:number is a int; give a poweropd.objectives.Row or a Divergence",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            build(name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str) -> None:
    """Loss and gradient of the whole equal the sums over parts, with the whole's denominator and shaping."""
    objective = build(name)
    hidden, weight = torch.randn(11, 8), torch.randn(16, 8)
    teacher = Distribution((torch.randn(11, 12),), (LMHead(torch.randn(17, 12), vocab_size=15),))
    student = Distribution((hidden,), (LMHead(weight, vocab_size=15),))
    inputs = inputs_of(objective, torch.randint(0, 15, (11,)), teacher, student)
    found = unshaped_terms(objective, hidden, student.heads[0], inputs)
    numbers = torch.arange(11) // 4
    tokens = StepTokens(*found[1:7], rollouts=numbers, prompts=numbers)
    shaped = objective.shape(tokens) if objective.needs_whole_step else None

    def part_of(value: Any, part: slice) -> Any:
        if isinstance(value, Distribution):
            return replace(value, hidden=tuple(rows[part] for rows in value.hidden))
        return value[part] if isinstance(value, Tensor) else value

    def run(splits: list[int]) -> tuple[float, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, start = 0.0, 0
        for size in splits:
            part = slice(start, start + size)
            start += size
            cut = replace(inputs, **{key: part_of(value, part) for key, value in vars(inputs).items()})
            of_part = None if shaped is None else replace(shaped, **{k: v[part] for k, v in vars(shaped).items()})
            head = LMHead(w, vocab_size=15)
            terms = loss_of(objective, h[part], head, cut, denominator=11, shaped=of_part)
            terms.loss.backward()
            total += terms.loss.item()
        assert h.grad is not None
        assert w.grad is not None
        return total, h.grad, w.grad

    loss, dh, dw = run([11])
    for splits in ([1] * 11, [4, 7], [10, 1]):
        other_loss, other_dh, other_dw = run(splits)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert (other_dh - dh).norm() <= 1e-5 * dh.norm()
        assert (other_dw - dw).norm() <= 1e-5 * dw.norm()


def test_bounded_rewards_stay_in_their_bounds() -> None:
    student, teacher = -torch.rand(2, 10_000).mul(60)
    assert build("clip").sampled(student, teacher).abs().max() == 1
    assert build("tanh").sampled(student, teacher).abs().max() <= 1
    for alpha in (0.1, 1, 500):
        assert build("power", alpha=alpha).sampled(student, teacher).abs().max() <= 1
    shaped = build("sign_max_abs").sampled(student, teacher)
    assert shaped.max() == 1
    assert shaped.min() == -1


def test_tanh_by_value() -> None:
    got = build("tanh", tau=2.0).sampled(torch.tensor([-3.0]), torch.tensor([-1.0]))
    assert got.item() == pytest.approx(0.76159416)  # tanh(1)


def test_sign_max_abs_by_value() -> None:
    got = build("sign_max_abs").sampled(torch.zeros(4), torch.tensor([2.0, 1.0, -5.0, -10.0]))
    assert got.tolist() == [1.0, 0.5, -0.5, -1.0]


def test_box_cox_tends_to_the_log_ratio_in_fp32() -> None:
    student, teacher = torch.tensor([-3.0, -0.01]), torch.tensor([-1.0, -20.0])
    got = build("box_cox", alpha=1e-6).sampled(student, teacher)
    torch.testing.assert_close(got, teacher - student, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if "full" in row.estimators])
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = torch.randn(2, 4, 6).log_softmax(-1)
    student.requires_grad_()
    teacher.requires_grad_()
    build(name).full(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if "full" in row.estimators])
def test_tokens_that_neither_model_can_emit_change_nothing(name: str) -> None:
    """Merged end tokens carry a logit of -1e9 under both models."""
    objective = build(name, k=3) if "k" in settings_of(row_of(name)) and name == "eopd" else build(name)
    student, teacher = torch.randn(2, 4, 6).log_softmax(-1)
    never = torch.full((4, 2), -1e9)
    with_never = torch.cat([student, never + 64], -1).requires_grad_(), torch.cat([teacher, never], -1)
    bare = student.clone().requires_grad_()
    torch.testing.assert_close(objective.full(*with_never), objective.full(bare, teacher))
    objective.full(*with_never).sum().backward()
    objective.full(bare, teacher).sum().backward()
    torch.testing.assert_close(with_never[0].grad[:, :6], bare.grad)
    assert not with_never[0].grad[:, 6:].any()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("powr", {}, "did you mean 'power'"),
        ("power", {"alpha": 0}, "objective.alpha: 0 is outside (0, inf)"),
        ("power", {"alpha": -1}, "outside"),
        ("power", {"alpha": "five"}, "outside"),
        ("power", {"alfa": 5}, "did you mean 'alpha'"),
        ("log_ratio", {"alpha": 5}, "log_ratio has no such setting"),
        ("generalized_jsd", {"weight": 1.0}, "outside (0, 1)"),
        ("clip", {"low": 1.0}, "outside (-inf, 0)"),
        ("cressie_read", {"alpha": 1}, "alpha -> 1 is forward_kl"),
        ("reverse_kl", {"estimator": "topk"}, "did you mean 'top_k'"),
        ("reverse_kl", {"estimator": "top_k", "k": 2.5}, "a whole number in [1, inf)"),
        ("reverse_kl", {"k": 8}, "set objective.estimator=top_k"),
        ("reverse_kl", {"estimator": "top_k", "tail": "keep"}, "does not vanish where both models agree"),
        ("reverse_kl", {"discount": 0.5}, "says nothing of the positions after it; set objective.estimator=sampled"),
        ("forward_kl", {"normalize": "zscore"}, "set objective.estimator=sampled"),
        ("power", {"discount": 0.5}, "only f-divergences depend on; log_ratio, clip and forward_kl take it"),
        ("power", {"gauge": "opd_plus"}, "power does not take it: it speaks of the ratio p/q"),
        ("tip", {"normalize": "zscore"}, "tip does not take it: it shapes the reward of a sampled token"),
        ("zscore", {"estimator": "full"}, "zscore does not take it: it is always estimated one way, sampled"),
        ("sft", {"reference_kl": 0.1}, "sft does not take it: it has no teacher"),
        (
            "power",
            {"reference_kl": 0.1, "reference_kl_form": "k3_loss"},
            "follows the gradient of KL(reference || student)",
        ),
        ("power", {"reference_kl": 0.1, "reference_kl_form": "k1_loss"}, "expected gradient of zero"),
        ("reverse_kl", {"reference_kl": 0.1, "reference_kl_form": "k1_reward"}, "k2_loss work with every estimator"),
        ("power", {"reference_kl_form": "k2_loss"}, "does nothing while objective.reference_kl is 0"),
        ("power", {"reference_kl": 0.1, "reference_kl_schedule": "adaptive"}, "needs objective.reference_kl_target"),
        ("power", {"golden_schedule": "linear"}, "does nothing while objective.golden is 0"),
        ("zscore", {"normalize": "none"}, "normalize zscore is what makes it what it is; log_ratio"),
        ("vopd", {"baseline": "none"}, "baseline exact is what makes it what it is"),
        ("local_support", {"tail": "bucket"}, "tail renormalize is what makes it what it is"),
        ("local_support", {"k": 1}, "one token has probability 1 under both models; set it to 2 or more"),
        ("vanilla", {}, "it is log_ratio here"),
        ("OPD+", {}, "it is any f-divergence with estimator sampled"),
        (None, {}, "None is a NoneType; give the name of a row, or module:attribute"),
        (":x", {}, "':x' names no attribute of a module; give module:attribute"),
        ("./mine.py:x", {}, "names no attribute of a module"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, **settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"objective\.alpha.*\n.*objective\.k"):
        build("power", alpha=-1, k=0)


def test_a_missing_form_is_refused_with_alternatives() -> None:
    two = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"no sampled form.*power"):
        build("tip").sampled(two, two)
    with pytest.raises(ValueError, match=r"no full-vocabulary form.*reverse_kl"):
        build("zscore").full(two, two)
    with pytest.raises(ValueError, match=r"no top-k form"):
        build("tip").top_k(two, two)
    with pytest.raises(ValueError, match=r"leave_one_out compares the rollouts of one prompt"):
        build("power", baseline="leave_one_out").sampled(two, two)
    with pytest.raises(ValueError, match=r"along the vocabulary, and the rest along tokens"):
        build("vopd", discount=1).sampled(two, two)
    with pytest.raises(ValueError, match=r"shape \[2, 2\], the teacher's \[2\]; give both one shape"):
        build("power").sampled(two, two[0])


def test_whole_step_shaping_of_one_rollout_is_part_of_the_advantage() -> None:
    student, teacher = torch.randn(2, 4).log_softmax(-1)
    rewards = build("reopold").sampled(student, teacher)
    torch.testing.assert_close(build("reopold", normalize="zscore").sampled(student, teacher), zscore(rewards))
    assert build("zscore").sampled(student[0], teacher[0]).item() == 0  # a token alone
    assert not len(build("zscore").sampled(student[:0], teacher[:0]))


def test_a_limit_changes_nothing_within_it() -> None:
    q, p = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.6, 0.3, 0.1]).log()
    for name in ("reverse_kl", "forward_kl", "jeffreys"):
        for gauge in ("zero", "opd_plus", "stop_gradient"):
            wide, free = (build(name, estimator="sampled", gauge=gauge, **s) for s in ({"ratio_limit": 20}, {}))
            torch.testing.assert_close(wide.sampled(q, p), free.sampled(q, p))
            torch.testing.assert_close(wide.full(q, p), free.full(q, p))


def test_aopd_gives_the_gated_reward() -> None:
    got = build("aopd").sampled(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.25, 0.75]).log())
    torch.testing.assert_close(got, torch.tensor([0.0, 7.5]).clamp(min=1).log())


def test_what_the_stop_gradient_form_follows() -> None:
    stopped = {"estimator": "sampled", "gauge": "stop_gradient"}
    assert build("forward_kl", **stopped).gradient_of.startswith("nothing")
    assert build("reverse_kl", **stopped).gradient_of.startswith("-KL(q || p)")


def test_what_each_needs_of_the_teacher() -> None:
    assert {name: row.needs for name, row in OBJECTIVES.items()} == {name: build(name).needs for name in OBJECTIVES}
    assert build("power").needs == "sampled"
    assert build("power", estimator="full").needs == build("power", baseline="exact").needs == "full"
    assert build("power", estimator="top_k").needs == build("eopd").needs == build("aopd").needs == "top_k"
    assert build("sft").needs == "nothing"
    assert build("stable_opd").needs_of_reference == "full"
    assert build("stable_opd", reference_kl_form="k2_loss").needs_of_reference == "sampled"
    assert build("power").needs_of_reference == "nothing"


def test_teacher_without_what_is_needed_is_refused() -> None:
    hidden, head = torch.randn(2, 3), LMHead(torch.randn(4, 3), vocab_size=4)
    targets = torch.tensor([1, 2])
    bare = inputs_of(build("sft"), targets, of_logits(torch.randn(2, 4)), of_logits(torch.randn(2, 4)))
    for name, settings, missing in (
        ("power", {}, "the teacher's log-probabilities"),
        ("reverse_kl", {}, "the teacher's whole distribution"),
        ("reverse_kl", {"estimator": "top_k"}, "the teacher's likeliest tokens"),
        ("zscore", {}, "the rewards of the whole step"),
    ):
        with pytest.raises(ValueError, match=missing):
            loss_of(build(name, **settings), hidden, head, bare, denominator=1)


def test_every_property_has_a_fault_that_it_catches() -> None:
    """Settings ranges and the fused sweep are the package's own; no objective can break them from outside."""
    not_from_outside = {"refuses what is out of range", "fused gradient is that of the written-out loss"}
    assert {caught for _, caught in BROKEN.values() if caught} == set(PROPERTIES) - not_from_outside


def test_token_scores_give_the_likeliest_tokens() -> None:
    hidden, head = torch.randn(5, 3), LMHead(torch.randn(9, 3), vocab_size=8)
    scores = token_scores(hidden, head, torch.zeros(5, dtype=torch.long), k=3)
    expected = (hidden @ head.weight[:8].T).log_softmax(-1).topk(3)
    assert scores.top_ids.equal(expected.indices)
    torch.testing.assert_close(scores.top_logprobs, expected.values)
