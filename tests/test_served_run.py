"""From a recipe to a finished run with a teacher behind a server, which may go away and come back."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import RECIPE, make_model, make_rollouts
from poweropd.assembly import assemble
from poweropd.cli import app
from poweropd.config import load_recipe, parse_recipe
from poweropd.errors import ConfigError, ModelError
from poweropd.models import layers_apart, load_model, load_outline, resolve, weights_fingerprint
from poweropd.teacher.cache import CachedTeacher
from poweropd.teacher.client import ServedTeacher
from poweropd.teacher.ensemble import MixtureTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.server import TeacherServer
from serving import serving

SETTINGS = [
    "train.steps=6",
    "train.prompts_per_step=8",
    "train.tokens_per_micro_batch=400",
    "checkpoint.every=4",
    "sampling.max_new_tokens=24",
    "evaluation.data=null",
]
SETS = [part for setting in SETTINGS for part in ("--set", setting)]


def recipe(folder: Path, url: str, **teacher: object) -> Path:
    path = folder / "recipe.yaml"
    section = {"model": "quickstart:teacher", "engine": "served", "url": url, "deadline_s": 20, **teacher}
    path.write_text(yaml.safe_dump({"extends": str(RECIPE), "teacher": section, "data": {"limit": 60}}))
    return path


def teacher_model() -> torch.nn.Module:
    return load_model("quickstart:teacher", dtype=torch.float32, device=torch.device("cpu"))


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def student(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(student(one).values(), student(other).values(), strict=True))


class Mortal:
    """The service, which fails after so many answers."""

    def __init__(self, server: TeacherServer, answers: int) -> None:
        self._service, self._left = server.service, answers
        self.info, self.head = self._service.info, self._service.head

    def answer(self, body: bytes) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("out of memory")
        return self._service.answer(body)


@pytest.mark.parametrize("setting", ["objective=power", "objective=reverse_kl", "rollout.max_staleness=2"])
def test_without_its_teacher_a_run_stops_and_goes_on_later(setting: str, tmp_path: Path) -> None:
    """Also where the step that could not be judged was drawn ahead, with older weights."""
    sets = [*SETS, "--set", setting]
    with serving(teacher_model()) as server:
        path = recipe(tmp_path, server.url, deadline_s=0.5)
        assert invoke("train", str(path), "--out", str(tmp_path / "undisturbed"), *sets)[0] == 0
        alive, out = server.service, tmp_path / "run"
        server.service = Mortal(server, answers=4 + 2)  # the probe asks four times; two steps follow
        code, output = invoke("train", str(path), "--out", str(out), *sets)
        (line,) = (line for line in output.splitlines() if line.startswith("error:"))
        assert code == 1
        assert "no usable answer to /score" in line
        assert "the last: status 500 out of memory" in line
        assert line.endswith("the checkpoint of step 2 is kept, go on with --resume")
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["status"] == "failed"
        server.service = alive
        code, output = invoke("train", "--resume", "--out", str(out))
        assert code == 0, output
        assert "resumed at step 2" in output
    assert same_bits(out, tmp_path / "undisturbed")


def test_a_run_does_not_go_on_with_another_teacher(tmp_path: Path) -> None:
    with serving(teacher_model()) as server:
        path = recipe(tmp_path, server.url)
        assert invoke("train", str(path), "--out", str(tmp_path / "run"), *SETS, "--set", "train.steps=1")[0] == 0
        port = server.server_address[1]
    tuned = teacher_model()
    with torch.no_grad():
        tuned.model.norm.weight *= 1.1
    with serving(tuned, port=port):
        code, output = invoke("train", "--resume", "--out", str(tmp_path / "run"), "--set", "train.steps=2")
    assert code == 1
    assert re.search(
        r"error: teacher has other weights \(\w+\) than before this run stopped \(\w+\); serve the same", output
    )


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    with serving(teacher_model()) as server:
        path = recipe(tmp_path, server.url, deadline_s=0.5)
        server.service = Mortal(server, answers=4)
        code, output = invoke("train", str(path), "--out", str(tmp_path / "run"), *SETS)
    assert code == 1
    assert "no step was finished, go on with --resume" in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_with_a_cache_asks_once(tmp_path: Path) -> None:
    """Another run of the same recipe finds every score on disk; only the probe is asked."""
    with serving(teacher_model()) as server:
        path = recipe(tmp_path, server.url, cache=str(tmp_path / "cache"))
        for name in ("one", "other"):
            code, output = invoke("train", str(path), "--out", str(tmp_path / name), *SETS, "--set", "train.steps=2")
            assert code == 0, output
            if name == "one":
                before = server.requests["/score", 200]
        assert server.requests["/score", 200] - before == 4
    assert same_bits(tmp_path / "one", tmp_path / "other")


def test_the_parts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_TOKEN", "secret")
    with serving(teacher_model(), token="secret") as server:
        where = {"model": "quickstart:teacher", "engine": "served", "url": server.url, "token_env": "OUR_TOKEN"}
        mixed = {"a": {**where, "weight": 0.5}, "b": {"model": "quickstart:student", "weight": 0.5}}
        values = {"extends": str(RECIPE), "teacher": None, "teachers": mixed, "data": {"limit": 60}}
        (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(values))
        parts = assemble(load_recipe(tmp_path / "mixed.yaml"))
        assert isinstance(parts.teacher, MixtureTeacher)
        assert isinstance(parts.teachers["a"], ServedTeacher)
        assert parts.pair.teachers["a"].model is None
        assert parts.teacher_engines == {}
        said = parts.pair.introduction()
        assert said[0].startswith("student 0.853M, teacher a 2.76M, teacher b 0.853M parameters")
        assert said[1] == f"teacher a is at {server.url}; it scores and does not sample, so it is not evaluated"
        cached = assemble(load_recipe(recipe(tmp_path, server.url, token_env="OUR_TOKEN", cache=str(tmp_path / "c"))))
        assert isinstance(cached.teacher, CachedTeacher)
        assert isinstance(cached.teachers["teacher"], ServedTeacher)

        other = recipe(tmp_path, server.url, model="quickstart:student", token_env="OUR_TOKEN")
        with pytest.raises(
            ModelError, match=r"is 'served model', and not the 'quickstart:student' of teacher\.model: end"
        ):
            assemble(load_recipe(other))


def test_doctor_compares_with_the_model_here(tmp_path: Path) -> None:
    with serving(teacher_model()) as server:
        path = recipe(tmp_path, server.url, verify=True)
        code, output = invoke("doctor", str(path), "--set", "evaluation.data=null")
        assert code == 0, output
        assert re.search(
            r"ok +teacher determinism .* nats|ok +teacher determinism .*from a forward of the model here", output
        )
        code, output = invoke("train", str(path), "--dry-run")
        assert code == 0
        assert f"Not looked at, because they are not on this machine: {server.url}" in output

        tuned = teacher_model()
        with torch.no_grad():
            tuned.model.norm.weight *= 1.1
    with serving(tuned) as server:
        path = recipe(tmp_path, server.url, verify=True)
        code, output = invoke("doctor", str(path), "--set", "evaluation.data=null")
        assert code == 1
        assert "it is not the model that is here: scores of one text differ by" in output
        code, output = invoke("train", str(path), "--out", str(tmp_path / "run"), *SETS)
        assert code == 1
        assert "error: teacher cannot be relied on, it is not the model that is here" in output


SERVED = {"model": "t", "engine": "served", "url": "http://h:1"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": {"model": "t", "url": "http://h:1"}}, "teacher: url http://h:1 is for a server; set engine: served or vllm, or leave out url"),
        ({"teacher": {"model": "t", "engine": "served"}}, "teacher: engine served needs url: where its server is, such as http://127.0.0.1:8100"),
        ({"teacher": {"model": "t", "engine": "vllm"}}, "teacher: engine vllm needs url"),
        ({"teacher": {"model": "t", "token_env": "X"}}, "teacher: token_env and verify are for a teacher at a url"),
        ({"teacher": {"model": "t", "verify": True}}, "teacher: token_env and verify are for a teacher at a url"),
        ({"teacher": {**SERVED, "precision": "float32"}}, "teacher: precision, quantization and offload of engine served are its server's matter"),
        ({"teacher": {**SERVED, "engine": "vllm", "quantization": "4bit"}}, "teacher: precision, quantization and offload of engine vllm"),
        ({"teacher": {**SERVED, "offload": True}}, "teacher: precision, quantization and offload of engine served"),
        ({"teacher": {"model": "t", "quantization": "8bit", "offload": True}}, "teacher: quantization and offload do not go together"),
        ({"teacher": {**SERVED, "timeout_s": 0}}, "teacher.timeout_s: input should be greater than 0, got 0"),
        ({"teacher": SERVED, "rollout": {"sources": {"teacher": 1}}}, "rollout.sources teacher samples from the teacher, and teacher is behind a server that only scores"),
        ({"teacher": SERVED, "rollout": {"teacher_mixing": 0.2}}, "rollout.teacher_mixing samples from the teacher"),
        ({"teacher": {**SERVED, "cache": "c"}, "objective": "reverse_kl"}, "teacher has a cache, which keeps numbers of single tokens, and objective reverse_kl needs whole distributions; leave out cache, or set objective.estimator"),
        ({"teachers": {"a": {**SERVED, "weight": 0.5, "cache": "c"}, "b": {"model": "t", "weight": 0.5}}}, "teacher a has a cache, which keeps numbers of single tokens, and a mixture needs whole distributions; leave out cache"),
        ({"teachers": {"a": {**SERVED, "weight": 0.5, "engine": "vllm"}, "b": {"model": "t", "weight": 0.5}}}, "teachers.a.engine: vllm gives numbers of single tokens, and a mixture needs whole distributions"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes: dict, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe({"student": {"model": "s"}, "data": {"source": "jsonl", "path": "x.jsonl"}, **changes})
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_there_and_a_token_that_is_not_set(tmp_path: Path) -> None:
    for settings, told in (
        ({"url": "http://127.0.0.1:9", "deadline_s": 0.2}, "connection refused"),
        ({"url": "127.0.0.1:8100"}, "'127.0.0.1:8100' is no URL of a server; give one such as http://127.0.0.1:8100"),
        ({"url": "http://127.0.0.1:9", "token_env": "NOT_SET"}, "the environment variable NOT_SET is not set"),
    ):
        path = recipe(tmp_path, **settings)
        code, output = invoke("train", str(path), "--out", str(tmp_path / "run"), *SETS)
        assert code == 1
        assert told in output
        assert "Traceback" not in output
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("name", ["quickstart:student", "quickstart:teacher"])
def test_an_outline_is_the_model_without_its_weights(name: str) -> None:
    outline, model = load_outline(name), AutoModelForCausalLM.from_pretrained(resolve(name))
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    assert outline.num_parameters() == model.num_parameters()
    assert outline.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert outline.get_output_embeddings().weight.shape == model.get_output_embeddings().weight.shape


def test_no_outline_of_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="there is no folder '/no/such/folder'"):
        load_outline("/no/such/folder")


def test_quantized_and_offloaded_teachers_want_a_gpu() -> None:
    for how, told in (({"quantization": "4bit"}, "quantization 4bit"), ({"offload": True}, "offload")):
        with pytest.raises(ConfigError, match=f"'quickstart:teacher': {told} is for a GPU, and there is none here"):
            load_model("quickstart:teacher", dtype=torch.float32, device=torch.device("cpu"), **how)


def test_all_but_the_layers_stay_on_the_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert layers_apart(make_model(), gpu) == {
        "model.embed_tokens": gpu,
        "model.layers": "cpu",
        "model.norm": gpu,
        "model.rotary_emb": gpu,
        "lm_head": gpu,
    }


def test_layers_that_lie_elsewhere_change_neither_scores_nor_fingerprint(tmp_path: Path) -> None:
    """On the disk, since without a GPU all is in main memory."""
    whole = teacher_model()
    places = layers_apart(whole, torch.device("cuda"))
    places = {name: "disk" if place == "cpu" else "cpu" for name, place in places.items()}
    apart = AutoModelForCausalLM.from_pretrained(
        resolve("quickstart:teacher"), dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    assert {name for name, weight in apart.named_parameters() if weight.is_meta} == {
        name for name, _ in whole.named_parameters() if ".layers." in name
    }
    assert weights_fingerprint(apart) == weights_fingerprint(whole)
    rollouts = make_rollouts([(3, 5), (9, 20)])
    found, expected = (HFTeacher(model, vocab_size=512).score(rollouts, needs="sampled") for model in (apart, whole))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs)


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "poweropd", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def start_server(port: int = 0) -> tuple[subprocess.Popen, str]:
    """A server process, and the URL that it says."""
    process = start(
        "serve-teacher", "quickstart:teacher", "--port", str(port), "--token-env", "OUR_TOKEN", OUR_TOKEN="secret"
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " at http://127.0.0.1:" in line, line
    return process, line.split(" at ")[1].strip()


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen) -> None:
    path = out / "metrics.jsonl"
    while process.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) >= steps):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]


@pytest.mark.slow
def test_a_server_process_killed_and_restarted_in_the_middle_of_a_run(tmp_path: Path) -> None:
    sets = [*SETS, "--set", "train.steps=12"]
    server, url = start_server()
    try:
        path = recipe(tmp_path, url, token_env="OUR_TOKEN", deadline_s=60)
        whole = start("train", str(path), "--out", str(tmp_path / "undisturbed"), *sets, OUR_TOKEN="secret")
        assert whole.wait(timeout=300) == 0, whole.communicate()[0]

        run = start("train", str(path), "--out", str(tmp_path / "run"), *sets, OUR_TOKEN="secret")
        wait_for_steps(tmp_path / "run", 2, run)
        server.kill()
        server.communicate()
        server, _ = start_server(int(url.rsplit(":", 1)[1]))
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        assert same_bits(tmp_path / "run", tmp_path / "undisturbed")

        taken = start("serve-teacher", "quickstart:teacher", "--port", url.rsplit(":", 1)[1])
        output, _ = taken.communicate(timeout=300)
        assert taken.returncode == 1
        assert re.fullmatch(
            r"error: cannot listen on port \d+ of 127\.0\.0\.1: Address already in use; choose.*\n", output
        )

        dead = start(
            "train",
            str(path),
            "--out",
            str(tmp_path / "dead"),
            *sets,
            "--set",
            "teacher.deadline_s=1",
            OUR_TOKEN="secret",
        )
        wait_for_steps(tmp_path / "dead", 2, dead)
        server.terminate()
        output, _ = server.communicate(timeout=60)
        assert server.returncode == 0
        assert re.search(r"^ended after \d+ tokens$", output, re.MULTILINE)
        output, _ = dead.communicate(timeout=300)
        assert dead.returncode == 1
        assert "Traceback" not in output
        (line,) = (line for line in output.splitlines() if line.startswith("error:"))
        assert re.search(
            r"gave no usable answer to /score in .*; the checkpoint of step \d+ is kept, go on with --resume$", line
        )

        server, _ = start_server(int(url.rsplit(":", 1)[1]))
        resumed = start("train", "--resume", "--out", str(tmp_path / "dead"), OUR_TOKEN="secret")
        output, _ = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, output
        assert same_bits(tmp_path / "dead", tmp_path / "undisturbed")
    finally:
        server.kill()
        server.communicate()
