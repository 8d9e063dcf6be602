"""A row of the table of objectives: what there is to say of one, and what makes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from poweropd.objectives.divergences import Divergence
from poweropd.objectives.positions import Positions
from poweropd.objectives.settings import Setting, Value
from poweropd.objectives.shaping import StepTokens

Needs = Literal["nothing", "sampled", "top_k", "full"]  # what an objective asks of a model, each more than the last
Estimator = Literal["sampled", "top_k", "full"]


@dataclass(frozen=True)
class Row:
    """One objective of the table, as documented and as computed.

    Attributes:
        summary, equation, gradient_of, reference: text; `gradient_of` says what its expected update follows the gradient of.
        divergence: makes it; called with every setting of the row.
        estimators: those it has; the first is the default.
        settings: the row's own.
        defaults: other defaults of settings that many objectives have.
        fixed: those of them that make it what it is, and cannot be set.
        fixed_point: where its update vanishes; `teacher` for every proper divergence.
        gate: factor on the reward of a token, elementwise, from log q and log p of it.
        extra: further exact term [B] over the teacher's top k.
        target: the distribution [..., V] that is put in the teacher's place.
        select: which tokens [N] of a step are trained on.
        on_golden_answers: supervised: the reward of every token is 1.
    """

    summary: str
    equation: str
    gradient_of: str
    reference: str
    divergence: Callable[..., Divergence] | None = None
    estimators: tuple[Estimator, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    fixed: Mapping[str, Value] = field(default_factory=dict)
    fixed_point: str = "teacher"
    gate: Callable[[Tensor, Tensor, Mapping[str, Value]], Tensor] | None = None
    extra: Callable[[Positions, Mapping[str, Value]], Tensor] | None = None
    target: Callable[[Tensor, Tensor, Mapping[str, Value], float], Tensor] | None = None
    select: Callable[[StepTokens, Mapping[str, Value], float], Tensor] | None = None
    on_golden_answers: bool = False

    @property
    def needs(self) -> Needs:
        """What the teacher must give, with every setting at its default."""
        return self.needs_with(next(iter(self.estimators), "sampled"), self.fixed.get("baseline", "none"))

    def needs_with(self, estimator: str, baseline: Value) -> Needs:
        """What the teacher must give: log p of the sampled token, its k likeliest, its whole distribution, or nothing."""
        if self.on_golden_answers:
            return "nothing"
        if estimator == "full" or baseline == "exact":
            return "full"
        return "top_k" if estimator == "top_k" or self.extra else "sampled"
