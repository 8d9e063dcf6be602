"""What the student is rewarded for: distribution, tail, place in the answer, and probabilities of both models.

The paper's Fig. 2a to 2c and 5.
"""

from itertools import pairwise

from poweropd.report.figure import TEACHER, Bars, Figure, Line, Plane
from poweropd.report.figures.curves import FEW, over_steps
from poweropd.report.records import Record, histogram
from poweropd.report.runs import RunData

MOST_PLANES = 4
MOST_BINS = 100  # of a histogram
BANDS = {("p5", "p95"): "the 5th to the 95th percentile", ("min", "max"): "the lowest to the highest token"}
EXTREMES = ("min", "p1", "p99", "max")


def reward_figures(runs: list[RunData]) -> list[Figure]:
    """Of many runs the frames hold one line or one histogram each."""
    reshaped = [run for run in runs if run.signal != "reward" or run.objective_name != "log_ratio"]
    signal = _signal(runs)
    scales = " Between objectives the scales differ." if len({run.objective for run in runs}) > 1 else ""
    one_sided = " A divergence is never below 0." if "divergence" in signal else ""
    return [
        _histogram(
            runs, "reward-distribution", f"Distribution of the {signal}", signal, None,
            "Share of the tokens per unit, at the last step that was logged; the axis is logarithmic so that rare tokens show. "
            f"Healthy: both sides end at similar distances; a long left tail lets a few tokens decide.{one_sided}{scales}",
        ),
        _histogram(
            runs if reshaped else [], "log-ratio-distribution", "Distribution of the log-ratio", "nats", "log_ratio",
            "log p(teacher) - log p(student) of the same tokens: the tail that the objective has to cope with. Healthy: a "
            "left tail that shortens as training goes on.",
        ),
        _by_position(
            runs, f"The {signal} by position in the answer", signal,
            "Mean over the tokens of each bin of positions, at the last step that was logged; bins double in width. Healthy: "
            f"level; a few positions far from the rest carry the update.{scales}",
        ),
        _gradient_share(runs),
        over_steps(
            runs, "reward-extremes", f"Extremes of the {signal}", signal,
            lambda run: [(part, f"{run.signal}/{part}") for part in EXTREMES],
            caption=f"Lowest and highest token of each step, and the first and last percentile (of many runs, the lowest alone)."
            f" Healthy: level, and as far on both sides.{scales}",
        ),
        over_steps(
            runs if reshaped else [], "log-ratio-extremes", "Extremes of the log-ratio", "nats",
            lambda _: [(part, f"log_ratio/{part}") for part in EXTREMES],
            caption="log p(teacher) - log p(student), whatever the objective: the tail before it is shaped. Healthy: the percentiles "
            "draw together; a lowest token ten and more nats below 0 is usual, and harmless where the reward bounds it.",
        ),
        *_planes(runs),
    ]  # fmt: skip


def _signal(runs: list[RunData]) -> str:
    return " or ".join(sorted({run.signal for run in runs}, reverse=True))


def _histogram(runs: list[RunData], key: str, title: str, label: str, name: str | None, caption: str) -> Figure:
    """`name` of the histogram in distributions.jsonl; None for the run's training signal."""
    bars = []
    for index, run in enumerate(runs):
        found = _last_histogram(run, name or run.signal)
        if found is not None:
            edges, counts = _coarser(*found)
            widths = (upper - lower for lower, upper in pairwise(edges))
            density = [count / sum(counts) / width for count, width in zip(counts, widths, strict=True)]
            bars.append(Bars(run.name, edges, density, run=index))
    return Figure(key, title, label, "share of tokens per unit", bars=bars, caption=caption, log_y=True)


def _coarser(edges: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
    """Bins too narrow to be seen made one: a logged histogram is finest around 0, where it would be a thicket."""
    narrowest = (edges[-1] - edges[0]) / MOST_BINS
    kept, merged = [edges[0]], [0]
    for upper, count in zip(edges[1:], counts, strict=True):
        merged[-1] += count
        if upper - kept[-1] >= narrowest:
            kept.append(upper)
            merged.append(0)
    if kept[-1] == edges[-1]:
        return kept, merged[:-1]
    return [*kept, edges[-1]], merged


def _last_histogram(run: RunData, name: str) -> tuple[list[float], list[int]] | None:
    for record in reversed(run.distributions):
        found = histogram(record, name)
        if found is not None:
            return found
    return None


def _by_position(runs: list[RunData], title: str, label: str, caption: str) -> Figure:
    lines, bands = [], set()
    for index, run in enumerate(runs):
        bins = bins_with(run.last_logged("positions"), f"{run.signal}/mean")
        if not bins:
            continue
        ends = next(
            (ends for ends in BANDS if all(f"{run.signal}/{end}" in bin_ for bin_ in bins for end in ends)), None
        )
        below, above = [], []
        if ends and len(runs) <= FEW:
            below, above = ([bin_[f"{run.signal}/{end}"] for bin_ in bins] for end in ends)
            bands.add(BANDS[ends])
        lines.append(
            Line(run.name, _middles(bins), [bin_[f"{run.signal}/mean"] for bin_ in bins], below, above, run=index)
        )
    if bands:
        caption += f" The band is {' or '.join(sorted(bands))}."
    return Figure(
        "reward-by-position", title, "position in the answer, from 1", label, lines, caption=caption, log_x=True
    )


def _gradient_share(runs: list[RunData]) -> Figure:
    lines = []
    for index, run in enumerate(runs):
        bins = bins_with(run.last_logged("positions"), "gradient_share")
        if not bins:
            continue
        lines.append(Line(run.name, _middles(bins), [bin_["gradient_share"] for bin_ in bins], run=index))
        if len(runs) == 1:
            total = sum(bin_["tokens"] for bin_ in bins)
            tokens = [bin_["tokens"] / total for bin_ in bins]
            lines.append(Line("share of the tokens", _middles(bins), tokens, style="dot", run=TEACHER))
    caption = (
        "Share of the step's sum of squared rewards that lies in each bin of positions: who decides the update. Healthy: "
        "about the share of the tokens; far above it at the start, the first tokens decide."
    )
    return Figure(
        "gradient-share", "Squared weight by position in the answer", "position in the answer, from 1",
        "share of the step", lines, caption=caption, log_x=True,
    )  # fmt: skip


def bins_with(records: list[Record], key: str) -> list[Record]:
    """Lines of positions.jsonl that have `key`."""
    return [record for record in records if key in record]


def _middles(bins: list[Record]) -> list[float]:
    """Of bins of positions, counted from 1 so that a logarithmic axis has a place for the first."""
    return [((bin_["first"] + 1) * (bin_["last"] + 1)) ** 0.5 for bin_ in bins]


def _planes(runs: list[RunData]) -> list[Figure]:
    drawn = [(run, plane) for run in runs if (plane := _plane(run)) is not None]
    return [
        Figure(
            "reward-plane" if len(runs) == 1 else f"reward-plane-{place + 1}",
            f"The {run.signal} over both probabilities{f': {run.name}' if len(runs) > 1 else ''}",
            "probability by the student", "probability by the teacher", plane=plane,
            caption=f"Mean {run.signal} of the sampled tokens by the probability that each model gives them, at the last step "
            "that was logged. Healthy: near 0 on the diagonal, where both agree; above it the teacher likes the token more.",
        )
        for place, (run, plane) in enumerate(drawn[:MOST_PLANES])
    ]  # fmt: skip


def _plane(run: RunData) -> Plane | None:
    found = [record["plane"] for record in run.distributions if record.get("plane")]
    if not found or not found[-1]["cells"]:
        return None
    edges, cells = found[-1]["edges"], found[-1]["cells"]
    size = len(edges) - 1
    values: list[list[float | None]] = [[None] * size for _ in range(size)]
    counts = [[0] * size for _ in range(size)]
    for student, teacher, count, value in cells:
        values[teacher][student], counts[teacher][student] = value, count
    return Plane(edges, edges, values, f"mean {run.signal}", counts, diverging=run.signal == "reward")
