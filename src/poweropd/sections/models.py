"""The models: the student and its teachers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from poweropd.sections.section import Positive, Section, Share


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
