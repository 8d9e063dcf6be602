"""How answers are drawn, and by what."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from poweropd.recipes import check_sum, flow
from poweropd.sections.section import NonNegative, Positive, Section, Share


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
