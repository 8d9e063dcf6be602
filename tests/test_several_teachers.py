"""A teacher for each data set, or a mixture: from the recipe to the finished run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from conftest import CHAT_END, END, RECIPE
from poweropd.assembly import assemble
from poweropd.cli import app
from poweropd.config import Recipe, load_recipe, parse_recipe
from poweropd.errors import ConfigError, ModelError
from poweropd.models import resolve
from poweropd.report.runs import read_run
from poweropd.report.tables import results_table
from poweropd.report.verdict import headline
from poweropd.teacher.ensemble import MixtureTeacher, RoutedTeacher
from poweropd.types import Source

DATA = {"source": "jsonl", "path": "x.jsonl"}
BY_DATA = {"math": {"model": "quickstart:teacher"}, "base": {"model": "quickstart:student"}}
MIXED = {"math": {"model": "quickstart:teacher", "weight": 0.7}, "base": {"model": "quickstart:student", "weight": 0.3}}


def values(teachers: object, *data: dict, **sections: object) -> dict:
    listed = [{**DATA, **section} for section in data]
    return {"student": {"model": "s"}, "teachers": teachers, "data": listed if len(data) > 1 else listed[0], **sections}


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (values(BY_DATA, {}), "data.teacher: missing; name the one of math, base that judges the answers to these prompts, or give every teacher a weight"),
        (values(BY_DATA, {"teacher": "math"}, {}), "data.1.teacher: missing; name the one of math, base"),
        (values(BY_DATA, {"teacher": "math"}, {"teacher": "bass"}), "data.1.teacher: unknown teacher 'bass'; did you mean 'base'?"),
        (values(BY_DATA, {"teacher": "math"}), "teachers.base: judges nothing; name it in a section of data, or leave it out"),
        (values(MIXED, {"teacher": "math"}), "data.teacher: got 'math', but teachers with weights judge together; leave it out"),
        (values({**MIXED, "third": {"model": "t"}}, {}), "teachers.third.weight: missing, where others have one ({math: 0.7, base: 0.3}); weigh all or none"),
        (values({**MIXED, "third": {"model": "t", "weight": 0.1}}, {}), "teachers: the weights must sum to 1, got {math: 0.7, base: 0.3, third: 0.1}, which sum to 1.1"),
        (values({"a": {"model": "t", "weight": 0}}, {}), "teachers.a.weight: input should be greater than 0, got 0"),
        (values({"a": {"modle": "t", "model": "t"}}, {}), "teachers.a.modle: unknown key; did you mean 'model'?"),
        (values({"a/b": {"model": "t"}}, {}), "teachers.a/b: string should match pattern"),
        (values({}, {}), "teacher: missing, and it has no default; name one teacher, or several under teachers"),
        (values(MIXED, {}, teacher={"model": "t"}), "teacher: a recipe has one teacher or several, got teacher and teachers (math, base); leave out one, or set teacher: null"),
        (values({}, {"teacher": "math"}, teacher={"model": "t"}), "data.teacher: unknown teacher 'math'; known here: teacher"),
        (values(MIXED, {}, {"limt": 3}), "data.1.limt: unknown key; did you mean 'limit'?"),
        (values(MIXED, {}, {"path": None}), "data.1: source jsonl needs path: a file"),
        ({**values(MIXED, {}), "data": []}, "data: list should have at least 1 item"),
        (values(MIXED, {}, evaluation={"data": {**DATA, "teacher": "math"}}), "evaluation.data.teacher: unknown key"),
    ],
)  # fmt: skip
def test_it_must_be_clear_who_judges_what(recipe: dict, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_who_judges() -> None:
    one = parse_recipe({"student": {"model": "s"}, "teacher": {"model": "t"}, "data": DATA})
    assert (one.judges, list(one.named_teachers), list(one.data_sections)) == (
        {"teacher": {"teacher": 1.0}},
        ["teacher"],
        ["data"],
    )
    named = parse_recipe(values({"math": {"model": "t"}}, {}, {"teacher": "math"}))
    assert named.judges == {"teacher": {"math": 1.0}}
    assert parse_recipe(values(MIXED, {})).judges == {"teacher": {"math": 0.7, "base": 0.3}}
    by_data = parse_recipe(values(BY_DATA, {"teacher": "math"}, {"teacher": "base"}))
    assert by_data.judges == {"math": {"math": 1.0}, "base": {"base": 1.0}}
    assert list(by_data.data_sections) == ["data.0", "data.1"]
    for recipe in (one, named, by_data):
        assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_recipe_written_out_when_there_was_one_teacher_alone_still_loads(tmp_path: Path) -> None:
    old = load_recipe(RECIPE).model_dump(mode="json")
    del old["teachers"], old["teacher"]["weight"], old["data"]["teacher"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(RECIPE)
    other = load_recipe(tmp_path / "recipe.yaml", ["teacher.model=other", "data.limit=7"])
    assert (other.named_teachers["teacher"].model, other.data_sections["data"].limit) == ("other", 7)


def test_overrides_name_a_place_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(BY_DATA, {"teacher": "math"}, {"teacher": "base"})))
    recipe = load_recipe(path, ["data.1.limit=3", "teachers.base.precision=float32"])
    assert [section.limit for section in recipe.data_sections.values()] == [None, 3]
    assert recipe.named_teachers["base"].precision == "float32"
    for setting in ("data.limit=3", "data.2.limit=3"):
        with pytest.raises(ConfigError, match=r"data is a list of 2; say which, for example data\.0\."):
            load_recipe(path, [setting])


def test_extends_replaces_teachers_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values(MIXED, {})))
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nteachers: {alone: {model: t}}\n")
    assert list(load_recipe(tmp_path / "mine.yaml").named_teachers) == ["alone"]
    (tmp_path / "one.yaml").write_text("extends: base.yaml\nteachers: {}\nteacher: {model: t}\n")
    assert list(load_recipe(tmp_path / "one.yaml").named_teachers) == ["teacher"]


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("teachers:\n  a: {model: one}\n  a: {model: two}\n")
    with pytest.raises(ConfigError, match=r"is not valid YAML: 'a' is given twice in .* line 3") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def rows(path: Path, question: str) -> str:
    lines = [{"problem": question.format(n), "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}"} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write(folder: Path, teachers: dict, *, named: bool) -> Path:
    """The quickstart with these teachers, and two data sets that name them or not."""
    sections = [
        {"source": "jsonl", "path": rows(folder / f"{name}.jsonl", question), "golden": "solution"}
        | ({"teacher": name} if named else {})
        for name, question in (("math", "What is {} + 1?"), ("base", "Add 1 to {}."))
    ]
    evaluation = {"limit": 4, **sections[0]}
    evaluation.pop("teacher", None)
    recipe = {
        "extends": str(RECIPE),
        "teacher": None,
        "teachers": teachers,
        "data": sections,
        "sampling": {"max_new_tokens": 12},
        "train": {"steps": 2, "prompts_per_step": 6},
        "optimizer": {"schedule": "constant"},
        "evaluation": {"data": {**evaluation, "prompt": "problem"}, "samples": 1, "every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


SETUPS = {"by data": (BY_DATA, True), "mixture": (MIXED, False)}


@pytest.fixture(params=SETUPS)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    teachers, named = SETUPS[request.param]
    return write(tmp_path, teachers, named=named)


def test_the_parts_of_a_run(recipe: Path) -> None:
    parts = assemble(load_recipe(recipe))
    prompts = parts.stream.take(0, len(parts.stream))
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 16
    by_data = isinstance(parts.teacher, RoutedTeacher)
    assert by_data or isinstance(parts.teacher, MixtureTeacher)
    for prompt in prompts:
        expected = "base" if prompt.text.startswith("Add") else "math"
        assert prompt.teacher == (expected if by_data else None)
    assert list(parts.teachers) == ["math", "base"]
    assert list(parts.teacher_engines) == (["math", "base"] if by_data else ["teacher"])
    assert set(parts.pair.end_tokens.stop_ids) == {END, CHAT_END}
    said = parts.pair.introduction()
    assert said[0].startswith("student 0.853M, teacher math 2.76M, teacher base 0.853M parameters; 512 tokens")
    assert said[1].startswith(
        "end tokens differ: <|endoftext|> (student), <|im_end|> (teacher math), <|endoftext|> (teacher base); all count"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["rollout.teacher_mixing=0.2"], {"mixture"}),
        (["rollout.sources={teacher: 1}"], {"teacher"}),
        (["rollout.sources={student: 0.4, teacher: 0.3, golden: 0.3}"], {"student", "teacher", "golden"}),
    ],
)
def test_teachers_answer_too(recipe: Path, settings: list[str], expected: set[Source]) -> None:
    parts = assemble(load_recipe(recipe, settings))
    prompts = parts.stream.take(0, len(parts.stream))
    rollouts = parts.engine.generate(prompts, parts.sampling, seed=1)
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert {rollout.source for rollout in rollouts} == expected


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None, (result.exception, result.output)
    return result.output


def test_a_run_and_its_resumption(recipe: Path, tmp_path: Path) -> None:
    out, direct = tmp_path / "run", tmp_path / "direct"
    invoke("train", str(recipe), "--out", str(out))
    invoke("train", "--resume", "--out", str(out), "--set", "train.steps=3")
    invoke("train", str(recipe), "--out", str(direct), "--set", "train.steps=3")
    one, other = (load_file(run / "student" / "model.safetensors") for run in (out, direct))
    assert all(one[name].equal(other[name]) for name in one)

    by_data = "teacher: math" in recipe.read_text()
    places = ["teacher-base", "teacher-math"] if by_data else ["teacher"]
    assert sorted(folder.name for folder in (out / "eval").glob("teacher*")) == places
    run = read_run(out)
    shown = [place.replace("-", " ") for place in places]
    assert [row[0] for row in results_table([run]).rows] == [*shown, "student before", "student after"]
    assert ("teacher math has" in headline(run)) == by_data
    page = (out / "report.html").read_text()
    assert "student quickstart:student, teacher math quickstart:teacher, teacher base quickstart:student" in page
    assert "distilled from quickstart:teacher and quickstart:student" in (out / "student" / "README.md").read_text()


def test_doctor_examines_every_teacher(recipe: Path) -> None:
    output = invoke("doctor", str(recipe))
    assert "fail" not in output
    assert "LM heads have 512 (student), 512 (teacher math), 512 (teacher base) rows" in output
    assert "teacher math determinism" in output
    assert "teacher base determinism" in output
    assert "sampler parity" in output


def test_each_teacher_must_fit_the_student(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve("quickstart:student"), folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    Tokenizer.from_str(json.dumps(data)).save(str(folder / "tokenizer.json"))
    recipe = load_recipe(write(tmp_path, {**BY_DATA, "base": {"model": str(folder)}}, named=True))
    with pytest.raises(ModelError, match="student and teacher base have different tokenizers: 2 of 512 ids differ"):
        assemble(recipe)


def test_data_problems_name_their_section(tmp_path: Path) -> None:
    path = write(tmp_path, BY_DATA, named=True)
    (tmp_path / "base.jsonl").unlink()
    recipe: Recipe = load_recipe(path, ["data.0.golden=null", "rollout.sources={golden: 1}"])
    with pytest.raises(ConfigError) as error:
        assemble(recipe)
    told = str(error.value).splitlines()
    assert told[0].endswith("set data.0.golden to the column that holds them")
    assert told[1].startswith("data.1.path: there is no file")
