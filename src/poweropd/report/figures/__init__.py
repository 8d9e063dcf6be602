"""The figures of a report: the paper's own, drawn from one run or from several in one frame."""

from poweropd.report.figure import Figure, Section
from poweropd.report.figures.curves import metric, over_steps
from poweropd.report.figures.results import result_figures
from poweropd.report.figures.rewards import reward_figures
from poweropd.report.runs import RunData

MISMATCH_SEEN = 1e-3  # nats; below it sampler and trainer differ by rounding


def figures(runs: list[RunData]) -> list[Section]:
    """Sections of figures that have something to show; what a run did not log is not there."""
    sections = {
        "Over training": [*result_figures(runs), *_rollouts(runs)],
        "The reward": reward_figures(runs),
        "The update": _update(runs),
        "The cost": _cost(runs),
    }
    kept = {title: [figure for figure in drawn if not figure.is_empty] for title, drawn in sections.items()}
    return [Section(title, drawn) for title, drawn in kept.items() if drawn]


def _rollouts(runs: list[RunData]) -> list[Figure]:
    return [
        metric(
            runs, "rollout-length", "Length of a rollout", "tokens", "length/mean",
            caption="Mean tokens of the answers that are trained on. Healthy: it settles near the teacher's length; growth "
            "without end is the start of a collapse.",
        ),
        metric(
            runs, "rollouts-cut", "Rollouts cut at the budget", "share of rollouts", "truncation",
            caption="Answers of a step that reached the budget of tokens. Healthy: small, and not growing.",
        ),
        metric(
            runs, "repetition", "Rollouts that go round in circles", "share of rollouts", "repetition",
            caption="Answers whose end compresses too well to be anything but repetition. Healthy: near 0.",
        ),
        metric(
            runs, "compression", "Compression of the ends of rollouts", "ratio", "compression_ratio/mean", "compression_ratio/max",
            caption="Bytes of the end of an answer over its bytes after zlib. Healthy: level; it climbs before answers "
            "visibly repeat.",
        ),
    ]  # fmt: skip


def _update(runs: list[RunData]) -> list[Figure]:
    sampled = all(run.signal == "reward" for run in runs)
    mismatch = [run for run in runs if max(run.column("rollout/mismatch")[1], default=0) > MISMATCH_SEEN]
    crossing = [run for run in runs if min(run.column("reward/sign_agreement")[1], default=1) < 1]
    stale = [run for run in runs if max(run.column("staleness/max")[1], default=0) > 0]
    return [
        metric(
            runs, "gradient-norm", "Gradient norm before clipping", "norm", "grad_norm", log_y=True,
            caption="Of the whole step (the paper's Fig. 6). Healthy: level or falling, without isolated spikes; between "
            "objectives the scales differ.",
        ),
        metric(
            runs, "gradient-norm-ratio", "Gradient norm over its running median", "ratio", "grad_norm/median_ratio", log_y=True,
            caption="Healthy: around 1. A step far above it is decided by a few tokens.",
        ),
        over_steps(
            runs, "training-signal", "Training signal", "reward" if sampled else "reward or divergence",
            lambda run: [("mean", f"{run.signal}/mean")],
            caption="The mean over the tokens of a step: the reward of a sampled objective, the divergence of an exact one. "
            "Healthy: a divergence falls, a reward approaches the 0 of equal models. Between objectives compare shapes.",
        ),
        metric(
            runs, "kl", "KL(student || teacher), estimated", "nats per token", "kl/k1", "kl/k3", "kl/k2",
            caption="From the tokens that the student sampled: k1 is unbiased and may be negative, k3 unbiased and never so, k2 "
            "biased. Near the teacher k2 and k3 agree and are calmer than k1; with heavy tails k2 is by far the largest and "
            "the noisiest. Healthy: falling; where they part far, few tokens decide.",
        ),
        metric(
            runs, "divergence-estimate", "What the reward descends", "divergence", "divergence/estimate",
            caption="The f-divergence of which the sampled reward is the exact gradient, estimated from the student's own "
            "tokens: the reverse KL for the log-ratio, others for clip and tanh. PowerOPD's is of another kind. Healthy: falling.",
        ),
        metric(
            runs, "reference-kl", "KL to the initial student", "nats per token", "reference_kl/mean",
            caption="How far the student has gone from where it started. Healthy: it grows, and levels off.",
        ),
        metric(
            runs, "entropy", "Entropy of the next token", "nats", "entropy/student", "entropy/teacher",
            caption="Of both models on the student's answers. Healthy: the student's approaches the teacher's; far below it, "
            "the student has lost its variety.",
        ),
        metric(
            runs, "top1-agreement", "Positions where both models prefer the same token", "share of positions", "top1_agreement",
            caption="Healthy: rising.",
        ),
        metric(
            crossing and runs, "sign-agreement", "Rewards with the sign of the log-ratio", "share of tokens", "reward/sign_agreement",
            caption="Healthy: near 1, as of a reward that only reshapes the log-ratio; less where normalisation moves tokens "
            "across 0, which pushes them the wrong way.",
        ),
        metric(
            runs, "end-token", "Log-ratio of the tokens that end answers", "nats", "end_token/log_ratio",
            caption="log p(teacher) - log p(student), mean over rollouts that stopped. Healthy: near 0. Strongly negative: the "
            "teacher would not have stopped there, or ends with another token.",
        ),
        metric(
            runs, "end-token-share", "Rollouts that end by themselves", "share of rollouts", "end_token/share",
            caption="Healthy: level or rising.",
        ),
        metric(
            mismatch and runs, "mismatch", "Sampler against trainer", "nats per token", "rollout/mismatch", log_y=True,
            caption="Mean difference of the two log-probabilities of a sampled token. Healthy: rounding, below 0.01.",
        ),
        metric(
            stale and runs, "staleness", "Age of the rollouts", "optimizer steps", "staleness/mean", "staleness/max",
            caption="Steps between the weights that sampled and those that were trained. Healthy: what the recipe asks for.",
        ),
    ]  # fmt: skip


def _cost(runs: list[RunData]) -> list[Figure]:
    return [
        metric(
            runs, "step-time", "Seconds of a step", "seconds", "time/step", "time/rollout", "time/teacher", "time/update",
            caption="By phase. Healthy: level; rollouts that take ever longer are answers that grow.",
        ),
        metric(
            runs, "tokens-per-second", "Tokens per second", "tokens per second",
            "tokens_per_second", "tokens_per_second/rollout", "tokens_per_second/teacher", "tokens_per_second/update", log_y=True,
            caption="Trained tokens over the time of a whole step, and over that of each phase. Healthy: level.",
        ),
        metric(
            runs, "memory", "Peak memory", "GiB", "memory/peak",
            caption="Of a step. Healthy: level.",
        ),
    ]  # fmt: skip
