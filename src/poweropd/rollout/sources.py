"""Several engines as one: each prompt of a step is answered by the student, by its teacher, or by the data."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from poweropd.objectives import Objective
from poweropd.rollout.engine import RolloutEngine, Sampling
from poweropd.rollout.sampling import uniforms
from poweropd.sections import RolloutConfig
from poweropd.types import Prompt, Rollout, Source

ORDER: tuple[Source, ...] = get_args(Source)


def off_policy_notes(config: RolloutConfig, objective: Objective) -> list[str]:
    """What nothing corrects where others than the student write the answers; a line each."""
    others: list[str] = [source for source in config.sources if source != "student"]
    if config.teacher_mixing:
        others.append(f"student with {config.teacher_mixing:g} of the teacher")
    if config.max_staleness:
        others.append(f"a student up to {config.max_staleness} step{'s' if config.max_staleness > 1 else ''} old")
    if not others or objective.row.on_golden_answers:
        return []
    notes = [f"off-policy: the prefixes of {' and '.join(others)} are taken as they are"]
    if objective.has_score and "golden" in config.sources:
        notes.append("off-policy: nobody sampled the golden answers, so their rewards are not weighted")
    if objective.has_score and config.importance == "none" and others != ["golden"]:
        notes.append("off-policy: rewards are not weighted (rollout.importance=none)")
    return notes


class SourceEngine:
    """Has each prompt answered by one of several engines.

    A prompt's choice is a pure function of the call's seed and the prompt's id, so a resumed run makes the same ones,
    and they do not depend on what else is in the call or on the order in which the shares are written down. GKD,
    arXiv 2306.13649, draws once a batch.

    Args:
        engines: who answers for each source; what they give is taken as it is, also how many rollouts a prompt.
        shares: the probability of each source that answers, positive and 1 in sum; other engines are left out.
    """

    def __init__(self, engines: Mapping[Source, RolloutEngine], shares: Mapping[Source, float]) -> None:
        self._shares = {source: shares[source] for source in ORDER if source in shares}
        self._engines = {source: engines[source] for source in self._shares}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        if len(self._engines) == 1:
            (engine,) = self._engines.values()
            return engine.generate(prompts, sampling, seed=seed)
        chosen = [self._choose(prompt, seed=seed) for prompt in prompts]
        return _answers(self._engines, chosen, prompts, sampling, seed)

    def update_weights(self, *, version: int) -> None:
        for engine in self._engines.values():
            engine.update_weights(version=version)

    def _choose(self, prompt: Prompt, *, seed: int) -> Source:
        """Who answers the prompt in a call with this seed."""
        level = uniforms(prompt, "source", seed=seed, count=1).item()
        *others, last = self._shares
        for source in others:
            level -= self._shares[source]
            if level < 0:
                return source
        return last


class RoutedEngine:
    """Has each prompt answered by the engine of its own teacher.

    Args:
        engines: by the teacher's name.
    """

    def __init__(self, engines: Mapping[str, RolloutEngine]) -> None:
        self._engines = engines

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        return _answers(self._engines, [prompt.teacher for prompt in prompts], prompts, sampling, seed)

    def update_weights(self, *, version: int) -> None:
        for engine in self._engines.values():
            engine.update_weights(version=version)


def _answers(
    engines: Mapping[Any, RolloutEngine],
    chosen: Sequence[str | None],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
) -> list[Rollout]:
    """Answers by the engine chosen for each prompt, in the order of the prompts."""
    answers: list[list[Rollout]] = [[] for _ in prompts]
    for name in dict.fromkeys(chosen):
        places = [place for place, choice in enumerate(chosen) if choice == name]
        rollouts = engines[name].generate([prompts[place] for place in places], sampling, seed=seed)
        each = len(rollouts) // len(places)
        for index, place in enumerate(places):
            answers[place] = rollouts[index * each : (index + 1) * each]
    return [rollout for answer in answers for rollout in answer]
