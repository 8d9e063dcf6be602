"""Our objectives inside TRL: `PowerOPDTrainer` and `PowerOPDConfig` in the place of `DistillationTrainer` and its config.

What changes is the loss: any objective of `poweropd objectives` that looks at one token or one position at a time, from
the same table, by the same fused pass. Generation, data, logging, checkpoints and launchers stay TRL's. Written for TRL
1.16, whose `_compute_loss` and `_get_last_hidden_state` this overrides and calls; they are private, so the version is checked.
"""

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationConfig, DistillationTrainer

from poweropd.models import lm_head
from poweropd.objectives import Objective, build
from poweropd.objectives.fused import token_scores
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.objectives.loss import loss_of
from poweropd.objectives.positions import TokenInputs
from poweropd.objectives.sweeps import LossTerms
from poweropd.vocabulary import end_token_ids, real_vocab_size

TESTED = "1.16"


@dataclass
class PowerOPDConfig(DistillationConfig):  # type: ignore[misc]
    """`DistillationConfig` with an objective in the place of `beta`.

    Args:
        objective: a name of `poweropd objectives`, or `module:attribute` of your own.
        objective_settings: its settings, such as `{"alpha": 5}`; those left out have the table's defaults.
        end_token: "map": where the models end an answer by different tokens, either ends one and counts as the same
            outcome; "keep": they are different tokens.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DistillationConfig._VALID_DICT_FIELDS, "objective_settings"]

    objective: str = field(default="power", metadata={"help": "Name of a row of `poweropd objectives`."})
    objective_settings: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the objective, such as {"alpha": 5}.'}
    )
    end_token: str = field(
        default="map", metadata={"help": "Whether different end tokens of the models count as one: map or keep."}
    )

    def build_objective(self) -> Objective:
        """Raises ValueError: an unknown name or setting, or an objective that TRL's loop cannot serve; says what to do."""
        settings = self.objective_settings or {}
        if isinstance(settings, str):
            raise ValueError(
                f"objective_settings: {settings!r} is not a JSON object; give one such as '{{\"alpha\": 5}}'"
            )
        objective = build(self.objective, **settings)
        reasons = {
            "rewards of the whole step at once": objective.needs_whole_step,
            "the frozen initial student": objective.needs_of_reference != "nothing",
            "golden answers": objective.row.on_golden_answers or objective.golden_weight > 0,
        }
        for what, is_needed in reasons.items():
            if is_needed:
                raise ValueError(
                    f"objective {objective} needs {what}, which TRL's loop does not give; `poweropd train` does"
                )
        return objective


class PowerOPDTrainer(DistillationTrainer):  # type: ignore[misc]
    """`DistillationTrainer` that descends an objective of ours. Both models must share a tokenizer.

    Logs, beside what TRL logs, means over trained tokens: `opd/signal` (the advantage or the exact divergence),
    `opd/log_ratio` (log p_teacher - log p_student of the sampled token) and `opd/teacher_entropy`.

    Raises:
        ValueError: see `PowerOPDConfig.build_objective`; a temperature other than 1, no teacher, or models with images.
        ImportError: another TRL than the one this was written for.
    """

    eos_token_ids: list[int]

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel | None" = None,
        args: PowerOPDConfig | None = None,
        **named: Any,
    ) -> None:
        found = version("trl")
        if not found.startswith(f"{TESTED}."):
            raise ImportError(
                f"poweropd.integrations.trl is written for TRL {TESTED}.x, this is {found}; pip install 'trl~={TESTED}.0'"
            )
        args = args if args is not None else PowerOPDConfig("PowerOPD")
        if not isinstance(args, PowerOPDConfig):
            raise ValueError(f"args is a {type(args).__name__}; PowerOPDTrainer takes a PowerOPDConfig")
        if args.temperature != 1.0:
            raise ValueError(
                f"temperature is {args.temperature}; objectives compare the models' own distributions, so set 1.0"
            )
        if args.end_token not in ("map", "keep"):
            raise ValueError(f"end_token is {args.end_token!r}; map and keep are accepted")
        if teacher_model is None:
            raise ValueError("teacher_model is missing; give a model or the name of one")
        self.objective = args.build_objective()
        super().__init__(model=model, teacher_model=teacher_model, args=args, **named)
        if self._is_vlm:
            raise ValueError("the models take images; PowerOPDTrainer is for language models")
        self._set_vocabulary(args)

    def _set_vocabulary(self, args: PowerOPDConfig) -> None:
        """The tokens both models have, and those that end an answer of either."""
        student, teacher = (self.accelerator.unwrap_model(own) for own in (self.model, self.teacher_model))
        tokenizer: PreTrainedTokenizerBase = self._tokenizer
        rows = min(own.get_output_embeddings().weight.shape[0] for own in (student, teacher))
        self._vocab_size = real_vocab_size(tokenizer, rows)
        self._end_ids: tuple[int, ...] = ()
        if args.end_token == "map":
            ends = (*self.eos_token_ids, *end_token_ids(teacher, tokenizer))
            self._end_ids = tuple(dict.fromkeys(id for id in ends if id < self._vocab_size))
            if args.use_vllm and set(self._end_ids) != set(self.eos_token_ids):
                raise ValueError(
                    f"end tokens differ: {self.eos_token_ids} of the student, {list(self._end_ids)} of both, and vLLM is "
                    "started by TRL with the student's; set end_token=keep, or give both models the same"
                )
            # What ends an answer must end generation too. TRL keeps these ids in three places.
            self.eos_token_ids = list(self._end_ids)
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _head_of(self, model: PreTrainedModel) -> LMHead:
        return lm_head(model, vocab_size=self._vocab_size, end_ids=self._end_ids)

    def _compute_loss(
        self, unwrapped_student: PreTrainedModel, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        is_trained = mask.bool()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        where = (ids, attended, ids.shape[1] - inputs["prompt_ids"].shape[1])

        hidden = self._get_last_hidden_state(unwrapped_student, *where)[is_trained]
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():  # through the teacher's own wrapper, so that sharded parameters are there
            of_teacher = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, *where
            )[is_trained]

        objective = self.objective.at(self.state.global_step / max(self.state.max_steps, 1))
        terms = loss_of(
            objective,
            hidden,
            self._head_of(unwrapped_student),
            self._judged(objective, inputs["completion_ids"][is_trained], of_teacher, self._head_of(teacher)),
            denominator=max(1.0, float(num_items_in_batch if num_items_in_batch is not None else is_trained.sum())),
        )
        self._log_terms(terms)
        return terms.loss, terms.entropies.sum(), is_trained.sum()

    @staticmethod
    def _judged(objective: Objective, target_ids: Tensor, hidden: Tensor, head: LMHead) -> TokenInputs:
        """The tokens with what the objective needs of the teacher."""
        if objective.needs == "full":
            return TokenInputs(target_ids, teacher=Distribution((hidden,), (head,)))
        scores = token_scores(hidden, head, target_ids, k=objective.k if objective.needs == "top_k" else 0)
        known = TokenInputs(target_ids, scores.logprobs, scores.entropies, top1_ids=scores.top1_ids)
        if objective.needs == "top_k":
            return replace(known, top_ids=scores.top_ids, top_logprobs=scores.top_logprobs)
        return known

    def _log_terms(self, terms: LossTerms) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        columns = {
            "opd/signal": terms.advantages + terms.divergences,
            "opd/log_ratio": terms.teacher_logprobs - terms.logprobs,
            "opd/teacher_entropy": terms.teacher_entropies,
        }
        means = torch.stack([column.mean() for column in columns.values()]).tolist()
        for key, mean in zip(columns, means, strict=True):
            metrics[key].append(mean)
