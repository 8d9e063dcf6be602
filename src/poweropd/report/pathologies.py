"""What is wrong with a run, in words: since which step, and what to try.

A metric of every step alarms when its median over `WINDOW` steps is beyond the threshold `PATIENCE` times in a row, so
that no single step does; what is logged every few steps alarms on the smaller `SPARSE` numbers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Literal

from poweropd.report.figures.rewards import bins_with
from poweropd.report.records import is_number
from poweropd.report.runs import RunData
from poweropd.report.scores import compare, mean
from poweropd.report.verdict import change, counted, holds_zero, moved

WINDOW, PATIENCE = 5, 5
SPARSE = (3, 2)  # window and patience where only every tenth step or so is logged

TAIL_P1 = -3.0  # more than 1 % of tokens below it: far outside what bounded rewards reach (-1)
TAIL_MIN = -5.0  # the tail of the paper's Fig. 2a begins here; so does log_ratio/tail_share
TAIL_SKEW = 5.0  # times farther from the median than the 99th percentile: a tail of one side, not a wide reward
EARLY_POSITIONS = 0.05  # the first tokens of an answer, as a share of its mean length
EARLY_SHARE = 0.5  # of the squared weight there: ten times its share of the tokens
EARLY_TOKENS = 2  # fewer make no region
LENGTH_GROWTH = 1.5  # times the start: a change of kind, not of mood
LENGTH_OVER_TEACHER = 1.25  # times the teacher's: until there, growing is learning
TRUNCATED = 0.8  # of the rollouts: StableOPD's collapse ends near 1, a tight budget stays below
REPEATED = 0.2  # of the rollouts: healthy ones have near none, collapsed ones 0.3 to 0.6 (StableOPD)
END_LOG_RATIO = -3.0  # nats: the teacher gives these ends a twentieth of the student's probability
END_SHARE = 0.5  # of the share of rollouts that stopped at the start
ENTROPY_OF_START = 0.25  # of the student's entropy at the start: distillation alone sharpens to about a third
ENTROPY_OF_TEACHER = 0.5  # of the teacher's on the same tokens: sharper than its model
SPIKE = 10.0  # times the running median: ordinary steps stay within 3
SPIKES = 3  # one is an accident
SPIKE_STEPS = 100  # within so many steps
MISMATCH = 0.05  # nats: rounding is far below, another model or template far above
STALENESS = 4.0  # optimizer steps: beyond it, off-policy correction is needed
FLAT = 0.1  # of its start: a signal that moved less has not moved
FLAT_STEPS = 20  # fewer tell nothing
BOUNDED = ("power", "box_cox", "clip", "tanh", "sign_max_abs")  # objectives whose reward has no tail
COVERING = ("forward_kl", "jensen_shannon", "generalized_jsd", "jeffreys", "sft")  # they hold on to the teacher's modes
BOUNDED_REWARD = "a bounded reward: objective.name power (or clip, tanh), which keeps the sign and cuts the tail"
SELDOM_TELLS = 50  # an evaluation this small seldom tells two models apart


@dataclass(frozen=True)
class Pathology:
    """Something that looks wrong.

    Attributes:
        step: where it began.
        what: what is seen.
        try_: what to do about it.
        severity: `warn` where results are likely spoilt, `note` where one should look.
    """

    name: str
    run: str
    step: int
    what: str
    try_: str
    severity: Literal["note", "warn"]


def pathologies(run: RunData) -> list[Pathology]:
    """All that are found in a run, in the order in which they began; none in a healthy one."""
    found = (finding for detect in DETECTORS for finding in detect(run))
    return sorted(found, key=lambda pathology: pathology.step)


def heavy_tail(run: RunData) -> Iterable[Pathology]:
    """Of the reward itself: a log-ratio with a tail is usual, and harmless where the objective bounds it."""
    steps, rows = _together(run, *(f"reward/{part}" for part in ("min", "p1", "p50", "p99")))

    def is_ill(row: list[float]) -> bool:
        low, p1, middle, p99 = row
        return low < TAIL_MIN and p1 < TAIL_P1 and middle - p1 > TAIL_SKEW * (p99 - middle)

    if (step := _began(steps, rows, is_ill)) is not None:
        ill = [row for at, row in zip(steps, rows, strict=True) if at >= step]
        lowest = min(row[0] for row in ill)
        _, p1, _, p99 = (median(column) for column in zip(*ill, strict=True))
        yield Pathology(
            "Heavy negative tail", run.name, step,
            f"Of a hundred tokens one has a reward below {p1:.1f} (the lowest of all {lowest:.1f}), and one a reward above "
            f"{p99:.1f}: few tokens that the teacher rejects decide the update.",
            _tips(BOUNDED_REWARD if not _is_bounded(run) else "a smaller bound of the reward"), "warn",
        )  # fmt: skip


def early_concentration(run: RunData) -> Iterable[Pathology]:
    lengths = dict(zip(*run.column("length/mean"), strict=True))
    shares: dict[float, float] = {}
    for step, records in groupby(run.positions, key=lambda record: record["step"]):
        bins = bins_with(list(records), "gradient_share")
        region = EARLY_POSITIONS * lengths.get(step, 0)
        if bins and region >= EARLY_TOKENS:
            covered = ((min(max(region - b["first"], 0) / (b["last"] + 1 - b["first"]), 1), b) for b in bins)
            shares[step] = sum(part * b["gradient_share"] for part, b in covered)
    steps, rows = list(shares), [[share] for share in shares.values()]
    if (step := _began(steps, rows, lambda row: row[0] > EARLY_SHARE, SPARSE)) is not None:
        share = median(value for at, value in shares.items() if at >= step)
        yield Pathology(
            "Early-position concentration", run.name, step,
            f"The first {EARLY_POSITIONS:.0%} of an answer carry {share:.0%} of the squared weight of the update.",
            "look at the first tokens of the rollouts: a chat template or a thinking mode that differs between the models is "
            "the usual cause; objective.masked_tokens leaves tokens out.", "warn",
        )  # fmt: skip


def length_inflation(run: RunData) -> Iterable[Pathology]:
    steps, rows = _together(run, "length/mean")
    start = _start(rows)
    teacher = [level.mean for summaries in run.teachers.values() if (level := mean(summaries, "mean_length"))]
    limit = max(LENGTH_GROWTH * start, LENGTH_OVER_TEACHER * max(teacher, default=0.0))
    if start and (step := _began(steps, rows, lambda row: row[0] > limit)) is not None:
        reached = max(_medians(rows, WINDOW), default=[start])[0]
        than = f", beyond the teacher's {max(teacher):.0f}" if teacher else ""
        yield Pathology(
            "Length inflation", run.name, step,
            f"Answers grew from {start:.0f} to {reached:.0f} tokens{than}.",
            _tips(_reference_kl(run), "a lower optimizer.lr", "read the longest rollouts for repetition"),
            "warn" if teacher else "note",
        )  # fmt: skip


def truncation_lock(run: RunData) -> Iterable[Pathology]:
    steps, rows = _together(run, "truncation")
    if (step := _began(steps, rows, lambda row: row[0] > TRUNCATED)) is None:
        return
    budget = run.section("sampling").get("max_new_tokens", "the budget of")
    if _start(rows) > TRUNCATED:
        yield Pathology(
            "Truncation", run.name, step,
            f"From the start, nearly all rollouts reach {budget} tokens without an end: the student is never trained on one.",
            "a larger sampling.max_new_tokens; if answers are endless, a student that has learnt to stop, or its chat template.",
            "note",
        )  # fmt: skip
        return
    yield Pathology(
        "Truncation lock", run.name, step,
        f"More than {TRUNCATED:.0%} of the rollouts reach {budget} tokens without an end, which was not so at the start: the "
        "student no longer stops.",
        _tips("go back to a checkpoint before this step, with a lower optimizer.lr", _reference_kl(run), _guard(run),
              "" if _is_bounded(run) else BOUNDED_REWARD), "warn",
    )  # fmt: skip


def repetition(run: RunData) -> Iterable[Pathology]:
    steps, rows = _together(run, "repetition")
    if (step := _began(steps, rows, lambda row: row[0] > REPEATED)) is not None:
        yield Pathology(
            "Repetition", run.name, step,
            f"Up to {max(rows)[0]:.0%} of the rollouts end going round in circles.",
            _tips(_guard(run), "a lower optimizer.lr",
                  "" if run.section("objective").get("golden") else "golden answers beside the rollouts (objective.golden)"), "warn",
        )  # fmt: skip


def end_tokens(run: RunData) -> Iterable[Pathology]:
    mapped = run.section("objective").get("end_token") == "map"
    advice = _tips(
        "" if mapped else "objective.end_token: map, which counts all end tokens of both models as one outcome",
        "compare how both models end an answer: their chat templates, and their end tokens, which `poweropd doctor` names",
    )
    steps, rows = _together(run, "end_token/log_ratio")
    if (step := _began(steps, rows, lambda row: row[0] < END_LOG_RATIO)) is not None:
        value = median(row[0] for at, row in zip(steps, rows, strict=True) if at >= step)
        yield Pathology(
            "End-token mismatch", run.name, step,
            f"Where the student ends an answer the log-ratio is {value:.1f}: the teacher would go on, or end with another token.",
            advice, "warn",
        )  # fmt: skip
        return
    if mapped and any(truncation_lock(run)):
        return  # the same, seen from the other side
    steps, rows = _together(run, "end_token/share")
    start = _start(rows)
    if start and (step := _began(steps, rows, lambda row: row[0] < END_SHARE * start)) is not None:
        yield Pathology(
            "Fewer answers end" if mapped else "End-token mismatch", run.name, step,
            f"Rollouts that end by themselves fell from {start:.0%} to {min(_medians(rows, WINDOW))[0]:.0%}: the student unlearns "
            "to stop.", advice, "warn",
        )  # fmt: skip


def mode_collapse(run: RunData) -> Iterable[Pathology]:
    """Entropy far below where it was and below the teacher's, and either Pass@k or the agreement with the teacher fell."""
    steps, rows = _together(run, "entropy/student", "entropy/teacher")
    start = _start(rows)

    def is_ill(row: list[float]) -> bool:
        return row[0] < ENTROPY_OF_START * start and row[0] < ENTROPY_OF_TEACHER * row[1]

    step = _began(steps, rows, is_ill)
    worse = _pass_fell(run) or _agreement_fell(run)
    if step is not None and worse:
        yield Pathology(
            "Mode collapse", run.name, step,
            f"The student's entropy fell from {start:.3g} to {min(_medians(rows, WINDOW))[0]:.3g} nats, below half of the "
            f"teacher's, and {worse}: its answers lose their variety.",
            _tips("" if run.objective_name in COVERING else
                  "a forward KL or a Jensen-Shannon objective, which do not let go of the teacher's other modes",
                  "a lower optimizer.lr",
                  "" if run.section("sampling").get("temperature") == 1 else "sampling.temperature 1"), "warn",
        )  # fmt: skip


def _pass_fell(run: RunData) -> str:
    """Pass@k after training is below the interval it had before."""
    if run.last is None or 0 not in run.evaluations or run.last[1].keys() != run.evaluations[0].keys():
        return ""
    before, after = (mean(summaries, "pass") for summaries in (run.evaluations[0], run.last[1]))
    fell = before is not None and after is not None and after.mean < before.low
    return f"Pass@k fell from {before.mean:.3f} to {after.mean:.3f}" if fell and before and after else ""


def _agreement_fell(run: RunData) -> str:
    values = [row[0] for row in _medians(_together(run, "top1_agreement")[1], WINDOW)]
    fell = bool(values) and values[-1] < values[0] * (1 - FLAT)
    return f"the share of positions where both prefer one token fell to {values[-1]:.2f}" if fell else ""


def gradient_spikes(run: RunData) -> Iterable[Pathology]:
    steps, ratios = run.column("grad_norm/median_ratio")
    spikes = [(step, ratio) for step, ratio in zip(steps, ratios, strict=True) if ratio > SPIKE]
    for (step, _), (last, _) in zip(spikes, spikes[SPIKES - 1 :], strict=False):
        if last - step < SPIKE_STEPS:
            yield Pathology(
                "Gradient spikes", run.name, int(step),
                f"{len(spikes)} steps had a gradient norm more than {SPIKE:.0f} times the running median, at most "
                f"{max(ratio for _, ratio in spikes):.0f} times.",
                _tips("" if _is_bounded(run) else BOUNDED_REWARD, "a smaller optimizer.max_grad_norm",
                      "more train.prompts_per_step",
                      "" if run.section("optimizer").get("warmup_steps") else "optimizer.warmup_steps"), "warn",
            )  # fmt: skip
            return


def sampler_mismatch(run: RunData) -> Iterable[Pathology]:
    steps, rows = _together(run, "rollout/mismatch")
    if (step := _began(steps, rows, lambda row: row[0] > MISMATCH)) is not None:
        yield Pathology(
            "Sampler mismatch", run.name, step,
            f"Sampler and trainer disagree about the student by up to {max(_medians(rows, WINDOW))[0]:.2g} nats a token.",
            "one precision for both, and weights that are synchronised after every step; training is off-policy until then.",
            "warn",
        )  # fmt: skip


def staleness(run: RunData) -> Iterable[Pathology]:
    steps, rows = _together(run, "staleness/mean")
    if (step := _began(steps, rows, lambda row: row[0] > STALENESS)) is not None:
        yield Pathology(
            "Stale rollouts", run.name, step,
            f"Rollouts are {median(row[0] for row in rows):.1f} optimizer steps old when they are trained on.",
            _tips("a smaller rollout.max_staleness, or fewer steps between updates of the sampler's weights",
                  "" if run.section("rollout").get("importance") == "token" else "rollout.importance: token"), "note",
        )  # fmt: skip


def no_learning(run: RunData) -> Iterable[Pathology]:
    """The distance to the teacher moved little, or no more than by its noise, and the accuracy likewise."""
    key = next((key for key in ("kl/k1", "divergence/mean", "log_ratio/mean") if run.column(key)[1]), None)
    found = change(run)
    if key is None or found is None or found.paired is None or not holds_zero(found.paired):
        return
    steps, values = run.column(key)
    trend = moved(key, values)
    if trend is None or len(values) < FLAT_STEPS:
        return
    if not trend.is_clear or abs(trend.last - trend.first) < FLAT * abs(trend.first):
        warmup, planned = run.section("optimizer").get("warmup_steps"), run.steps_planned
        brief = is_number(warmup) and planned is not None and warmup < planned / 2
        yield Pathology(
            "No learning", run.name, int(steps[0]),
            f"{key} did not clearly move ({trend.first:.3g} to {trend.last:.3g}), and accuracy did not change distinguishably.",
            _tips("a higher optimizer.lr", "more train.steps",
                  "" if brief else "check that optimizer.warmup_steps does not cover the run"), "warn",
        )  # fmt: skip


def weak_teacher(run: RunData) -> Iterable[Pathology]:
    if len(run.teachers) != 1 or 0 not in run.evaluations:
        return
    ((name, summaries),) = run.teachers.items()
    ahead = compare(run.evaluations[0], summaries)
    if ahead is not None and ahead.difference.low <= 0:
        lead, (low, high) = ahead.difference.mean, ahead.difference[1:]
        few = ahead.problems < SELDOM_TELLS
        yield Pathology(
            "Weak teacher", run.name, 0,
            f"The {name} is not distinguishably better than the student before training: {lead:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"over {counted(ahead.problems, 'problem')}.",
            "evaluate on more problems, to know." if few else "a better teacher, or problems on which it is better; check its "
            "chat template and budget of tokens.", "note" if few else "warn",
        )  # fmt: skip


DETECTORS: tuple[Callable[[RunData], Iterable[Pathology]], ...] = (
    heavy_tail, early_concentration, length_inflation, truncation_lock, repetition, end_tokens, mode_collapse,
    gradient_spikes, sampler_mismatch, staleness, no_learning, weak_teacher,
)  # fmt: skip


def _tips(*tips: str) -> str:
    """What to try, without what the recipe has already, which is empty here."""
    return f"{'; '.join(tip for tip in tips if tip)}."


def _is_bounded(run: RunData) -> bool:
    return run.objective_name in BOUNDED or run.signal == "divergence"


def _reference_kl(run: RunData) -> str:
    has = run.section("objective").get("reference_kl")
    return f"a {'stronger ' if has else ''}KL to the initial student (objective.reference_kl)"


def _guard(run: RunData) -> str:
    acts = run.section("guard").get("action") in ("stop", "raise_reference_kl")
    return "" if acts else "guard.action: stop or raise_reference_kl, which catch it by themselves"


def _together(run: RunData, *keys: str) -> tuple[list[float], list[list[float]]]:
    """Steps and rows of values, where all of the metrics were logged."""
    columns = [dict(zip(*run.column(key), strict=True)) for key in keys]
    steps = [step for step in columns[0] if all(step in column for column in columns)]
    return steps, [[column[step] for column in columns] for step in steps]


def _medians(rows: list[list[float]], window: int) -> list[list[float]]:
    """Column by column over each stretch of `window` rows."""
    stretches = (rows[at : at + window] for at in range(len(rows) - window + 1))
    return [[median(column) for column in zip(*stretch, strict=True)] for stretch in stretches]


def _start(rows: list[list[float]]) -> float:
    """The first column at the start of the run; 0 where there are too few steps."""
    medians = _medians(rows[:WINDOW], WINDOW)
    return medians[0][0] if medians else 0.0


def _began(
    steps: list[float],
    rows: list[list[float]],
    is_ill: Callable[[list[float]], bool],
    numbers: tuple[int, int] = (WINDOW, PATIENCE),
) -> int | None:
    """The step from which the medians over a window are ill so many times in a row; None if they never are."""
    window, patience = numbers
    row_of_ill = 0
    for place, values in enumerate(_medians(rows, window)):
        row_of_ill = row_of_ill + 1 if is_ill(values) else 0
        if row_of_ill == patience:
            first = place - patience + 1
            return int(
                next((step for step, row in zip(steps[first:], rows[first:], strict=True) if is_ill(row)), steps[first])
            )
    return None
