"""Shared by all tests. Passive waiting and one thread: tests must not depend on what else the machine does."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from poweropd.models import load_tokenizer
from poweropd.policy import Student
from poweropd.sections import OptimizerConfig
from poweropd.types import Prompt, Rollout

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SHARED = ROOT.parent / "shared"
END = 0  # <|endoftext|> of the embedded tokenizer
CHAT_END = 2  # <|im_end|>

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder a user stands in with modules of their own; no later test finds those already imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if tmp_path in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """That of the embedded pair: 512 tokens."""
    return load_tokenizer("quickstart:student")


def make_model(hidden_size: int = 16, rows: int = 512, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A random Qwen3 of two layers, sharp enough that its log-probabilities differ."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
        eos_token_id=END,
        **settings,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def make_student(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Student]:
    def build(model: PreTrainedModel | None = None, end_ids: tuple[int, ...] = (), **settings: object) -> Student:
        return Student(
            model or make_model(),
            tokenizer,
            OptimizerConfig(lr=1e-3),
            vocab_size=512,
            end_ids=end_ids,
            steps=10,
            **settings,
        )

    return build


def make_rollouts(lengths: list[tuple[int, int]], *, stop: bool = True, vocabulary: int = 512) -> list[Rollout]:
    """Rollouts of random tokens, by (prompt length, response length); the last token is the end token if `stop`."""
    rollouts = []
    for index, (prompt_length, response_length) in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (prompt_length + response_length,)).tolist()
        if stop:
            ids[-1] = END
        prompt = Prompt(f"p{index}", tuple(ids[:prompt_length]), text=f"question {index}", answer="1")
        response = tuple(ids[prompt_length:])
        logprobs = tuple((-torch.rand(response_length)).tolist())
        rollouts.append(Rollout(prompt, response, logprobs, "stop" if stop else "length"))
    return rollouts
