"""Recipes: defaults in one place, every problem told at once, unknown keys refused."""

from pathlib import Path

import pytest
import yaml

from conftest import RECIPE, ROOT
from poweropd.config import Recipe, load_recipe, parse_recipe
from poweropd.errors import ConfigError
from poweropd.recipes import section_in
from poweropd.rollout.sources import off_policy_notes

BARE = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"source": "jsonl", "path": "x.jsonl"},
}


def with_values(**sections: object) -> dict:
    return {**BARE, **sections}


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (with_values(train={"step": 3}), ["train.step: unknown key; did you mean 'steps'?"]),
        (with_values(trian={}), ["trian: unknown key; did you mean 'train'?"]),
        (with_values(objective={"name": "power", "alfa": 1}), ["objective.alfa: power has no such setting; did you mean 'alpha'?"]),
        (with_values(objective={"name": "power", "alpha": 0}), ["objective.alpha: 0 is outside (0, inf)"]),
        (with_values(objective={"name": "powr"}), ["objective.name: unknown objective 'powr'; did you mean 'power'?"]),
        (with_values(objective={"end_token": "drop"}), ["objective.end_token: input should be 'map', 'mask' or 'keep', got 'drop'"]),
        (with_values(train={"steps": "many"}), ["train.steps: input should be a valid integer"]),
        (with_values(train={"steps": 0}), ["train.steps: input should be greater than 0, got 0"]),
        (with_values(sampling={"top_p": 1.5}), ["sampling.top_p: input should be less than or equal to 1, got 1.5"]),
        (with_values(data={"source": "jsonl"}), ["data: source jsonl needs path: a file"]),
        (with_values(data={"source": "reasoning_gym"}), ["data: source reasoning_gym needs families"]),
        (with_values(data={"source": "jsonl", "path": "x", "template": "Solve"}), ["data: template needs {prompt} in it, got 'Solve'"]),
        (with_values(objective={"name": "sft"}), ["objective.name sft trains on golden answers alone: it needs rollout.sources {golden: 1}, got {student: 1}"]),
        (with_values(objective={"name": "sft"}, rollout={"sources": {"student": 0.5, "golden": 0.5}}), ["objective.name sft trains on golden answers alone"]),
        (with_values(rollout={"engine": "golden"}), ["rollout.engine: input should be 'hf' or 'vllm', got 'golden'"]),
        (with_values(rollout={"sources": {"student": 0.5, "golden": 0.4}}), ["rollout.sources: the probabilities must sum to 1, got {student: 0.5, golden: 0.4}, which sum to 0.9; give"]),
        (with_values(rollout={"sources": {"student": 0.5, "golden": 0.500002}}), ["rollout.sources: the probabilities must sum to 1, got {student: 0.5, golden: 0.500002}, which sum to 1.000002"]),
        (with_values(rollout={"sources": {}}), ["rollout.sources: the probabilities must sum to 1, got {}, which sum to 0"]),
        (with_values(rollout={"sources": {"student": 1, "golden": 0}}), ["rollout.sources.golden: input should be greater than 0, got 0"]),
        (with_values(rollout={"sources": {"student": float("nan")}}), ["rollout.sources.student: input should be less than or equal to 1, got nan"]),
        (with_values(rollout={"sources": {"taecher": 1}}), ["rollout.sources.taecher: input should be 'student', 'teacher' or 'golden', got 'taecher'"]),
        (with_values(rollout={"teacher_mixing": 1}), ["rollout.teacher_mixing: input should be less than 1, got 1"]),
        (with_values(rollout={"teacher_mixing": 0.2, "sources": {"golden": 1}}), ["rollout.teacher_mixing 0.2 mixes the teacher into the student's rollouts, but rollout.sources is {golden: 1}; give"]),
        (with_values(rollout={"importance": "none"}), ["rollout.importance: none does nothing: it weighs the sampled rewards of off-policy rollouts"]),
        (with_values(rollout={"importance_cap": 2, "sources": {"teacher": 1}}, objective={"name": "reverse_kl"}), ["rollout.importance_cap: 2.0 does nothing"]),
        (with_values(rollout={"sources": {"golden": 1}}, sampling={"samples_per_prompt": 2}, objective={"name": "power", "baseline": "leave_one_out"}), ["objective.baseline leave_one_out compares the rollouts of one prompt, and rollout.sources {golden: 1}"]),
        (with_values(guard=None), ["guard: a section of settings is needed, got None; leave it out for its defaults"]),
        (with_values(rollout={"importance_cap": 0}), ["rollout.importance_cap: input should be greater than 0, got 0"]),
        ({"data": BARE["data"]}, ["student: missing, and it has no default", "teacher: missing"]),
        (
            with_values(train={"step": 3, "seed": -1}, sampling={"temprature": 1}),
            ["train.step: unknown key", "train.seed: input should be greater than or equal to 0, got -1", "sampling.temprature: unknown key; did you mean 'temperature'?"],
        ),
    ],
)  # fmt: skip
def test_every_problem_is_told_in_one_line(values: dict, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(values)
    told = str(error.value).splitlines()
    assert len(told) == len(lines)
    for line in lines:
        assert any(got.startswith(line) for got in told), (line, told)


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = load_recipe(RECIPE)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_overrides() -> None:
    recipe = load_recipe(RECIPE, ["train.steps=20", "objective.alpha=1", "optimizer.lr=1e-4", "sampling.stop=[a, b]"])
    assert load_recipe(RECIPE, ["objective.alpha=1e-3"]).objective.build().shown == {"alpha": 0.001}  # text in YAML 1.1
    assert recipe.train.steps == 20
    assert recipe.objective.build().shown == {"alpha": 1.0}
    assert recipe.optimizer.lr == 1e-4
    assert recipe.sampling.stop == ["a", "b"]


def test_another_objective_does_not_inherit_the_settings_of_the_recipes_own() -> None:
    assert load_recipe(RECIPE, ["objective.name=reverse_kl"]).objective.build().shown == {}
    same = load_recipe(RECIPE, ["objective.name=power", "objective.alpha=3"])
    assert same.objective.build().shown == {"alpha": 3.0}


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1", "train.stepz=3"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(RECIPE, [override])


def test_extends_merges_sections(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(with_values(train={"steps": 3, "seed": 1})))
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {steps: 9}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.train.steps, recipe.train.seed) == (9, 1)


def test_sources_are_one_value(tmp_path: Path) -> None:
    """Half of one distribution and half of another would not be a distribution."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(with_values(rollout={"sources": {"teacher": 1}})))
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nrollout: {sources: {student: 0.4, golden: 0.6}}\n")
    assert load_recipe(tmp_path / "mine.yaml").rollout.sources == {"student": 0.4, "golden": 0.6}
    alone = load_recipe(tmp_path / "mine.yaml", ["rollout.sources={golden: 1}", "objective.name=sft"])
    assert alone.rollout.sources == {"golden": 1}


def test_shares_that_sum_to_one_but_for_rounding_are_accepted() -> None:
    thirds = {"student": 1 / 3, "teacher": 1 / 3, "golden": 0.3333333}
    assert parse_recipe(with_values(rollout={"sources": thirds})).rollout.sources == thirds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: loop.yaml", "comes back to itself"),
        ("extends: absent.yaml", "cannot read recipe"),
        ("- a\n- b", "holds a list"),
        ("a: [", "not valid YAML"),
        ("", "holds a NoneType"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def all_recipes() -> list[Path]:
    return sorted(
        path for path in (ROOT / "recipes").rglob("*.yaml") if path.name[0] != "_" and path.parent.name != "verl"
    )


@pytest.mark.parametrize("path", all_recipes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


def test_every_setting_says_what_it_means() -> None:
    def undocumented(section: type, prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            inner = section_in(field.annotation)
            if inner is not None:
                found += undocumented(inner, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert set(undocumented(Recipe, "")) <= {"optimizer.betas", "optimizer.eps", "optimizer.weight_decay"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], []),
        (["rollout.sources={golden: 1}", "objective.name=sft"], []),
        (["rollout.sources={golden: 1}"], ["the prefixes of golden", "nobody sampled"]),
        (["rollout.sources={golden: 1}", "objective.name=reverse_kl"], ["the prefixes of golden"]),
        (["rollout.teacher_mixing=0.2"], ["the prefixes of student with 0.2 of the teacher"]),
        (["rollout.max_staleness=1"], ["the prefixes of a student up to 1 step old"]),
        (["rollout.sources={teacher: 1}", "rollout.importance=none"], ["the prefixes of teacher", "not weighted"]),
        (["rollout.sources={golden: 1}", "objective={name: reverse_kl, estimator: top_k}"], ["the prefixes of golden"]),
        (
            ["rollout.sources={golden: 1}", "objective={name: reverse_kl, estimator: top_k, tail: sample}"],
            ["the prefixes of golden", "nobody sampled"],  # the tail's reward is that of a sampled token
        ),
    ],
)
def test_what_is_not_corrected_is_said(settings: list[str], said: list[str]) -> None:
    recipe = load_recipe(RECIPE, settings)
    notes = off_policy_notes(recipe.rollout, recipe.objective.build())
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_a_recipe_that_extends_another_may_name_another_objective(tmp_path: Path) -> None:
    path = tmp_path / "child.yaml"
    path.write_text(f"extends: {RECIPE}\nobjective: {{name: tanh, tau: 2}}\n")
    assert load_recipe(path).objective.build().shown == {"tau": 2.0}
    path.write_text(f"extends: {RECIPE}\nobjective: reverse_kl\n")
    assert load_recipe(path).objective.build().shown == {}
    path.write_text(f"extends: {RECIPE}\nobjective: {{alpha: 3}}\n")
    assert load_recipe(path).objective.build().shown == {"alpha": 3.0}
