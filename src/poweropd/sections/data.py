"""Where prompts come from, and what the student is measured on."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from poweropd.sections.section import NonNegative, Positive, Section, Share


class DataConfig(Section):
    source: Literal["hub", "jsonl", "parquet", "reasoning_gym"]
    """Where rows come from."""
    path: str | None = None
    """Hub id or file; not for `reasoning_gym`."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set; for `reasoning_gym`, `train` or `held_out`."""
    prompt: str = "problem"
    """Column with the question."""
    answer: str | None = "answer"
    """Column with the reference answer, for grading; null where there is none."""
    golden: str | None = None
    """Column with a whole worked answer, for objectives on golden answers."""
    families: dict[str, dict[str, Any]] = {}
    """`reasoning_gym` generators and their settings."""
    limit: Positive | None = None
    """Use this many rows at most; required for `reasoning_gym`."""
    expected_rows: Positive | None = None
    """Refuse the source if it has another number of rows."""
    template: str = "{prompt}"
    """The user message; `{prompt}` becomes the question."""
    system: str | None = None
    """System message."""
    chat: bool = True
    """Apply the chat template; false gives the bare text."""
    enable_thinking: bool | None = None
    """Thinking mode, for chat templates that have one; null leaves the template's default."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt; by default what the context leaves beside `max_new_tokens`."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer prompts."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "reasoning_gym":
            if not self.families or self.limit is None:
                raise ValueError("source reasoning_gym needs families (generator name: settings) and limit")
            if self.expected_rows is not None:
                raise ValueError(
                    "expected_rows is for sets of a known size; source reasoning_gym goes on for ever, use limit"
                )
            if self.split not in ("train", "held_out"):
                raise ValueError(f"split of reasoning_gym is train or held_out, not {self.split!r}")
        elif self.path is None:
            raise ValueError(f"source {self.source} needs path: a {'Hub id' if self.source == 'hub' else 'file'}")
        if "{prompt}" not in self.template:
            raise ValueError(f"template needs {{prompt}} in it, got {self.template!r}")
        return self


class TrainingDataConfig(DataConfig):
    teacher: str | None = None
    """Which of `teachers` judges the answers to these prompts."""


class EvaluationConfig(Section):
    """What the student is measured on before and after training, and between; nothing where there are neither `data` nor
    `benchmarks`."""

    data: DataConfig | None = None
    """Problems with reference answers."""
    benchmarks: list[str] = []
    """Names of `poweropd evaluate --help`, such as math500; asked in the chat format of the training prompts."""
    folder: str | None = None
    """Where benchmarks lie as `<name>.jsonl`; those that do not come from the Hub."""
    every: NonNegative = 0
    """Evaluate every so many steps; 0: only before and after training."""
    subset: Positive | None = None
    """Between, ask this many problems of each set only, always the same ones; before and after training all are asked."""
    samples: Positive = 8
    """Samples per problem, the k of Avg@k and Pass@k."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Sampling temperature of the evaluation."""
    top_p: Share = 1.0
    """Keep the most likely tokens that hold this much probability."""
    max_new_tokens: Positive | None = None
    """By default that of `sampling`."""
    seed: NonNegative = 0
    """Of the samples, and of generated problems: runs that differ in `train.seed` are asked the same."""
    grading: Literal["math", "exact"] = "math"
    """Compare answers as values (math-verify), or as text alone."""
    teacher: bool = True
    """Evaluate the teacher too, once, before training."""
    cache: str | None = None
    """Folder of finished evaluations: one of the same weights, problems and settings is taken from there."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"evaluation.temperature 0 is greedy: its {self.samples} samples of a problem would all be the same; set "
                "evaluation.samples: 1, or a temperature above 0"
            )
        return self
