"""Every start-up check of a recipe, without training: what fits, what does not, what to know."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from poweropd.assembly import Parts, assemble
from poweropd.config import Recipe, label
from poweropd.errors import ModelError
from poweropd.guards import MISMATCH_ALARM
from poweropd.overlap import Problem, overlaps
from poweropd.pair import head_rows
from poweropd.plan.load import Load
from poweropd.plan.machines import GIB, here
from poweropd.plan.memory import memory
from poweropd.step_statistics import StepStatistics
from poweropd.teacher.scorer import judge
from poweropd.teachers import examine as examine_teacher
from poweropd.types import Prompt, Rollout
from poweropd.update import accumulate_gradient


@dataclass(frozen=True)
class Check:
    """`fail` would spoil a run, `warn` may surprise."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    message: str


def examine(recipe: Recipe) -> Iterator[Check]:
    """Checks, as they are done. Loading refuses what cannot work at all.

    Raises:
        UserError: the parts of the run cannot be built.
    """
    parts = assemble(recipe)
    checks: list[Callable[[Recipe, Parts], Check]] = [
        _vocabulary, _end_tokens, _chat_template, _data, _overlap, _context, _memory,
    ]  # fmt: skip
    for check in checks:
        yield check(recipe, parts)
    rollouts = parts.probe_rollouts()
    for name in parts.teachers:
        yield _teacher(name, recipe, parts, rollouts)
    yield _sampler_parity(parts, rollouts)


def _vocabulary(recipe: Recipe, parts: Parts) -> Check:
    heads = {"student": head_rows(parts.pair.student)}
    heads |= {label(name): teacher.head_rows for name, teacher in parts.pair.teachers.items()}
    rows = ", ".join(f"{number} ({name})" for name, number in heads.items())
    return Check(
        "vocabulary",
        "ok",
        f"{parts.pair.vocab_size} shared tokens; LM heads have {rows} rows, padding rows never get probability",
    )


def _end_tokens(recipe: Recipe, parts: Parts) -> Check:
    pair = parts.pair
    if not pair.end_tokens.differ:
        return Check("end tokens", "ok", f"all models end answers alike: {pair.end_tokens.stop_ids}")
    verdict: Literal["ok", "warn"] = "warn" if pair.end_tokens.policy == "keep" else "ok"
    return Check("end tokens", verdict, pair.introduction()[-1])


def _chat_template(recipe: Recipe, parts: Parts) -> Check:
    if not any(section.chat for section in recipe.data_sections.values()):
        return Check("chat template", "ok", "not used: data.chat is false")
    tokenizers = {"student": parts.pair.tokenizer}
    tokenizers |= {label(name): teacher.tokenizer for name, teacher in parts.pair.teachers.items()}
    templates = {name: tokenizer.chat_template for name, tokenizer in tokenizers.items() if tokenizer.chat_template}
    used, *others = templates
    different = [name for name in others if templates[name] != templates[used]]
    if different:
        return Check(
            "chat template", "warn", f"{used} and {', '.join(different)} have different templates; the {used}'s is used"
        )
    return Check("chat template", "ok", f"the {used}'s{'' if used == 'student' else '; the student has none'}")


def _data(recipe: Recipe, parts: Parts) -> Check:
    epochs = recipe.train.steps * recipe.train.prompts_per_step / len(parts.stream)
    asked = ", ".join(f"{len(problems.prompts)} of {problems.title}" for problems in parts.problems)
    held_out = f"problems to evaluate: {asked}" if asked else "no evaluation"
    return Check("data", "ok", f"{len(parts.stream)} prompts, {epochs:.2g} epochs; {held_out}")


def _overlap(recipe: Recipe, parts: Parts) -> Check:
    name = "data overlap"
    if not parts.problems:
        return Check(name, "ok", "not looked for: the recipe has no evaluation")
    training = _as_problems(parts.stream.prompts)
    asked = recipe.evaluation.data
    # All problems of a generator are near each other, and are meant to be.
    generated = asked.split if asked is not None and asked.source == "reasoning_gym" else None
    told, found = [], False
    for problems in parts.problems:
        pairs = overlaps(training, _as_problems(problems.prompts))
        exact, near = (len({pair.benchmark_place for pair in pairs if pair.kind == kind}) for kind in ("exact", "near"))
        counts = f"{exact} of {len(problems.prompts)} of {problems.title} are in the training data in the same words"
        told.append(counts if problems.name == generated else f"{counts}, {near} nearly so")
        found |= bool(exact or (near and problems.name != generated))
    advice = ". `poweropd data check` lists them, and writes the data without them" if found else ""
    return Check(name, "warn" if found else "ok", f"{'; '.join(told)}{advice}")


def _as_problems(prompts: Sequence[Prompt]) -> list[Problem]:
    return [Problem(prompt.id, prompt.text, prompt.answer) for prompt in prompts]


def _context(recipe: Recipe, parts: Parts) -> Check:
    longest = parts.stream.longest
    total = longest + parts.sampling.max_new_tokens
    return Check(
        "context",
        "ok",
        f"longest prompt {longest} + {parts.sampling.max_new_tokens} new tokens = {total} of {parts.pair.context}",
    )


def _memory(recipe: Recipe, parts: Parts) -> Check:
    try:
        needed = memory(Load.of(recipe, here(), prompt=parts.stream.longest))
    except ModelError as error:
        return Check("memory", "warn", str(error))
    told = f"{needed.peak / GIB:.2g} GiB at the peak of a step ({needed.fullest}), of {needed.room / GIB:.3g} GiB"
    advice = "" if needed.fits else "; `poweropd plan` says what to change"
    return Check("memory", "ok" if needed.fits else "warn", f"{told}{advice}")


def _teacher(name: str, recipe: Recipe, parts: Parts, rollouts: list[Rollout]) -> Check:
    findings = examine_teacher(name, recipe, parts.pair, parts.teachers[name], rollouts)
    problem = "" if findings.problem is None else f"{findings.problem}: "
    return Check(f"{label(name)} determinism", "fail" if problem else "ok", f"{problem}{findings}")


def _sampler_parity(parts: Parts, rollouts: list[Rollout]) -> Check:
    scored = judge(rollouts, parts.objective, parts.teacher, parts.reference)
    seen = StepStatistics(parts.objective, rollouts, parts.probe_sampling, detailed=False, device=parts.student.device)
    accumulate_gradient(parts.student, scored, parts.objective, parts.how, watch=seen.add, keep=0)
    parts.student.optimizer.zero_grad()
    gap = seen.metrics().get("rollout/mismatch", 0.0)
    verdict: Literal["ok", "warn"] = "ok" if gap <= MISMATCH_ALARM else "warn"
    return Check("sampler parity", verdict, f"sampler and trainer differ by {gap:.1e} nats a token about the student")
