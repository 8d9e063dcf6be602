"""Our objectives inside the real TRL. `make test-all` runs this in the environment of TRL; elsewhere it is skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not here: `make test-trl` runs these in an environment of its own")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from conftest import ROOT
from poweropd.integrations.trl import PowerOPDConfig, PowerOPDTrainer
from poweropd.objectives import build
from poweropd.policy import Student
from poweropd.sections import OptimizerConfig
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.types import Prompt, Rollout
from poweropd.update import MicroBatches, accumulate_gradient

STUDENT, TEACHER = (ROOT / "src" / "poweropd" / "quickstart" / "models" / role for role in ("student", "teacher"))
PROMPTS = [
    [{"role": "user", "content": f"What is {n} + {n + 3}?"}] for n in range(32)
]  # four steps: TRL resumes to the bit within an epoch
COMMON: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "max_completion_length": 12, "learning_rate": 1e-3, "report_to": "none",
    "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "seed": 3,
}  # fmt: skip


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def trainer(
    out: Path, kind: type = PowerOPDTrainer, config: type = PowerOPDConfig, **settings: Any
) -> DistillationTrainer:
    return kind(
        model=load(STUDENT),
        teacher_model=load(TEACHER),
        args=config(output_dir=str(out), **{**COMMON, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(STUDENT),
    )


def batch(own: DistillationTrainer, lengths: tuple[int, ...] = (3, 9, 1)) -> dict[str, Tensor]:
    """Left-padded prompts and right-padded completions of uneven length."""
    torch.manual_seed(5)
    prompts, width = (4, 2, 7), max(lengths)
    ids = torch.randint(5, 60, (3, 7)), torch.randint(5, 60, (3, width))
    places = torch.arange(7), torch.arange(width)
    masks = [places[0] >= 7 - length for length in prompts], [places[1] < length for length in lengths]
    prompt_mask, completion_mask = (torch.stack(rows).long() for rows in masks)
    return {
        "prompt_ids": ids[0] * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": ids[1] * completion_mask, "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum(),
    }  # fmt: skip


def gradient(own: DistillationTrainer, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    own.model.train()
    own.model.zero_grad()
    loss = own.compute_loss(own.model, inputs)
    loss.backward()
    named = own.model.named_parameters()
    return loss.item(), {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def close(grad: Tensor, expected: Tensor) -> bool:
    """Up to fp32 sums in another order, by the largest entry."""
    return bool((grad - expected).abs().max() <= 1e-4 * expected.abs().max())


def test_exact_reverse_kl_is_that_of_trl(tmp_path: Path) -> None:
    theirs = trainer(tmp_path, DistillationTrainer, DistillationConfig, beta=1.0)
    ours = trainer(tmp_path, objective="reverse_kl", end_token="keep")
    inputs = batch(ours)
    (loss, grads), (expected, expected_grads) = gradient(ours, inputs), gradient(theirs, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert close(grad, expected_grads[name]), name


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("power", {"alpha": 5}),
        ("log_ratio", None),
        ("jensen_shannon", None),
        ("reverse_kl", {"estimator": "top_k", "k": 8}),
    ],
)
def test_loss_and_gradient_are_those_of_our_own_loop(
    tmp_path: Path, objective: str, settings: dict[str, Any] | None
) -> None:
    own = trainer(tmp_path, objective=objective, objective_settings=settings)
    inputs = batch(own)
    loss, grads = gradient(own, inputs)
    rollouts = []
    for row in range(3):
        asked, answer = (
            inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        unknown = (torch.nan,) * len(answer)
        rollouts.append(Rollout(Prompt(str(row), tuple(asked.tolist())), tuple(answer.tolist()), unknown, "length"))
    goal, ends = build(objective, **(settings or {})), own._end_ids
    student = Student(
        load(STUDENT),
        own.processing_class,
        OptimizerConfig(lr=1e-3),
        vocab_size=own._vocab_size,
        end_ids=ends,
        steps=10,
    )
    teacher = HFTeacher(load(TEACHER), vocab_size=own._vocab_size, end_ids=ends)
    result = accumulate_gradient(student, judge(rollouts, goal, teacher), goal, MicroBatches(tokens=4096))
    assert result.num_loss_tokens == inputs["num_items_in_batch"]
    assert loss == pytest.approx(result.loss, rel=1e-5)
    for name, parameter in student.model.named_parameters():
        if parameter.grad is not None:
            assert close(grads[name], parameter.grad), name


def test_the_students_and_the_teachers_end_tokens_end_an_answer(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    tokens = own.processing_class
    ends = set(tokens.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert set(own._end_ids) == set(own.eos_token_ids) == set(own.generation_config.eos_token_id) == ends
    assert trainer(tmp_path, end_token="keep")._end_ids == ()


def test_trains_logs_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    assert all({"opd/signal", "opd/log_ratio", "entropy"} <= set(entry) for entry in whole.state.log_history[:4])
    first = trainer(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer(tmp_path / "cut", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    start = load(STUDENT).state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert any(not torch.equal(weight, start[name]) for name, weight in whole.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "pwoer"}, "pwoer"),
        ({"objective_settings": {"alhpa": 5}}, "alhpa"),
        ({"objective": "zscore"}, "whole step at once, which TRL's loop does not give"),
        ({"objective": "stable_opd"}, "frozen initial student"),
        ({"objective": "sft"}, "golden answers"),
        ({"temperature": 0.7}, "temperature is 0.7"),
        ({"end_token": "mask"}, "map and keep are accepted"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_another_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poweropd.integrations.trl.version", lambda package: "1.17.0")
    with pytest.raises(ImportError, match=r"TRL 1\.16\.x, this is 1\.17\.0"):
        trainer(tmp_path)
