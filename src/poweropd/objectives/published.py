"""Published methods that are more than a divergence and an estimator: their own terms, gates, targets and selections.

Each function takes the settings of its row. Constants that a paper does not give are settings, and their help says so.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from poweropd.objectives.divergences import coarsen
from poweropd.objectives.positions import Positions
from poweropd.objectives.settings import Value
from poweropd.objectives.shaping import StepTokens, min_max, top_share

Settings = Mapping[str, Value]


def uncertain_forward_kl(at: Positions, settings: Settings) -> Tensor:
    """Entropy-aware OPD: `coefficient * 1[H(p) >= threshold] * KL(p on its top k, renormalised || q)`, [B].

    arXiv 2603.07079, as in a third-party copy of its code. Renormalising moves the fixed point to p on the top k alone;
    `tail: bucket` keeps it at p.
    """
    assert at.student is not None
    assert at.top_ids is not None
    assert at.top_logprobs is not None
    assert at.teacher_entropies is not None
    if settings["tail"] == "bucket":
        student, teacher = coarsen(at.student, at.top_ids, at.top_logprobs, tail="bucket")
    else:
        student, teacher = at.student.gather(-1, at.top_ids), torch.log_softmax(at.top_logprobs, dim=-1)
    value = (teacher.exp() * (teacher - student)).sum(-1)
    return float(settings["coefficient"]) * (at.teacher_entropies >= float(settings["threshold"])) * value


def ungated(student_logprobs: Tensor, teacher_logprobs: Tensor, settings: Settings) -> Tensor:
    """Asymmetric OPD: 1 where the log-ratio stays, `p - q > threshold`, else 0; elementwise."""
    above = teacher_logprobs.exp() - student_logprobs.exp() > float(settings["threshold"])
    return above.to(student_logprobs.dtype)


def gated_forward_kl(at: Positions, settings: Settings) -> Tensor:
    """Asymmetric OPD: `(1/k) sum_{v in top k of p} p (log p - log q)` where `p - q <= threshold`, [B].

    arXiv 2605.06387. Not renormalised, so at q = p it still pulls towards the top k, by (1/k) of the tail's mass.
    """
    assert at.student is not None
    assert at.top_ids is not None
    assert at.top_logprobs is not None
    assert at.teacher_logprobs is not None
    gated = 1 - ungated(at.logprobs, at.teacher_logprobs, settings)
    student, teacher = coarsen(at.student, at.top_ids, at.top_logprobs, tail="keep")
    return gated * (teacher.exp() * (teacher - student)).sum(-1) / at.top_ids.shape[-1]


def vetoed_target(student: Tensor, teacher: Tensor, settings: Settings, progress: float) -> Tensor:
    """Veto: log of `Q ~ p q^b`, q detached, with b falling linearly to zero over training; [..., V]. arXiv 2601.07155."""
    beta = float(settings["beta"]) * (1 - progress)
    return torch.log_softmax(teacher + beta * student.detach(), dim=-1)


def reopold_floor(mixing: float) -> float:
    """`log(mixing) / (1 - mixing)`: the limit of log((mixing q + (1 - mixing) p) / q) / (1 - mixing) as p -> 0."""
    return math.log(mixing) / (1 - mixing)


def reopold_selection(tokens: StepTokens, settings: Settings, progress: float) -> Tensor:
    """REOPOLD: first the tokens above the floor, later the `share` where the student is least certain; [N] of bool."""
    if progress < float(settings["switch"]):
        return tokens.teacher_logprobs - tokens.logprobs >= reopold_floor(float(settings["mixing"]))
    return top_share(tokens.entropies, float(settings["share"]))


def important_tokens(tokens: StepTokens, settings: Settings, progress: float) -> Tensor:
    """TIP: in each rollout the `share` of tokens with the highest soft-or of student entropy and divergence; [N] of bool."""
    h, d = min_max(tokens.entropies, tokens.rollouts), min_max(tokens.divergences, tokens.rollouts)
    _, lengths = tokens.rollouts.unique_consecutive(return_counts=True)
    share = float(settings["share"])
    return torch.cat([top_share(scores, share) for scores in (h + d - h * d).split(lengths.tolist())])
