"""The parts of a run, built and checked from its recipe: everything wrong with them is said before the first step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.config import Recipe
from poweropd.distributed import ALONE, World
from poweropd.errors import ConfigError
from poweropd.evaluation.benchmarks import benchmark
from poweropd.evaluation.runner import Asking, Problems
from poweropd.objectives import Objective
from poweropd.pair import ModelPair, load_configured, load_pair
from poweropd.policy import Student
from poweropd.prompts import PromptStream, fingerprint, load_prompts
from poweropd.rollout.engine import RolloutEngine, Sampler, Sampling
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.hf import HFEngine
from poweropd.rollout.replica import Replica
from poweropd.rollout.shared import SharedEngine
from poweropd.rollout.sources import RoutedEngine, SourceEngine
from poweropd.rollout.vllm_requests import check_sampling
from poweropd.rollout.vllm_weights import tied_names
from poweropd.samplers import vllm_sampler
from poweropd.sections import DataConfig
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import TeacherScorer, check_serves
from poweropd.teachers import judge_of, least_tokens_per_batch, local_scorer, scorer
from poweropd.types import Prompt, Rollout, Source
from poweropd.update import MicroBatches

PROBE_PROMPTS, PROBE_TOKENS = 2, 24  # of the student's answers by which parts are examined before the first step


@dataclass(frozen=True)
class Parts:
    """Everything the training loop works with."""

    pair: ModelPair
    student: Student
    teacher: TeacherScorer  # judges, whichever models that takes
    teachers: Mapping[str, TeacherScorer]  # each alone, by name, without its cache
    engine: RolloutEngine  # gives the trajectories that are trained on
    student_engine: Sampler  # samples from the student, for evaluation
    teacher_engines: Mapping[str, Sampler]  # samples from each judge whose models are here, for evaluation
    objective: Objective
    reference: TeacherScorer | None  # the frozen initial student, where the objective is held to it
    how: MicroBatches
    stream: PromptStream
    sampling: Sampling
    problems: list[Problems]  # what the student is evaluated on
    asking: Asking
    data_fingerprint: str

    @property
    def probe_sampling(self) -> Sampling:
        return Sampling(stop_ids=self.sampling.stop_ids, max_new_tokens=PROBE_TOKENS)

    def probe_rollouts(self) -> list[Rollout]:
        """A few short answers of the student, to examine the parts by."""
        return self.student_engine.generate(self.stream.take(0, PROBE_PROMPTS), self.probe_sampling, seed=0)


def assemble(recipe: Recipe, world: World = ALONE) -> Parts:
    """Build every part of a run; of one of several ranks, its own.

    Raises:
        ConfigError, ModelError: what is wrong, all problems of the data together.
    """
    pair = load_pair(recipe)
    objective = recipe.objective.build()
    sampling = Sampling(
        stop_ids=pair.end_tokens.stop_ids + _single_ids(recipe.sampling.stop, pair.tokenizer, "sampling.stop"),
        **recipe.sampling.model_dump(exclude={"stop"}),
    )
    asking = _asking(recipe, sampling, world)
    if recipe.rollout.engine == "vllm":
        if world.size > 1 and recipe.rollout.vllm.url is None:
            raise ConfigError(
                f"rollout.engine vllm in the trainer's own process is for one process, got {world.size}; start a vLLM server "
                "and set rollout.vllm.url, or use hf"
            )
        check_sampling(sampling, "sampling")
        check_sampling(asking.sampling, "evaluation")
    prompts, problems = load_data(recipe, pair, sampling)
    tied = tied_names(pair.student)
    sharded = recipe.train.sharding == "fsdp" and world.size > 1
    apart = recipe.student.lora or recipe.rollout.max_staleness or sharded
    twin = Replica(pair.student, pair.precision) if apart and recipe.rollout.engine == "hf" else None
    student = Student(
        pair.student,
        pair.tokenizer,
        recipe.optimizer,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
        steps=recipe.train.steps,
        precision=pair.precision,
        gradient_checkpointing=recipe.student.gradient_checkpointing,
        lora=recipe.student.lora,
        seed=recipe.train.seed,
        world=world,
        sharded=sharded,
    )
    each = {name: scorer(name, recipe, pair, world) for name in pair.teachers}
    teacher = judge_of(recipe, pair, each)
    check_serves(objective, teacher)
    rollout = recipe.rollout
    samples = (
        _Sampled(pair.student, None) if twin is None else _Sampled(twin.model, partial(twin.update, student.weights))
    )
    teacher_engines = _engines(recipe, pair, samples, 1.0, "teacher")
    if rollout.engine == "vllm":
        longest = _longest(prompts, sampling, problems, asking)
        student_engine: Sampler = vllm_sampler(recipe, pair, student.weights, tied, longest=longest, world=world)
    else:
        student_engine = _sampler(samples, [], recipe, pair, "student")
    engines: dict[Source, RolloutEngine] = {
        "student": student_engine,
        "golden": GoldenEngine(),
    }
    if teacher_engines:
        engines["teacher"] = _for_each_prompt(teacher_engines)
    if rollout.teacher_mixing:
        engines["student"] = _for_each_prompt(_engines(recipe, pair, samples, rollout.teacher_mixing, "mixture"))
    return Parts(
        pair=pair,
        student=student,
        teacher=teacher,
        teachers=each,
        engine=SharedEngine(SourceEngine(engines, dict(rollout.sources.items())), world.apart()),
        student_engine=student_engine,
        teacher_engines=teacher_engines,
        objective=objective,
        reference=_reference(recipe, pair) if objective.needs_of_reference != "nothing" else None,
        how=MicroBatches(
            tokens=recipe.train.tokens_per_micro_batch,
            masked_end_ids=pair.end_tokens.masked_ids,
            masked_ids=_single_ids(recipe.objective.masked_tokens, pair.tokenizer, "objective.masked_tokens"),
            importance_cap=rollout.importance_cap if rollout.importance == "token" else None,
            rollouts_tell=sampling.is_plain and rollout.engine == "hf",  # it computes in the student's precision
        ),
        stream=PromptStream(prompts, seed=recipe.train.seed),
        sampling=sampling,
        problems=problems,
        asking=asking,
        data_fingerprint=fingerprint(prompts),
    )


class _Sampled(NamedTuple):
    """What is sampled from as the student, and what brings it up to date with the one that is trained."""

    model: PreTrainedModel
    on_update: Callable[[int], None] | None


def _engines(recipe: Recipe, pair: ModelPair, student: _Sampled, share: float, source: Source) -> dict[str, HFEngine]:
    """For each judge whose models are here, an engine that samples from its mixture with the student.

    Args:
        share: of the judge in that mixture.
    """
    engines = {}
    for name, shares in recipe.judges.items():
        judges = [
            (model, share * own)
            for member, own in shares.items()
            if (model := pair.teachers[member].model) is not None and recipe.named_teachers[member].can_sample
        ]
        if len(judges) < len(shares):
            continue
        first = student if share < 1 else _Sampled(judges.pop(0)[0], None)
        engines[name] = _sampler(first, judges, recipe, pair, source)
    return engines


def _sampler(
    first: _Sampled, mixed_in: Sequence[tuple[PreTrainedModel, float]], recipe: Recipe, pair: ModelPair, source: Source
) -> HFEngine:
    return HFEngine(
        first.model,
        vocab_size=pair.vocab_size,
        pad_id=pair.pad_id,
        precision=pair.precision,
        sequences_per_batch=recipe.rollout.sequences_per_batch,
        source=source,
        mixed_in=mixed_in,
        end_ids=pair.end_tokens.merged_ids,
        on_update=first.on_update,
    )


def _for_each_prompt(engines: Mapping[str, RolloutEngine]) -> RolloutEngine:
    return RoutedEngine(engines) if len(engines) > 1 else next(iter(engines.values()))


def _asking(recipe: Recipe, sampling: Sampling, world: World) -> Asking:
    asked = recipe.evaluation
    return Asking(
        Sampling(
            stop_ids=sampling.stop_ids,
            max_new_tokens=asked.max_new_tokens or sampling.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            samples_per_prompt=asked.samples,
        ),
        seed=asked.seed,
        problems_per_call=max(1, world.size * recipe.rollout.sequences_per_batch // asked.samples),
    )


def _longest(prompts: Sequence[Prompt], sampling: Sampling, problems: Sequence[Problems], asking: Asking) -> int:
    """Tokens of the longest prompt with its longest answer, in training and evaluation."""
    asked = [(prompts, max(sampling.max_new_tokens, PROBE_TOKENS))]
    asked += [(each.prompts, asking.sampling.max_new_tokens) for each in problems]
    return max(len(prompt.prompt_ids) + budget for each, budget in asked for prompt in each)


def load_data(recipe: Recipe, pair: ModelPair, sampling: Sampling) -> tuple[list[Prompt], list[Problems]]:
    """Training prompts, and the problems of the evaluation.

    Raises:
        ConfigError: all problems of all data sets together.
    """
    complaints: list[str] = []

    def load(config: DataConfig, key: str, max_new_tokens: int, seed: int) -> list[Prompt]:
        try:
            return load_prompts(
                config,
                pair.templating,
                end_id=pair.end_tokens.student[0],
                max_prompt_tokens=pair.context - max_new_tokens,
                seed=seed,
                key=key,
            )
        except ConfigError as error:
            complaints.append(str(error))
            return []

    wants_golden = {
        "rollout.sources has golden": "golden" in recipe.rollout.sources,
        "objective.golden is above 0": recipe.objective.build().golden_weight > 0,
    }
    prompts: list[Prompt] = []
    for place, (key, section) in enumerate(recipe.data_sections.items()):
        found = load(section, key, sampling.max_new_tokens, recipe.train.seed)
        if any(prompt.golden_ids is None for prompt in found):
            complaints += [
                f"{setting}, but the prompts have no worked answers; set {key}.golden to the column that holds them"
                for setting, wanted in wants_golden.items()
                if wanted
            ]
        prefix = f"{place}/" if len(recipe.data_sections) > 1 else ""
        prompts += [replace(prompt, id=f"{prefix}{prompt.id}", teacher=section.teacher) for prompt in found]
    asked = recipe.evaluation
    problems = []
    if asked.data is not None:
        if asked.data.answer is None:
            complaints.append("evaluation.data.answer: an evaluation needs the column with reference answers")
        name = Path(asked.data.path).stem if asked.data.path else asked.data.split
        found = load(asked.data, "evaluation.data", asked.max_new_tokens or sampling.max_new_tokens, asked.seed)
        problems.append((name, found, name, 1))
    first = next(iter(recipe.data_sections.values()))
    for name in asked.benchmarks:
        try:
            entry = benchmark(name)
            data = entry.data(
                Path(asked.folder) if asked.folder else None,
                chat=first.chat,
                system=first.system,
                enable_thinking=first.enable_thinking,
            )
        except ConfigError as error:
            complaints.append(f"evaluation.benchmarks: {error}")
            continue
        found = load(data, f"evaluation.benchmarks {name}", asked.max_new_tokens or sampling.max_new_tokens, asked.seed)
        problems.append((name, found, entry.title, entry.version))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return prompts, [Problems(*each) for each in problems]


def _reference(recipe: Recipe, pair: ModelPair) -> HFTeacher:
    """The student as it was before the first step, also in a run that is resumed."""
    return local_scorer(load_configured(recipe.student, pair.precision), pair, least_tokens_per_batch(recipe))


def _single_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, key: str) -> tuple[int, ...]:
    ids = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ConfigError(f"{key}: {text!r} is {len(encoded)} tokens; only single tokens can be named here")
        ids += encoded
    return tuple(ids)
