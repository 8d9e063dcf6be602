"""The teachers of a run, from its recipe: here or behind a server, with a cache, mixed or each for its own prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from poweropd.config import Recipe, label
from poweropd.distributed import ALONE, World
from poweropd.errors import TeacherError
from poweropd.models import DTYPES, default_device, load_model, weights_fingerprint
from poweropd.pair import ModelPair, TeacherModel
from poweropd.sections import TeacherConfig
from poweropd.teacher.cache import CachedTeacher
from poweropd.teacher.client import ServedTeacher
from poweropd.teacher.ensemble import MixtureTeacher, RoutedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.http import Connection, token_from
from poweropd.teacher.probe import Findings, probe, refuse_unreliable
from poweropd.teacher.scorer import TeacherScorer
from poweropd.types import Rollout


def scorer(name: str, recipe: Recipe, pair: ModelPair, world: World = ALONE) -> TeacherScorer:
    """One teacher, alone and without its cache; to be spread over ranks, if the recipe says so.

    Raises:
        ConfigError, ModelError, TeacherError: its server cannot be used, or serves another model.
    """
    config, teacher = recipe.named_teachers[name], pair.teachers[name]
    if teacher.model is not None:
        return local_scorer(teacher.model, pair, config.tokens_per_batch, world if config.sharding == "fsdp" else ALONE)
    token = token_from(config.token_env, "teacher.token_env")
    ends = pair.end_tokens.merged_ids
    if config.engine == "vllm":
        from poweropd.teacher.vllm import VLLMTeacher

        return VLLMTeacher(
            str(config.url),
            model=config.model,
            vocab_size=pair.vocab_size,
            end_ids=ends,
            tokenizer=teacher.tokenizer,
            head_rows=teacher.head_rows,
            token=token,
            **config.model_dump(include={"timeout_s", "deadline_s", "tokens_per_batch"}),
        )
    served = ServedTeacher(
        Connection(str(config.url), token=token, timeout_s=config.timeout_s, deadline_s=config.deadline_s),
        vocab_size=pair.vocab_size,
        end_ids=ends,
        tokens_per_batch=config.tokens_per_batch,
        device=pair.student.device,
    )
    served.refuse_other_model(
        config.model,
        teacher.tokenizer,
        head_rows=teacher.head_rows,
        end_ids=teacher.end_ids,
        context=teacher.context,
        parameters=teacher.parameters,
    )
    return served


def local_scorer(model: PreTrainedModel, pair: ModelPair, tokens_per_batch: int, world: World = ALONE) -> HFTeacher:
    return HFTeacher(
        model,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
        tokens_per_batch=tokens_per_batch,
        world=world,
    )


def judge_of(recipe: Recipe, pair: ModelPair, teachers: Mapping[str, TeacherScorer]) -> TeacherScorer:
    """Who judges, of the teachers by name."""
    configs = recipe.named_teachers

    def mixture(shares: Mapping[str, float]) -> TeacherScorer:
        members = [_with_cache(teachers[name], configs[name], pair.teachers[name], pair) for name in shares]
        if len(members) == 1:
            return members[0]
        return MixtureTeacher(members, list(shares.values()), tokens_per_batch=least_tokens_per_batch(recipe))

    judges = {name: mixture(shares) for name, shares in recipe.judges.items()}
    return RoutedTeacher(judges) if len(judges) > 1 else next(iter(judges.values()))


def least_tokens_per_batch(recipe: Recipe) -> int:
    return min(config.tokens_per_batch for config in recipe.named_teachers.values())


def _with_cache(scores: TeacherScorer, config: TeacherConfig, teacher: TeacherModel, pair: ModelPair) -> TeacherScorer:
    if config.cache is None:
        return scores
    if teacher.model is not None:
        fingerprint = weights_fingerprint(teacher.model)
    elif isinstance(scores, ServedTeacher):
        fingerprint = scores.info.weights
    else:  # vLLM does not tell its weights: what the recipe says must do
        fingerprint = f"{config.engine} {config.model} {config.revision} {config.precision}"
    return CachedTeacher(
        scores,
        Path(config.cache),
        fingerprint=fingerprint,
        vocab_size=pair.vocab_size,
        end_ids=pair.end_tokens.merged_ids,
    )


def examine(
    name: str, recipe: Recipe, pair: ModelPair, teacher: TeacherScorer, rollouts: Sequence[Rollout]
) -> Findings:
    """Whether the scores of one teacher can be relied on; see `probe`.

    Raises:
        ModelError: `verify` is set, and its model cannot be loaded here.
    """
    config, model = recipe.named_teachers[name], pair.teachers[name].model
    if model is not None:
        dtype = model.dtype
    elif isinstance(teacher, ServedTeacher):
        dtype = DTYPES.get(teacher.info.dtype, torch.bfloat16)
    else:
        dtype = DTYPES.get(config.precision, torch.bfloat16)
    local = None
    if config.verify:
        loaded = load_model(config.model, dtype=dtype, device=default_device(), revision=config.revision)
        local = local_scorer(loaded, pair, config.tokens_per_batch)
    return probe(
        teacher, rollouts, exact=dtype == torch.float32, batches_with_others=config.engine == "vllm", local=local
    )


def examine_remote(
    recipe: Recipe, pair: ModelPair, teachers: Mapping[str, TeacherScorer], sample: Callable[[], Sequence[Rollout]]
) -> Iterator[str]:
    """What is found of every teacher behind a server, in words.

    Args:
        sample: gives the rollouts to examine them by.

    Raises:
        TeacherError: one of them cannot be relied on.
    """
    for name, teacher in pair.teachers.items():
        if teacher.model is None:
            findings = examine(name, recipe, pair, teachers[name], sample())
            refuse_unreliable(label(name), findings)
            yield f"{label(name)} at {teacher.url}: {findings}"


class SameTeachers:
    """That a run goes on with the teachers that it had: kept with it, for those that tell their weights from afar."""

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        self._weights = {name: each.info.weights for name, each in teachers.items() if isinstance(each, ServedTeacher)}

    def state(self) -> dict[str, str]:
        """Fingerprints by name."""
        return self._weights

    def load_state(self, state: Mapping[str, str]) -> None:
        """Raises TeacherError if a run that goes on would be judged by others than before."""
        for name, weights in self._weights.items():
            if state.get(name, weights) != weights:
                raise TeacherError(
                    f"{label(name)} has other weights ({weights}) than before this run stopped ({state[name]}); serve the "
                    "same model again, or start a new run"
                )
