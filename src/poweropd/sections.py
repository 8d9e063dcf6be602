"""The sections of a recipe: every setting, its default, its range and its meaning, in one place."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from poweropd import objectives
from poweropd.recipes import check_sum, flow

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, so that a misspelt one never passes in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoRAConfig(Section):
    """Low-rank adapters, arXiv 2106.09685: the student's own weights stay as they are."""

    rank: Positive = 32
    """Of the adapters' matrices."""
    alpha: Positive = 64
    """Adapters count `alpha / rank` times."""
    rank_stabilized: bool = False
    """Count them `alpha / sqrt(rank)` times, arXiv 2312.03732."""
    modules: list[str] = []
    """Layers that have one, such as q_proj; empty: all linear layers but the LM head."""


class StudentConfig(Section):
    model: str
    """Hub id, local folder, or `quickstart:student`."""
    revision: str | None = None
    """Hub revision."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matmuls; weights and optimizer stay fp32. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoRAConfig | None = None
    """Train adapters alone, such as `{rank: 32}`; null trains every weight. Wants a learning rate about ten times as high."""


class TeacherConfig(Section):
    model: str
    """Hub id, local folder, or `quickstart:teacher`."""
    revision: str | None = None
    """Hub revision."""
    engine: Literal["hf", "served", "vllm"] = "hf"
    """What scores: `hf`, transformers in this process; `served`, `poweropd serve-teacher` at `url`; `vllm`, a vLLM server at
    `url`. Of a teacher at a `url`, only tokenizer and config of `model` are read here, no weights."""
    url: str | None = None
    """Where the server is, such as `http://10.0.0.2:8100`."""
    token_env: str | None = None
    """The environment variable that holds the server's token."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest silence of the server, in seconds, before a request is repeated."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time a request may take with all its repetitions, in seconds; then the run saves a checkpoint and stops."""
    verify: bool = False
    """Compare the server with a forward of `model` here before the first step; loads its weights for that time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of its weights. `auto`: bfloat16 on a GPU, float32 on a CPU. For `vllm`: what the server was started with,
    which decides how closely its scores must agree; a served teacher tells its own."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Weights in 8 or 4 bits (bitsandbytes), on a GPU alone; the LM head stays as it is."""
    offload: bool = False
    """Keep its layers in main memory, and bring each to the GPU when it is its turn."""
    cache: str | None = None
    """Folder of scores, taken from there when the same teacher is asked for the same text again."""
    tokens_per_batch: Positive = 16384
    """Tokens scored in one forward pass, or one request; padding counts too for models that cannot do without, such as
    those with sliding windows."""
    sharding: Literal["none", "fsdp"] = "none"
    """Of several processes. `none`: each has the whole teacher. `fsdp`: its layers are spread over them; it then scores, but
    cannot sample."""
    weight: Share | None = None
    """Its share of the mixture of all `teachers`; they sum to 1."""

    @property
    def is_local(self) -> bool:
        return self.engine == "hf"

    @property
    def can_sample(self) -> bool:
        """Whether it is here as a whole."""
        return self.is_local and self.sharding == "none"

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        if self.is_local:
            if self.url is not None:
                raise ValueError(f"url {self.url} is for a server; set engine: served or vllm, or leave out url")
            if self.token_env is not None or self.verify:
                raise ValueError(
                    "token_env and verify are for a teacher at a url; leave them out, or give engine and url"
                )
        elif self.url is None:
            raise ValueError(f"engine {self.engine} needs url: where its server is, such as http://127.0.0.1:8100")
        elif self.quantization != "none" or self.offload or (self.engine == "served" and self.precision != "auto"):
            raise ValueError(
                f"precision, quantization and offload of engine {self.engine} are its server's matter; leave them out here"
            )
        if self.sharding == "fsdp" and (not self.is_local or self.quantization != "none" or self.offload or self.cache):
            raise ValueError(
                "sharding: fsdp spreads a teacher's weights over processes, which score together; leave out engine, "
                "quantization, offload and cache"
            )
        if self.quantization != "none" and self.offload:
            raise ValueError("quantization and offload do not go together; choose one")
        return self


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


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Keep the most likely tokens that hold this much probability."""
    top_k: NonNegative = 0
    """Keep this many tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    max_new_tokens: Positive = 1024
    """Longest response; one that reaches it is truncated."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt."""
    stop: list[str] = []
    """Further tokens that end a response, beside the end tokens of student and teacher."""


class VLLMConfig(Section):
    """vLLM, in this process or as a server, where `rollout.engine` is `vllm`."""

    max_model_len: Positive | None = None
    """Longest prompt with its answer; null: what data and sampling need."""
    gpu_memory_utilization: Share = 0.4
    """Share of a GPU's memory that vLLM takes, weights included; of main memory on a CPU. The trainer needs the rest."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB of keys and values, in the place of `gpu_memory_utilization`."""
    tensor_parallel_size: Positive = 1
    """GPUs that the student is split over."""
    enforce_eager: bool = False
    """Do without CUDA graphs and compilation: starts sooner, samples slower."""
    sleep: bool = False
    """Give the GPU memory back while the student is trained; the weights wait in main memory."""
    url: str | None = None
    """A vLLM server that samples in the place of this process, such as `http://10.0.0.2:8000`; the settings above are then
    those it was started with."""
    token_env: str | None = None
    """The environment variable that holds the server's `--api-key`."""
    weights_folder: str | None = None
    """Folder through which the server gets the student's weights, seen under this name on both machines; null: a temporary
    one, for a server on this machine."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest silence of the server, in seconds, before a request is repeated; an answer comes as a whole."""
    deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    """Longest time a request may take with all its repetitions, in seconds; then the run stops."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        remote = ("token_env", "weights_folder", "timeout_s", "deadline_s")
        local = (
            "gpu_memory_utilization",
            "kv_cache_gib",
            "tensor_parallel_size",
            "enforce_eager",
            "sleep",
            "max_model_len",
        )
        useless = local if self.url else remote
        for name in useless:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                where = (
                    "is for vLLM in this process, and there is a url"
                    if self.url
                    else "is for a server, and there is no url"
                )
                raise ValueError(f"{name} {value} {where}; leave out one of the two")
        return self


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"
    """What samples from the student: `hf`, transformers in this process; `vllm`, see `vllm`. The teacher always samples by
    `hf`."""
    vllm: VLLMConfig = VLLMConfig()
    """Of engine `vllm`."""
    sequences_per_batch: Positive = 64
    """Sequences decoded together."""
    sources: dict[Literal["student", "teacher", "golden"], Share] = {"student": 1.0}
    """Probability that a prompt of a step is answered by each; they sum to 1. `golden`: by the data's worked answer, one
    whatever `samples_per_prompt` is. GKD's lambda (arXiv 2306.13649) is `{student: lambda, golden: 1 - lambda}`."""
    teacher_mixing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """m: the student's rollouts are drawn token by token from `(1 - m) q + m p`. MiniLLM (arXiv 2306.08543): 0.2."""
    max_staleness: NonNegative = 0
    """s > 0: the rollouts of the next s steps are drawn while this one trains, so they are 1 to s optimizer steps old when
    they are trained on; 1 is one-step-off. The student is sampled from a copy. 0: every step waits for its own."""
    importance: Literal["token", "none"] = "token"
    """Rollouts of the teacher, of the mixture and of an older student are off-policy. `token`: each sampled reward is
    weighted by `min(q / sampling probability, importance_cap)`, detached. `none`: nothing corrects them. Rollouts of the
    student as it is have weight 1; so have golden answers, which no one sampled: their prefixes remain the data's."""
    importance_cap: Annotated[float, Field(gt=0)] = 5.0
    """Largest weight of a sampled reward."""

    @field_validator("sources")
    @classmethod
    def _sources_sum_to_one(cls, sources: dict[str, float]) -> dict[str, float]:
        advice = "give every prompt a source, for example {student: 0.5, golden: 0.5}"
        check_sum("the probabilities", sources, advice)
        return sources

    @model_validator(mode="after")
    def _vllm_samples_from_the_student_alone(self) -> Self:
        if self.engine == "hf":
            if self.vllm != VLLMConfig():
                raise ValueError(
                    "rollout.vllm does nothing while rollout.engine is hf; set engine: vllm, or leave it out"
                )
        elif self.teacher_mixing > 0 or "student" not in self.sources:
            raise ValueError(
                f"rollout.engine vllm samples from the student alone, got sources {flow(self.sources)} and teacher_mixing "
                f"{self.teacher_mixing:g}; give student a share and set teacher_mixing: 0, or engine: hf"
            )
        return self

    @model_validator(mode="after")
    def _mixing_has_a_student(self) -> Self:
        if self.teacher_mixing > 0 and "student" not in self.sources:
            raise ValueError(
                f"rollout.teacher_mixing {self.teacher_mixing:g} mixes the teacher into the student's rollouts, but "
                f"rollout.sources is {flow(self.sources)}; give student a share there, or set teacher_mixing to 0"
            )
        return self


class ObjectiveConfig(BaseModel):
    """`name`, `end_token`, and the settings of that row of the objective table."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "power"
    """A row of `poweropd objectives`."""
    end_token: Literal["map", "mask", "keep"] = "map"
    """Where student and teacher end answers differently: `map` counts all end tokens as one outcome, `mask` trains on
    none, `keep` scores them as they stand."""
    masked_tokens: list[str] = []
    """Tokens that are never trained on, wherever they stand, such as `<think>`; each a single token."""

    @model_validator(mode="after")
    def _settings_exist(self) -> Self:
        self.build()
        return self

    def build(self) -> objectives.Objective:
        return objectives.build(self.name, **(self.model_extra or {}))


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip the global gradient norm to this."""
    warmup_steps: NonNegative = 0
    """Linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at the last step."""


class TrainConfig(Section):
    steps: Positive = 500
    """Optimizer steps."""
    prompts_per_step: Positive = 32
    """Prompts of one optimizer step."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens in one forward and backward pass; the gradient does not depend on it. Padding counts too for models that
    cannot do without, such as those with sliding windows."""
    seed: NonNegative = 0
    """Decides data order and every sample."""
    sharding: Literal["none", "fsdp"] = "none"
    """Of several processes, see `torchrun`. `none`: each has the whole student. `fsdp`: weights, gradients and optimizer
    state are spread over them, and each samples from a copy in the precision of matmuls."""
    threads: Positive | None = None
    """CPU threads; null leaves the choice to torch. Tiny models are faster with one."""


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


class CheckpointConfig(Section):
    every: Positive = 50
    """Steps between checkpoints; the last step always has one."""
    keep: Positive = 2
    """How many of the newest to keep."""


class GuardConfig(Section):
    """What to do when answers grow to the budget or go round in circles: the collapse of StableOPD, arXiv 2604.08527."""

    truncation: Share | None = 0.9
    """Largest share of rollouts that reach `max_new_tokens`; null: any."""
    repetition: Share | None = 0.3
    """Largest share of rollouts that end in repetition; null: any."""
    patience: Positive = 5
    """Consecutive steps above a limit that count as a collapse. A limit holds once the student has kept it for as many
    steps, or from the start if the untrained student is a quarter below it."""
    action: Literal["warn", "stop", "raise_reference_kl"] = "warn"
    """`warn`: say so. `stop`: save a checkpoint and stop. `raise_reference_kl`: double the weight of the KL to the
    reference, again after every `patience` steps for as long as it lasts."""


class LogConfig(Section):
    rollouts_every: Positive = 10
    """Steps between entries of rollouts.jsonl, positions.jsonl and distributions.jsonl."""
    rollouts: NonNegative = 4
    """Rollouts written each time."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics and evaluations go too; each is a package to install. A run is called as its directory."""
    project: str = "poweropd"
    """Project of Weights & Biases and trackio."""
