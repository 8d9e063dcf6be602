"""Our objectives inside the real verl. `make test-all` runs this in the environment of verl; elsewhere it is skipped."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("verl", reason="verl is not here: `make test-verl` runs these in an environment of its own")

from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY, distillation_loss, distillation_ppo_loss
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.config import DistillationConfig
from verl.workers.utils.padding import left_right_2_no_padding

from conftest import ROOT
from poweropd.errors import ConfigError
from poweropd.integrations.verl.check import PLUGIN, TESTED, check
from poweropd.integrations.verl.losses import LOSS_MODES, NOT_SERVED, objective_of, token_losses
from poweropd.objectives import OBJECTIVES, Objective, build
from poweropd.objectives.lm_head import LMHead
from poweropd.objectives.loss import loss_of
from poweropd.objectives.positions import TokenInputs
from poweropd.policy import Student
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.scorer import judge
from poweropd.types import Prompt, Rollout
from poweropd.update import MicroBatches, accumulate_gradient

RECIPES = ROOT / "recipes" / "verl"
STUDENT = ROOT / "src" / "poweropd" / "quickstart" / "models" / "student"
NAMES = sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))
LENGTHS = ((3, 5), (1, 2), (4, 1))  # of prompts and responses
TOKENS, WIDTH, VOCABULARY = sum(map(sum, LENGTHS)), 8, 12
STOCK = "verl.workers.config.DistillationLossConfig"
Configs = Callable[..., tuple[Any, DistillationConfig]]


def composed(*overrides: str, name: str = "2-gpus") -> DictConfig:
    """A recipe of ours over verl's own configuration."""
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(name, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])


@pytest.fixture(scope="session")
def recipe() -> DictConfig:
    return composed()


@pytest.fixture
def configs(recipe: DictConfig) -> Callable[..., tuple[Any, DistillationConfig]]:
    """Makes verl's configurations of an actor and of distillation, some settings of the loss changed."""

    def make(**settings: Any) -> tuple[Any, DistillationConfig]:
        changed = copy.deepcopy(recipe)
        with open_dict(changed.distillation.distillation_loss) as loss:
            loss.update(settings)
            if "PowerOPD" not in loss._target_:
                del loss.objective_settings
        return omega_conf_to_dataclass(changed.actor_rollout_ref.actor), omega_conf_to_dataclass(changed.distillation)

    return make


def in_fresh_process(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


class Batch:
    """Three rollouts as verl hands them to a loss, and as our own loop has them; the last is longest in its prompt."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
        self.ids = torch.randint(VOCABULARY, (TOKENS,))
        self.sizes = torch.tensor([prompt + response for prompt, response in LENGTHS])
        self.follows = torch.cat([torch.arange(TOKENS)[1:], torch.tensor([0])])  # verl: place t speaks of token t + 1
        self.teacher_logprobs = (self.student_logprobs().detach() + 0.8 * torch.randn(TOKENS)).clamp(max=-1e-3)
        ends = self.sizes.cumsum(0).tolist()
        spans = zip(LENGTHS, ends, strict=True)
        self.trained = torch.cat([torch.arange(end - response - 1, end - 1) for (_, response), end in spans])

    def student_logprobs(self) -> Tensor:
        logprobs = (self.hidden @ self.weight.T).log_softmax(-1)
        return logprobs.gather(1, self.ids[self.follows, None])[:, 0]

    def nested(self, values: Tensor, sizes: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(values.split(sizes.tolist())), layout=torch.jagged)

    def of_verl(
        self, layout: str = "nested", old_logprobs: Tensor | None = None
    ) -> tuple[dict[str, Tensor], TensorDict]:
        """The model's output and the data, in the form of the current trainer or in the padded one of the older."""
        logprobs = self.student_logprobs()
        output = {"log_probs": self.nested(logprobs, self.sizes)}
        old = (logprobs.detach() if old_logprobs is None else old_logprobs)[self.trained]
        prompts, responses = (torch.tensor(lengths) for lengths in zip(*LENGTHS, strict=True))
        rows = {
            "old_log_probs": self.nested(old, responses),
            "advantages": self.nested(torch.zeros_like(old), responses),
            "response_mask": self.nested(torch.ones_like(old).long(), responses),
            "responses": self.nested(self.ids[self.trained + 1], responses),
        }
        if layout == "nested":
            in_prompt = torch.ones(TOKENS, dtype=torch.bool)
            in_prompt[self.trained + 1] = False
            data = TensorDict(rows, batch_size=len(LENGTHS))
            data["prompts"] = self.nested(self.ids[in_prompt], prompts)
            data["teacher_logprobs"] = self.nested(self.teacher_logprobs[:, None], self.sizes)
        else:
            data = TensorDict({key: row.to_padded_tensor(0) for key, row in rows.items()}, batch_size=len(LENGTHS))
            wide, widest = int(prompts.max()), int(responses.max())
            places = torch.arange(wide + widest)
            attended = (places >= wide - prompts[:, None]) & (places < wide + responses[:, None])
            data["attention_mask"] = attended.long()
            data["prompts"] = torch.zeros(len(LENGTHS), wide, dtype=torch.long)
            data["input_ids"] = data["position_ids"] = torch.zeros_like(attended).long()
            for key in ("teacher_logprobs", "teacher_ids"):
                padded = self.teacher_logprobs.new_zeros(*attended.shape, 1)
                padded[attended] = self.teacher_logprobs[:, None]
                data[key] = padded
            data = left_right_2_no_padding(data)
        assign_non_tensor(data, dp_size=1, batch_num_tokens=len(self.trained), global_batch_size=3)
        return output, data

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = torch.autograd.grad(loss, [self.hidden, self.weight])
        return hidden, weight

    def ours(self, objective: Objective) -> tuple[float, tuple[Tensor, Tensor]]:
        """The mean advantage, and the gradients of our own loss."""
        known = TokenInputs(self.ids[self.trained + 1], self.teacher_logprobs[self.trained])
        head = LMHead(self.weight, VOCABULARY)
        terms = loss_of(objective, self.hidden[self.trained], head, known, denominator=len(self.trained))
        return terms.advantages.mean().item(), self.gradients(terms.loss)


def close(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-6) -> bool:
    """By the largest entry."""
    return all((f - e).abs().max() <= tolerance * e.abs().max() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("update", ["policy gradient", "loss"])
@pytest.mark.parametrize("mode", LOSS_MODES)
def test_every_loss_has_the_gradient_of_our_own_loop(configs: Configs, mode: str, update: str) -> None:
    actor, distillation = configs(loss_mode=mode, use_policy_gradient=update == "policy gradient")
    batch = Batch()
    objective = objective_of(distillation.distillation_loss)
    assert (objective.name, objective.estimator) == (LOSS_MODES[mode], "sampled")
    signal, expected = batch.ours(objective)
    loss, metrics = distillation_loss(actor, distillation, *batch.of_verl())
    assert close(batch.gradients(loss), expected)
    assert metrics["opd/signal"].aggregate() == pytest.approx(signal, rel=1e-5)
    assert loss.item() == pytest.approx(-signal, rel=1e-5)


@pytest.mark.parametrize("update", ["policy gradient", "loss"])
@pytest.mark.parametrize("layout", ["nested", "padded"])
def test_the_whole_loss_of_an_actor_is_ours_in_both_layouts_and_over_micro_batches(
    configs: Configs, layout: str, update: str
) -> None:
    actor, distillation = configs(use_policy_gradient=update == "policy gradient")
    batch = Batch()
    _, expected = batch.ours(objective_of(distillation.distillation_loss))
    loss, _ = distillation_ppo_loss(actor, distillation, *batch.of_verl(layout))
    assert close(batch.gradients(loss), expected)
    output, data = batch.of_verl(layout)
    assign_non_tensor(data, batch_num_tokens=2 * len(batch.trained))  # as one of two equal micro-batches
    half, _ = distillation_ppo_loss(actor, distillation, output, data)
    assert close(batch.gradients(half), (expected[0] / 2, expected[1] / 2))


def test_a_step_of_verls_own_actor_on_two_processes_has_our_gradient(
    tmp_path: Path, make_student: Callable[..., Student]
) -> None:
    """Its FSDP2 engine, each process with half the rollouts in two micro-batches of its own."""
    torch.manual_seed(5)
    rollouts = []
    for row, lengths in enumerate(((4, 3), (2, 9), (7, 1), (3, 5))):
        prompt, response = (tuple(torch.randint(5, 512, (length,)).tolist()) for length in lengths)
        rollouts.append(Rollout(Prompt(str(row), prompt), response, (torch.nan,) * len(response), "length"))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(STUDENT.with_name(role), dtype=torch.float32)
        for role in ("student", "teacher")
    )
    goal = build("power", alpha=0.5)
    scored = judge(rollouts, goal, HFTeacher(teacher, vocab_size=512))
    given = [
        {
            "prompt": torch.tensor(each.rollout.prompt.prompt_ids),
            "response": torch.tensor(each.rollout.response_ids),
            "teacher_logprobs": each.scores.logprobs,
        }
        for each in scored
    ]
    torch.save(given, tmp_path / "rollouts.pt")
    command = [sys.executable, str(Path(__file__).with_name("verl_actor.py")), str(tmp_path)]
    actors = [subprocess.Popen([*command, str(rank), "2"], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        told = [actor.communicate(timeout=300)[1] for actor in actors]
    finally:
        for actor in actors:
            actor.kill()
    assert [actor.returncode for actor in actors] == [0, 0], told
    gradient = torch.load(tmp_path / "gradient.pt")

    accumulate_gradient(make_student(student), scored, goal, MicroBatches(tokens=4096))
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert gradient.keys() == expected.keys()
    assert close(gradient.values(), [expected[name] for name in gradient], tolerance=1e-4)


def test_settings_arrive(configs: Configs) -> None:
    def asked(**settings: Any) -> str:
        return str(objective_of(configs(**settings)[1].distillation_loss))

    assert asked() == "power alpha=5"
    assert asked(objective_settings={"alpha": 0.5}) == "power alpha=0.5"
    assert asked(loss_mode="poweropd", objective="forward_kl", objective_settings={"ratio_limit": 3}) == (
        "forward_kl estimator=sampled ratio_limit=3"
    )
    assert asked(_target_=STOCK, loss_mode="poweropd_tanh") == "tanh tau=5"  # the table's default, without any of ours


def test_an_objective_of_ones_own_is_a_loss_too(configs: Configs, own_folder: Path) -> None:
    (own_folder / "mine.py").write_text(
        "from poweropd.objectives import from_derivative\nroot = from_derivative(lambda x: x.sqrt())\n"
    )
    actor, distillation = configs(loss_mode="poweropd", objective="mine:root")
    batch = Batch()
    losses, _ = token_losses(actor, distillation, *batch.of_verl())
    p, q = batch.teacher_logprobs[batch.trained].exp(), batch.student_logprobs().detach()[batch.trained].exp()
    assert torch.allclose(-losses[losses != 0].detach(), p.sqrt() - q.sqrt(), atol=1e-6)


def test_metrics_are_means_over_trained_tokens(configs: Configs) -> None:
    batch = Batch()
    old = batch.student_logprobs().detach() - 0.25
    _, metrics = token_losses(*configs(), *batch.of_verl(old_logprobs=old))
    log_ratios = (batch.teacher_logprobs - batch.student_logprobs().detach())[batch.trained]
    assert metrics["opd/log_ratio"].aggregate() == pytest.approx(log_ratios.mean().item(), rel=1e-5)
    last = log_ratios[torch.tensor([4, 6, 7])]
    assert metrics["opd/last_log_ratio"].aggregate() == pytest.approx(last.mean().item(), rel=1e-5)
    assert metrics["opd/mismatch"].aggregate() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_mode": "poweropd"}, "takes its objective from distillation_loss.objective, which is not set"),
        ({"loss_mode": "poweropd", "objective": "pwoer"}, "did you mean 'power'"),
        ({"objective": "forward_kl"}, "objective is 'forward_kl', but loss_mode poweropd_power is 'power'"),
        ({"objective_settings": {"alhpa": 5}}, "did you mean 'alpha'"),
        ({"objective_settings": {"alpha": -1}}, "-1 is outside"),
        ({"objective_settings": {"normalize": "zscore"}}, "the whole step: a loss sees one micro-batch"),
        ({"objective_settings": {"baseline": "exact"}}, "more of the teacher than its log-probability"),
        ({"objective_settings": {"estimator": "full"}}, "more of the teacher than its log-probability"),
        ({"objective_settings": {"reference_kl": 0.01}}, "the frozen initial student"),
        ({"objective_settings": {"golden": 0.1}}, "golden answers"),
        ({"loss_mode": "k3"}, "loss_mode is 'k3', none of ours"),
        ({"loss_max_clamp": 10}, "loss_max_clamp is 10: it would clip the advantages"),
        ({"log_prob_min_clamp": -10}, "log_prob_min_clamp is -10: it would do nothing"),
        ({"policy_loss_mode": "cispo"}, "Only vanilla policy loss"),
    ],
)
def test_what_does_not_fit_is_refused_at_start_with_the_reason(
    configs: Configs, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InstantiationException) as error:
        configs(**settings)
    assert message in str(error.value)


def test_a_loss_that_verl_would_clip_is_refused_with_its_own_configuration_too(configs: Configs) -> None:
    with pytest.raises(ValueError, match="would clip the advantages"):
        distillation_loss(*configs(_target_=STOCK, loss_max_clamp=10), *Batch().of_verl())


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([1.0, 0.7, 1.0])])
def test_a_temperature_other_than_one_is_refused(configs: Configs, temperature: float | Tensor) -> None:
    output, data = Batch().of_verl()
    assign_non_tensor(data, temperature=temperature)
    with pytest.raises(ValueError, match=r"set actor_rollout_ref\.rollout\.temperature=1\.0"):
        distillation_loss(*configs(), output, data)


def test_tokens_that_the_teacher_did_not_score_are_refused(configs: Configs) -> None:
    batch = Batch()
    batch.teacher_logprobs[batch.trained[2]] = torch.nan
    with pytest.raises(ValueError, match="no log-probability of 1 of 8 sampled tokens"):
        distillation_loss(*configs(), *batch.of_verl())


def test_every_objective_is_served_or_has_a_reason() -> None:
    assert {*LOSS_MODES.values(), *NOT_SERVED} == set(OBJECTIVES)
    assert NOT_SERVED["zscore"] == "the rewards of the whole step: a loss sees one micro-batch"
    assert set(check()) == {"poweropd", *LOSS_MODES}
    assert all(DISTILLATION_LOSS_REGISTRY[mode] is token_losses for mode in LOSS_MODES)


def test_a_fresh_process_that_imports_verl_has_the_losses() -> None:
    seen = in_fresh_process(
        "-c", "import verl.trainer.distillation.losses as l; print('poweropd_power' in l.DISTILLATION_LOSS_REGISTRY)"
    )
    assert seen.stdout.strip() == "True", seen.stderr
    told = in_fresh_process("-m", "poweropd.integrations.verl", VERL_USE_EXTERNAL_MODULES=PLUGIN)
    assert told.returncode == 0, told.stderr
    assert "  poweropd_power\n" in told.stdout
    assert "zscore          the rewards of the whole step" in told.stdout


def test_a_plugin_that_verl_passed_over_is_told_with_the_reason() -> None:
    told = in_fresh_process("-m", "poweropd.integrations.verl", VERL_USE_EXTERNAL_PLUGINS="none")
    assert told.returncode == 1
    assert told.stderr.strip().splitlines()[-1] == (
        "error: verl 0.9.1 did not load our losses: VERL_USE_EXTERNAL_PLUGINS is 'none'; unset it, or name poweropd in it"
    )


def test_another_verl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("verl") == TESTED
    monkeypatch.setattr("poweropd.integrations.verl.check.version", lambda package: "0.10.0")
    with pytest.raises(ConfigError, match=r"written for verl 0\.9\.1, this is 0\.10\.0"):
        check()


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_configurations_of_verl(name: str) -> None:
    config = composed(name=name)
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    distillation = omega_conf_to_dataclass(config.distillation)
    gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    teachers = distillation.teacher_models["default"].world_size
    assert gpus + teachers == int(name.split("-")[0])
    split = actor.engine.get("tensor_model_parallel_size", 1) * actor.engine.get("pipeline_model_parallel_size", 1)
    assert actor.ppo_mini_batch_size == config.data.train_batch_size  # one update a batch
    assert config.data.train_batch_size % (gpus // split) == 0
    assert gpus % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0
    assert str(objective_of(distillation.distillation_loss)) == "power alpha=5"
    assert (actor.loss_agg_mode, config.actor_rollout_ref.rollout.temperature) == ("token-mean", 1.0)


def test_the_command_of_the_guide_reaches_verls_trainer() -> None:
    """As far as one without a GPU: the trainer's own entry point composes the recipe and prints it."""
    shown = in_fresh_process(
        "-m", "verl.trainer.main_ppo", "--config-dir=recipes/verl", "--config-name=8-gpus", "data.train_files=train.parquet",
        "+distillation.distillation_loss.objective_settings.alpha=2", "--cfg=job", "--package=distillation",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    settings = yaml.safe_load(shown.stdout)
    assert settings["distillation_loss"]["objective_settings"] == {"alpha": 2}
    assert settings["distillation_loss"]["loss_mode"] == "poweropd_power"
