"""The records of a step against plain numpy, and what they must not depend on."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from conftest import CHAT_END, END, RECIPE, ROOT, make_model, make_rollouts
from poweropd.config import load_recipe
from poweropd.diagnostics import Clock, GradNorms, rollout_metrics
from poweropd.objectives import Objective, build
from poweropd.objectives.fused import LossTerms
from poweropd.policy import Student
from poweropd.rollout.engine import Sampling
from poweropd.step_statistics import StepStatistics
from poweropd.streaming import RELATIVE_ERROR
from poweropd.teacher.ensemble import MixtureTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, judge
from poweropd.train import train
from poweropd.types import Rollout, ScoredRollout, TokenBatch
from poweropd.update import GradientResult, MicroBatches, accumulate_gradient
from test_guards import Listener
from test_update import logprobs_of

LENGTHS = [(3, 9), (7, 2), (1, 1), (5, 14), (2, 6)]
SAMPLING = Sampling(stop_ids=(END,), max_new_tokens=20)
QUANTILES = {"p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
OBJECTIVES = {
    "power": build("power", alpha=0.7),
    "zscore": build("zscore"),
    "top_k": build("forward_kl", estimator="top_k", k=5),
    "full": build("reverse_kl"),
    "exact baseline": build("log_ratio", baseline="exact"),
}


@pytest.fixture
def teacher() -> HFTeacher:
    return HFTeacher(make_model(hidden_size=24, rows=528, seed=1), vocab_size=512)


def some_rollouts() -> list[Rollout]:
    """Of which the fourth ran to the budget."""
    rollouts = make_rollouts(LENGTHS)
    return [replace(r, finish_reason="length") if i == 3 else r for i, r in enumerate(rollouts)]


def measured(
    student: Student,
    scored: list[ScoredRollout],
    objective: Objective,
    tokens: int = 10_000,
    sampling: Sampling = SAMPLING,
    **how: Any,
) -> tuple[StepStatistics, GradientResult]:
    seen = StepStatistics(objective, [item.rollout for item in scored], sampling)
    how = MicroBatches(tokens=tokens, **how)
    return seen, accumulate_gradient(student, scored, objective, how, watch=seen.add)


def described(values: np.ndarray) -> dict[str, float]:
    ordered = np.sort(values)
    quantiles = {key: ordered[int(share * (len(values) - 1))] for key, share in QUANTILES.items()}
    return {"mean": values.mean(), "min": values.min(), "max": values.max(), **quantiles}


class Expected:
    """Every number of a step, from whole distributions of both models in fp64."""

    def __init__(self, student: Student, teacher: HFTeacher, rollouts: list[Rollout], objective: Objective) -> None:
        with torch.no_grad():
            q, p = (logprobs_of(m, rollouts).double().numpy() for m in (student.model, teacher._model))
        tokens = np.concatenate([rollout.response_ids for rollout in rollouts])
        rows = np.arange(len(tokens))
        self.q, self.p = q[rows, tokens], p[rows, tokens]
        self.log_ratio = r = self.p - self.q
        self.places = np.concatenate([np.arange(len(rollout)) for rollout in rollouts])
        self.sampled = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
        self.ends = np.concatenate(
            [np.arange(len(r)) == (len(r) - 1 if r.finish_reason == "stop" else -1) for r in rollouts]
        )
        self.entropies = [-(np.exp(x) * x).sum(1) for x in (q, p)]
        self.agreement = q.argmax(1) == p.argmax(1)
        top = np.argsort(-p, 1)[:, :5]
        top_p, top_q = np.take_along_axis(p, top, 1), np.take_along_axis(q, top, 1)
        tail_p, tail_q = (1 - np.exp(x).sum(1) for x in (top_p, top_q))
        self.signal = {
            "power": lambda: np.exp(0.7 * self.p) - np.exp(0.7 * self.q),
            "zscore": lambda: (r - r.mean()) / r.std(),
            "top_k": lambda: (np.exp(top_p) * (top_p - top_q)).sum(1) + tail_p * np.log(tail_p / tail_q),
            "full": lambda: (np.exp(q) * (q - p)).sum(1),
            "exact baseline": lambda: r - (np.exp(q) * (p - q)).sum(1),
        }[next(name for name, other in OBJECTIVES.items() if other is objective)]()
        self.kind = "reward" if objective.estimator == "sampled" else "divergence"

    def metrics(self) -> dict[str, float]:
        r = self.log_ratio
        metrics = {
            **{f"{self.kind}/{key}": value for key, value in described(self.signal).items()},
            **{f"log_ratio/{key}": value for key, value in described(r).items()},
            "log_ratio/tail_share": np.mean(np.abs(r) > 5),
            "end_token/log_ratio": r[self.ends].mean(),
            "entropy/student": self.entropies[0].mean(),
            "entropy/teacher": self.entropies[1].mean(),
            "top1_agreement": self.agreement.mean(),
            "rollout/mismatch": np.abs(self.q - self.sampled).mean(),
            "kl/k1": -r.mean(),
            "kl/k2": (r**2).mean() / 2,
            "kl/k3": (np.exp(r) - 1 - r).mean(),
        }
        if self.kind == "reward":
            metrics["reward/sign_agreement"] = np.mean(np.sign(self.signal) == np.sign(r))
        return metrics


def close(got: dict[str, float], expected: dict[str, float]) -> None:
    """Equal up to the rounding of the models, and quantiles up to the sketch's error."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        is_quantile = key.rpartition("/")[2] in QUANTILES
        assert got[key] == pytest.approx(value, rel=RELATIVE_ERROR + 1e-3 if is_quantile else 1e-3, abs=2e-5), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_those_of_numpy(name: str, make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    student, objective, rollouts = make_student(), OBJECTIVES[name], some_rollouts()
    seen, _ = measured(student, judge(rollouts, objective, teacher), objective, tokens=40)
    expected = Expected(student, teacher, rollouts, objective)
    got = seen.metrics()
    if name == "exact baseline":  # both are of the log-ratio alone
        assert got.pop("divergence/estimate") == pytest.approx(got["kl/k1"])
    elif "divergence/estimate" in got:
        estimate = objective.divergence_estimate(torch.tensor(expected.q), torch.tensor(expected.p))
        assert got.pop("divergence/estimate") == pytest.approx(estimate.mean().item(), rel=1e-3)
    close(got, expected.metrics())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_positions_and_distributions_are_those_of_numpy(
    name: str, make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    student, objective, rollouts = make_student(), OBJECTIVES[name], some_rollouts()
    seen, _ = measured(student, judge(rollouts, objective, teacher), objective, tokens=40)
    expected = Expected(student, teacher, rollouts, objective)
    records = seen.position_records(3)
    assert [(record["first"], record["last"]) for record in records] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    for record in records:
        inside = (expected.places >= record["first"]) & (expected.places <= record["last"])
        own = expected.signal[inside]
        wanted = {f"{expected.kind}/{key}": value for key, value in described(own).items()}
        if expected.kind == "reward":
            wanted["gradient_share"] = (own**2).sum() / (expected.signal**2).sum()
        assert (record.pop("step"), record.pop("tokens")) == (3, inside.sum())
        close({key: value for key, value in record.items() if key not in ("first", "last")}, wanted)
    if expected.kind == "reward":
        assert sum(record["gradient_share"] for record in records) == pytest.approx(1)

    record = seen.distribution_record(3)
    assert record.keys() == {"step", "tokens", expected.kind, "log_ratio", "plane"}
    for key, values in ((expected.kind, expected.signal), ("log_ratio", expected.log_ratio)):
        counts, _ = np.histogram(values, record[key]["edges"])
        assert record[key]["counts"] == counts.tolist()
    count, total = np.zeros((20, 20)), np.zeros((20, 20))
    for q, p, value in zip(np.exp(expected.q), np.exp(expected.p), expected.signal, strict=True):
        count[int(q * 20), int(p * 20)] += 1
        total[int(q * 20), int(p * 20)] += value
    cells = record["plane"]["cells"]
    assert sum(cell[2] for cell in cells) == record["tokens"] == len(expected.q)
    assert {(a, b): n for a, b, n, _ in cells} == {(a, b): count[a, b] for a, b in np.argwhere(count).tolist()}
    for a, b, n, mean in cells:
        assert mean == pytest.approx(total[a, b] / n, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_depends_on_micro_batches(name: str, make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    objective, student = OBJECTIVES[name], make_student()
    scored = judge(some_rollouts(), objective, teacher)
    whole, _ = measured(student, scored, objective)
    for tokens in (1, 20, 40):
        parts, _ = measured(student, scored, objective, tokens)
        close(parts.metrics(), whole.metrics())
        for mine, theirs in zip(parts.position_records(0), whole.position_records(0), strict=True):
            close(mine, theirs)


def test_the_same_numbers_in_other_parts_give_the_same_counts(
    make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    """Every micro-batch by itself, merged last first: as ranks would."""
    objective, rollouts, pieces = OBJECTIVES["power"], some_rollouts(), []
    scored = judge(rollouts, objective, teacher)
    whole = StepStatistics(objective, rollouts, SAMPLING)

    def watch(batch: TokenBatch, terms: LossTerms) -> None:
        whole.add(batch, terms)
        pieces.append(StepStatistics(objective, rollouts, SAMPLING))
        pieces[-1].add(batch, terms)

    accumulate_gradient(make_student(), scored, objective, MicroBatches(tokens=20), watch=watch)
    assert len(pieces) > 2
    merged = pieces.pop()
    while pieces:
        for mine, theirs in zip(merged.parts, pieces.pop().parts, strict=True):
            mine.merge(theirs)
    assert merged.distribution_record(0)["log_ratio"] == whole.distribution_record(0)["log_ratio"]
    for mine, theirs in zip(merged.parts, whole.parts, strict=True):
        assert torch.equal(mine.lows, theirs.lows)
        torch.testing.assert_close(mine.sums, theirs.sums, rtol=1e-12, atol=1e-12)
    close(merged.metrics(), whole.metrics())


def test_one_rank_off_policy_leaves_out_what_needs_the_students_own_tokens(
    make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    objective, student = OBJECTIVES["power"], make_student()
    scored = judge(some_rollouts(), objective, teacher)
    others = [replace(item, rollout=replace(item.rollout, source="teacher")) for item in scored]
    mine, theirs = (measured(student, part, objective)[0] for part in (scored[:3], others[3:]))
    alone = mine.metrics()
    for part, other in zip(mine.parts, theirs.parts, strict=True):
        part.merge(other)
    assert set(alone) - set(mine.metrics()) == {"kl/k1", "kl/k2", "kl/k3"}


def test_memory_does_not_grow_with_tokens(make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    objective, student, sizes = OBJECTIVES["power"], make_student(), []
    for rollouts in (make_rollouts([(2, 3)]), make_rollouts([(2, 60)] * 8)):
        seen = StepStatistics(objective, rollouts, SAMPLING)
        how = MicroBatches(tokens=100)
        scored = judge(rollouts, objective, teacher)
        result = accumulate_gradient(student, scored, objective, how, watch=seen.add, keep=1)
        assert [len(terms.places) for terms in result.terms] == [len(rollouts[0])]
        sizes.append([part.sums.numel() for part in seen.parts])
    assert sizes[0] == sizes[1]


def test_the_terms_that_are_kept_are_those_of_the_first_rollouts(
    make_student: Callable[..., Student], teacher: HFTeacher
) -> None:
    objective, student = OBJECTIVES["power"], make_student()
    scored, how = judge(some_rollouts(), objective, teacher), MicroBatches(tokens=20)
    every = accumulate_gradient(student, scored, objective, how).terms
    kept = accumulate_gradient(student, scored, objective, how, keep=2).terms
    assert [len(terms.places) for terms in every] == [length for _, length in LENGTHS]
    assert len(kept) == 2
    for mine, theirs in zip(kept, every, strict=False):
        assert torch.equal(mine.logprobs, theirs.logprobs)


@pytest.mark.parametrize("needs", ["sampled", "top_k", "full"])
def test_the_likeliest_tokens_of_a_mixture_are_its_own(needs: str, make_student: Callable[..., Student]) -> None:
    """Neither those of its members nor another pass."""
    members = [HFTeacher(make_model(hidden_size=size, seed=size), vocab_size=512) for size in (20, 24)]
    student, rollouts = make_student(), some_rollouts()
    objective = OBJECTIVES[{"sampled": "power"}.get(needs, needs)]
    seen, _ = measured(student, judge(rollouts, objective, MixtureTeacher(members, [0.6, 0.4])), objective)
    with torch.no_grad():
        mixed = sum(w * logprobs_of(m._model, rollouts).exp() for w, m in zip([0.6, 0.4], members, strict=True))
        agreement = logprobs_of(student.model, rollouts).argmax(1) == mixed.argmax(1)
    assert seen.metrics()["top1_agreement"] == pytest.approx(agreement.float().mean().item())
    assert seen.metrics()["entropy/teacher"] == pytest.approx(torch.special.entr(mixed).sum(1).mean().item(), rel=1e-4)


def test_end_tokens_are_judged_as_they_are_trained(make_student: Callable[..., Student]) -> None:
    rollouts, ends, objective = some_rollouts(), (END, CHAT_END), build("log_ratio")
    model = make_model(hidden_size=24, seed=1)
    final = np.cumsum([length for _, length in LENGTHS])[[0, 1, 2, 4]] - 1

    def log_ratio(**how: Any) -> float | None:
        merged = how.pop("merged", ())
        teacher: TeacherScorer = HFTeacher(model, vocab_size=512, end_ids=merged)
        seen, _ = measured(make_student(end_ids=merged), judge(rollouts, objective, teacher), objective, **how)
        return seen.metrics().get("end_token/log_ratio")

    with torch.no_grad():
        q, p = (logprobs_of(m, rollouts)[torch.tensor(final)] for m in (make_student().model, model))
    kept, mapped = ((p[:, ids].logsumexp(1) - q[:, ids].logsumexp(1)).mean().item() for ids in ([END], [END, CHAT_END]))
    assert abs(kept - mapped) > 0.1
    assert log_ratio() == pytest.approx(kept, abs=1e-4)
    assert log_ratio(merged=ends) == pytest.approx(mapped, abs=1e-4)
    assert log_ratio(masked_end_ids=ends) is None


def test_what_is_not_known_is_left_out(make_student: Callable[..., Student], teacher: HFTeacher) -> None:
    student, objective, rollouts = make_student(), build("power"), some_rollouts()
    scored = judge(rollouts, objective, teacher)
    every = set(measured(student, scored, objective)[0].metrics())
    of_the_student = {"kl/k1", "kl/k2", "kl/k3"}
    of_the_sampler = of_the_student | {"rollout/mismatch"}

    def missing(scored: list[ScoredRollout], **sampling: float) -> set[str]:
        return every - set(measured(student, scored, objective, sampling=replace(SAMPLING, **sampling))[0].metrics())

    for setting in ({"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        assert missing(scored, **setting) == of_the_sampler
    golden = [replace(item, rollout=replace(item.rollout, source="golden")) for item in scored]
    assert missing([*scored[:2], *golden[2:]]) == of_the_student
    assert missing(golden) == of_the_sampler
    silent = [replace(item, scores=replace(item.scores, top1_ids=None, entropies=None)) for item in scored]
    assert missing(silent) == {"top1_agreement", "entropy/teacher"}
    budget = [replace(item, rollout=replace(item.rollout, finish_reason="length")) for item in scored]
    assert missing(budget) == {"end_token/log_ratio"}

    nothing, _ = measured(student, scored, objective, masked_ids=range(512))
    assert (nothing.metrics(), nothing.position_records(0)) == ({}, [])
    assert nothing.distribution_record(0) == {"step": 0, "tokens": 0}
    supervised, _ = measured(student, [ScoredRollout(item.rollout) for item in golden], build("sft"))
    assert {key for key in supervised.metrics() if not key.startswith("reward/")} == {"entropy/student"}
    record = supervised.distribution_record(0)
    assert record.keys() == {"step", "tokens", "reward"}
    assert record["reward"]["counts"] == [record["tokens"]]


def test_gradient_norms_are_compared_with_earlier_ones() -> None:
    norms = np.random.default_rng(0).lognormal(size=250).tolist()
    whole, first, second = GradNorms(), GradNorms(), GradNorms()
    ratios = [whole.metrics(norm).get("grad_norm/median_ratio") for norm in norms]
    assert ratios[0] is None
    for step in range(1, 250):
        assert ratios[step] == pytest.approx(norms[step] / np.median(norms[max(0, step - 100) : step]))
    resumed = [first.metrics(norm) for norm in norms[:130]]
    second.load_state(first.state())
    resumed += [second.metrics(norm) for norm in norms[130:]]
    assert [metrics.get("grad_norm/median_ratio") for metrics in resumed] == ratios


def test_responses_are_described(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["3 + 4 = 7, " * 30, "so it is 25."]
    rollouts = [
        replace(own, response_ids=tuple(tokenizer.encode(text)), policy_version=version)
        for own, text, version in zip(make_rollouts([(1, 1), (1, 1)]), texts, (2, 7), strict=True)
    ]
    rollouts[0] = replace(rollouts[0], finish_reason="length")
    golden = replace(rollouts[1], source="golden", policy_version=0)
    got = rollout_metrics(7, [*rollouts, golden], tokenizer, Sampling(stop_ids=(END,), max_new_tokens=101))
    ratios = [len(tail) / len(zlib.compress(tail, 6)) for tail in (text[-100:].encode() for text in (*texts, texts[1]))]
    lengths = [len(rollout) for rollout in (*rollouts, golden)]
    assert got == pytest.approx(
        {
            "length/mean": np.mean(lengths),
            "length/min": min(lengths),
            "length/max": max(lengths),
            "truncation": 1 / 3,
            "end_token/share": 2 / 3,
            "repetition": 1 / 3,
            "compression_ratio/mean": np.mean(ratios),
            "compression_ratio/max": max(ratios),
            "staleness/mean": 2.5,  # nobody's weights sampled the golden answer
            "staleness/max": 5,
        }
    )


def test_a_clock_gives_every_phase_its_time_and_throughput() -> None:
    clock = Clock(torch.device("cpu"))
    for phase in ("rollout", "update"):
        torch.randn(300, 300).svd()
        clock.lap(phase)
    got = clock.metrics(600)
    assert got["time/step"] >= got["time/rollout"] + got["time/update"] > 0
    for phase in ("rollout", "update"):
        assert got[f"tokens_per_second/{phase}"] == pytest.approx(600 / got[f"time/{phase}"])
    assert 0.05 < got["memory/peak"] < 100  # GiB of a process that has loaded torch


def documented(file: str) -> set[str]:
    """The keys of a file's table in docs/metrics.md: `a/b`, `c` stands for a/b and a/c."""
    sections = re.split(r"^##? ", (ROOT / "docs" / "metrics.md").read_text(), flags=re.M)
    title = "Metrics" if file == "metrics.jsonl" else file
    (section,) = (section for section in sections if section.startswith(f"{title}\n"))
    keys: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", section, re.M):
        first, *others = re.findall(r"`([^`]+)`", row)
        prefix = first.partition("/")[0] + "/" if "/" in first else ""
        keys |= {first, *(other if "/" in other else prefix + other for other in others)}
    return keys


def test_runs_write_the_documented_keys_and_no_others(tmp_path: Path) -> None:
    """A sampled objective with all that can be asked of it, and an exact one."""
    settings = [
        "train.steps=2",
        "train.prompts_per_step=4",
        "sampling.max_new_tokens=48",
        "evaluation.data=null",
        "rollout.max_staleness=1",
    ]
    objectives = "{name: log_ratio, reference_kl: 0.1, golden: 0.1}", "{name: reverse_kl}"
    written: dict[str, set[str]] = {}
    for name, objective in zip(("sampled", "exact"), objectives, strict=True):
        train(load_recipe(RECIPE, [*settings, f"objective={objective}"]), tmp_path / name, Listener())
        for file in ("metrics.jsonl", "positions.jsonl", "distributions.jsonl"):
            for line in (tmp_path / name / file).read_text().splitlines():
                written.setdefault(file, set()).update(json.loads(line, parse_constant=pytest.fail))
    for file, keys in written.items():
        assert keys == documented(file), file
