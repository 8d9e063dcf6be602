"""The command line: bad input gets one clear line, nothing is lost, no traceback is shown."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from conftest import RECIPE, ROOT
from poweropd.cli import app
from poweropd.models import resolve
from poweropd.objectives import OBJECTIVES
from poweropd.objectives.conformance import PROPERTIES
from poweropd.objectives.describe import as_markdown
from poweropd.runlog import RunDirectory

SMALL = [
    "train.steps=2",
    "train.prompts_per_step=4",
    "sampling.max_new_tokens=16",
    "data.limit=20",
    "evaluation.data=null",
]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def train(out: Path, *settings: str, recipe: Path = RECIPE) -> tuple[int, str]:
    sets = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    return invoke("train", str(recipe), "--out", str(out), *sets)


def copy_model(name: str, folder: Path) -> Path:
    shutil.copytree(resolve(name), folder)
    return folder


def complaint(code: int, output: str) -> str:
    """The one line of a refused command."""
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 1, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def test_a_small_run(tmp_path: Path) -> None:
    code, output = train(tmp_path / "run")
    assert code == 0, output
    assert "end tokens differ: <|endoftext|> (student), <|im_end|> (teacher); both count as one outcome" in output
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, tmp_path: Path) -> None:
    golden = ["rollout.sources={golden: 1}"] if OBJECTIVES[name].on_golden_answers else []
    code, output = train(tmp_path / "run", f"objective.name={name}", *golden)
    assert code == 0, output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert all(value == value for line in metrics for value in line.values())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.step=3", "train.step: unknown key; did you mean 'steps'?"),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("objective.alpha=0", "objective.alpha: 0 is outside (0, inf)"),
        ("objective.alpha=-2", "objective.alpha: -2 is outside (0, inf)"),
        ("student.model=/no/such/folder", "there is no folder '/no/such/folder'. Give a folder with"),
        ("student.model=no/such-model", "cannot read a tokenizer for the Hub id 'no/such-model', and there is no such folder"),
        ("data.families={gcdd: {}}", "data.families.gcdd"),
        ("data.max_prompt_tokens=10", "prompts are longer than 10 tokens"),
        ("sampling.max_new_tokens=1020", "prompts are longer than 4 tokens"),
        ("sampling.max_new_tokens=1030", "data: max_new_tokens is 7 too large to leave the models' context room for a prompt"),
        ("sampling.stop=[hello there]", "sampling.stop: 'hello there' is"),
    ],
)  # fmt: skip
def test_bad_settings(setting: str, message: str, tmp_path: Path) -> None:
    line = complaint(*train(tmp_path / "run", setting))
    assert message in line


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert "cannot read recipe" in complaint(*train(tmp_path / "run", recipe=tmp_path / "absent.yaml"))


def test_a_truncated_model(tmp_path: Path) -> None:
    folder = copy_model("quickstart:student", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = complaint(*train(tmp_path / "run", f"student.model={folder}"))
    assert "model.safetensors is damaged" in line
    assert "bytes where" in line


def test_a_model_without_weights(tmp_path: Path) -> None:
    folder = copy_model("quickstart:student", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert f"cannot read a model in the folder '{folder}'" in complaint(
        *train(tmp_path / "run", f"student.model={folder}")
    )


def test_models_with_different_tokenizers(tmp_path: Path) -> None:
    folder = copy_model("quickstart:teacher", tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    Tokenizer.from_str(json.dumps(data)).save(str(folder / "tokenizer.json"))
    assert "student and teacher have different tokenizers: 2 of 512 ids differ" in complaint(
        *train(tmp_path / "run", f"teacher.model={folder}")
    )


def test_data_problems_are_told_together(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?"}\n')
    data = f"data={{source: jsonl, path: {rows}}}"
    evaluation = f"evaluation.data={{source: jsonl, path: {tmp_path}/absent.jsonl}}"
    code, output = train(tmp_path / "run", data, evaluation)
    assert code == 1
    assert "data: row 0 has no column 'problem'; it has 'question'" in output
    assert "evaluation.data.path: there is no file" in output
    rows.write_text("")
    assert "data: no prompts in" in complaint(*train(tmp_path / "other", data))


def test_a_directory_in_use(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", RECIPE.read_text()):
        assert "is in use by another process" in complaint(*invoke("train", "--resume", "--out", str(tmp_path / "run")))


def test_resume_without_a_run(tmp_path: Path) -> None:
    assert "holds no run to resume" in complaint(*invoke("train", "--resume", "--out", str(tmp_path)))
    assert "--resume needs --out" in complaint(*invoke("train", "--resume"))


def test_a_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    """A learning rate that throws the weights away after the first step; where it shows first differs by machine."""
    out = tmp_path / "run"
    code, output = train(out, "optimizer.lr=1e25", "optimizer.warmup_steps=0", "train.steps=4", "checkpoint.every=1")
    line = complaint(code, output)
    assert "error: step 1: " in line
    assert "No update was made" in line
    assert "the checkpoint of step 1 is kept" in line
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the checkpoint of this model is larger
sys.argv = ["poweropd", *sys.argv[1:]]
from poweropd.cli import main
main()
"""


def test_a_full_disk_while_saving(tmp_path: Path) -> None:
    sets = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-c", FULL_DISK, "train", str(RECIPE), "--out", str(tmp_path / "run"), *sets]
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    line = complaint(got.returncode, got.stderr)
    assert "cannot save the checkpoint of step 2" in line
    assert "Make room, then go on with --resume" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_dry_run_prints_every_default(tmp_path: Path) -> None:
    code, output = invoke(
        "train", str(RECIPE), "--dry-run", "--set", "data.limit=20", "--set", "evaluation.data.limit=5"
    )
    assert code == 0, output
    assert "max_grad_norm: 1.0" in output
    assert "# objective power, what is not set: " in output
    assert "normalize: none" in output
    assert "sampler parity" in output
    assert not list(tmp_path.iterdir())


def test_doctor_on_a_healthy_pair() -> None:
    code, output = invoke("doctor", str(RECIPE), "--set", "data.limit=20", "--set", "evaluation.data.limit=5")
    assert code == 0, output
    assert "fail" not in output
    for name in ("vocabulary", "end tokens", "context", "memory", "teacher determinism", "sampler parity"):
        assert name in output


def test_evaluate(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [
        {"id": "a", "problem": "State the final answer to the following arithmetic problem: 4 + 3 =", "answer": "7"}
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "evaluate",
        "quickstart:teacher",
        "--data",
        str(problems),
        "--out",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "80",
    ]
    code, output = invoke(*arguments)
    assert code == 0, output
    assert "Avg@8" in output
    summary = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert summary["avg_at_8"] > 0.5
    assert f"{100 * summary['avg_at_8']:.1f} [" in output
    code, again = invoke(*arguments, "--against", str(tmp_path / "out"), "--k", "3")  # finished: nothing is sampled
    assert code == 0, again
    assert "Pass@3" in again
    assert "+0.0 [-97.5, +97.5]" in again  # of one problem nothing is known
    assert "on so few problems" in again
    assert "which is never written over: temperature 0.6 there" in complaint(*invoke(*arguments, "--temperature", "1"))
    arguments[5:] = [str(tmp_path / "default"), "--temperature", "0"]
    code, output = invoke(*arguments)  # the pair's context is 1024, as the default budget would be
    assert code == 0, output
    settings = json.loads((tmp_path / "default" / "problems.json").read_text())["settings"]
    assert (settings["max_new_tokens"], settings["samples_per_prompt"]) == (512, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--benchmark", "math501"], "unknown benchmark 'math501': did you mean math500?"),
        (["--benchmark", " "], "say what to evaluate on"),
        (["--data", "no.jsonl"], "--data no.jsonl: there is no such file"),
        (["--data", str(RECIPE), "--temperature", "0", "--samples", "2"], "temperature 0 is greedy"),
        (["--data", str(RECIPE), "--k", "5", "--k", "9"], "Pass@9 needs at least 9 samples a problem, there are 8"),
        (["--data", str(RECIPE), "--against", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_evaluate_refuses_in_one_line(arguments: list[str], said: str) -> None:
    assert said in complaint(*invoke("evaluate", "quickstart:student", *arguments))


def test_objectives_lists_every_row_and_the_docs_agree() -> None:
    code, output = invoke("objectives")
    assert code == 0
    assert all(name in output for name in OBJECTIVES)
    assert (ROOT / "docs" / "objectives.md").read_text() == as_markdown()


def test_an_objective_is_checked_by_name() -> None:
    code, output = invoke("objectives", "--check", "jensen_shannon")
    assert code == 0, output
    assert output.count("ok   ") == len(PROPERTIES)
    code, output = invoke("objectives", "--check", "zscore")
    assert code == 0
    assert "does not apply: it is a reward without a value" in output
    assert "did you mean 'power'" in complaint(*invoke("objectives", "--check", "powr"))


def test_the_guides_own_objective_is_checked_and_trained(own_folder: Path) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    (code,) = re.findall(r"```python\n(# mine.py\n.*?)```", guide, flags=re.DOTALL)
    (own_folder / "mine.py").write_text(code)
    (own_folder / "wrong.py").write_text(code.replace("x.sqrt()", "-x.sqrt()"))
    status, output = invoke("objectives", "--check", "mine:square_root")
    assert status == 0, output
    status, output = invoke("objectives", "--check", "wrong:square_root")
    assert status == 1
    assert "fail" in output
    assert "it must be positive" in output
    status, output = train(own_folder / "run", "objective.name=mine:square_root")
    assert status == 0, output
    assert "objective.name: module 'mine' has no 'absent'" in complaint(
        *train(own_folder / "b", "objective.name=mine:absent")
    )
    (code,) = re.findall(r"```python\n(# roots.py\n.*?)```", guide, flags=re.DOTALL)
    (own_folder / "roots.py").write_text(code)
    status, output = invoke("objectives", "--check", "roots:root")
    assert status == 0, output
    status, output = train(own_folder / "c", "objective.name=roots:root", "objective.degree=3")
    assert status == 0, output


def test_a_reward_that_overflows_at_once_is_told_from_a_run_that_diverges(tmp_path: Path) -> None:
    line = complaint(*train(tmp_path / "run", "objective.name=cressie_read", "objective.alpha=-60"))
    assert "step 0: not finite at token" in line
    assert "set objective.ratio_limit, or choose a bounded objective such as power" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.name=reverse_kl", "objective.discount=0.9"], "says nothing of the positions after it"),
        (["objective.reference_kl=0.1", "objective.reference_kl_form=k3_loss"], "KL(reference || student)"),
        (["objective.k=8"], "it belongs to estimator top_k"),
        (
            ["objective.golden=0.1", "data.golden=null"],
            "objective.golden is above 0, but the prompts have no worked answers",
        ),
        (["objective.masked_tokens=[not one token]"], "objective.masked_tokens: 'not one token' is"),
        (["objective.baseline=leave_one_out"], "set sampling.samples_per_prompt to 2 or more, got 1"),
        (["guard.action=raise_reference_kl"], "needs a KL to raise"),
    ],
)
def test_what_makes_no_sense_is_refused_at_start(settings: list[str], message: str, tmp_path: Path) -> None:
    assert message in complaint(*train(tmp_path / "run", *settings))


def commands_in(path: Path) -> list[str]:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [
        line.strip().removeprefix("$ ") for line in lines if line.strip().removeprefix("$ ").startswith("poweropd ")
    ]


@pytest.mark.parametrize("command", commands_in(ROOT / "README.md"))
def test_the_commands_of_the_readme_exist(command: str) -> None:
    """Every command line of the README names a verb and options that there are, and files that are in the repository."""
    verb, *arguments = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    context = group.commands[verb].make_context(verb, arguments)
    recipe = context.params.get("recipe")
    assert recipe is None or (ROOT / recipe).is_file()


def test_help_needs_no_heavy_import() -> None:
    code = "import sys; from poweropd.cli import app; print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
