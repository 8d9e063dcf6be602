"""A server and its client: what is refused, and what a client believes of a server that misbehaves."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import END, make_model, make_rollouts
from poweropd.errors import ConfigError, ModelError, TeacherError
from poweropd.models import weights_fingerprint
from poweropd.objectives import Needs
from poweropd.teacher.client import ServedTeacher
from poweropd.teacher.hf import HFTeacher
from poweropd.teacher.http import token_from
from poweropd.teacher.server import LARGEST_REQUEST, TeacherServer
from poweropd.teacher.wire import Question, pack, unpack
from poweropd.vocabulary import vocabulary_hash
from serving import connect, embedded_tokenizer, served, serving

LENGTHS = [(3, 5), (9, 2), (1, 20), (6, 12), (2, 1)]
TOKENS = sum(length for _, length in LENGTHS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(rows=528)


@pytest.fixture(scope="module")
def server(model: PreTrainedModel) -> Iterator[TeacherServer]:
    with serving(model, token="secret") as server:
        yield server


def ask(
    server: TeacherServer, method: str, path: str, body: bytes = b"", token: str | None = "secret", **headers: str
) -> tuple[int, str]:
    """Status and answer of a plain request."""
    connection = HTTPConnection(*server.server_address[:2], timeout=10)
    bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        connection.request(method, path, body or None, {**bearer, **headers})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def test_it_says_what_it_serves(server: TeacherServer, model: PreTrainedModel) -> None:
    status, told = ask(server, "GET", "/info")
    info = json.loads(told)
    assert status == 200
    assert info["model"] == "served model"
    assert info["weights"] == weights_fingerprint(model)
    assert info["vocabulary"] == vocabulary_hash(embedded_tokenizer(), 512)
    assert (info["vocab_size"], info["head_rows"], info["context"]) == (512, 528, 128)
    assert info["parameters"] == model.num_parameters()
    assert info["dtype"] == "float32"


def test_metrics_count(model: PreTrainedModel) -> None:
    with serving(model) as server:
        served(server).score(make_rollouts(LENGTHS), needs="sampled")
        ask(server, "POST", "/score", b"nonsense", None)
        status, told = ask(server, "GET", "/metrics")
        assert status == 200
        assert 'poweropd_teacher_requests_total{path="/info",status="200"} 1\n' in told
        assert 'poweropd_teacher_requests_total{path="/score",status="200"} 1\n' in told
        assert 'poweropd_teacher_requests_total{path="/score",status="400"} 1\n' in told
        assert f"poweropd_teacher_tokens_total {TOKENS}\n" in told
        assert float(told.split("poweropd_teacher_seconds_total ")[-1]) > 0


@pytest.mark.parametrize("token", [None, "", "secreT", "secret2", "sécret"])
def test_the_token_is_needed(server: TeacherServer, token: str | None) -> None:
    wrong = None if token is None else token.encode().decode("latin-1")
    for method, path in (("GET", "/info"), ("GET", "/head?vocab_size=512"), ("GET", "/metrics"), ("POST", "/score")):
        status, told = ask(server, method, path, b"x" * 100_000 if method == "POST" else b"", wrong)
        assert (status, told) == (401, "a bearer token is needed, and this is not it\n")
    assert ask(server, "GET", "/health", token=wrong) == (200, "ok\n")


def question(**changes: object) -> bytes:
    asked = Question(make_rollouts(LENGTHS), "sampled", 512, (END,))
    return replace(asked, **changes).to_bytes()


def spoilt(**changes: object) -> bytes:
    """A question with other tensors or facts."""
    tensors, facts = unpack(question())
    tensors |= {name: value for name, value in changes.items() if isinstance(value, Tensor)}
    facts |= {name: value for name, value in changes.items() if not isinstance(value, Tensor)}
    return pack(tensors, **facts)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "no message of this protocol"),
        (b"\xff" * 100, "no message of this protocol"),
        (question()[:-3], "no message of this protocol"),
        (spoilt(protocol=7), "protocol 7 is asked for, this server speaks 1"),
        (spoilt(needs="all"), "needs is 'all'; known: nothing, sampled, top_k, full, ids"),
        (spoilt(vocab_size=529), "vocab_size 529 and k 0 must be integers, at most 528"),
        (spoilt(vocab_size="512"), "vocab_size '512'"),
        (spoilt(k=-1), "k -1"),
        (spoilt(end_ids=[512]), "end_ids are [512]; each is an id below 512"),
        (spoilt(tokens=torch.full((61,), 512, dtype=torch.int32)), "tokens go from 512 to 512; each is at least 0 and below 512"),
        (spoilt(tokens=torch.zeros(61)), "tokens are torch.float32"),
        (spoilt(tokens=torch.zeros(60, dtype=torch.int32)), "60 tokens do not fall into prompts"),
        (spoilt(prompt_lengths=torch.tensor([3, 9, 1, 6, -2], dtype=torch.int32)), "prompt_lengths go from -2"),
        (spoilt(prompt_lengths=torch.tensor([3, 9, 1, 8, 0], dtype=torch.int32)), "a prompt or response is empty"),
        (question(rollouts=make_rollouts([(100, 40)])), "a rollout has 140 tokens, the model's context 128"),
        (question(needs="ids"), "ids go with needs ids"),
        (question(needs="ids", ids=torch.zeros(3, 2)), "ids have 3 rows for 40 response tokens"),
        (question(needs="ids", ids=torch.full((40, 2), 600)), "ids go from 600 to 600"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(server: TeacherServer, body: bytes, complaint: str) -> None:
    status, told = ask(server, "POST", "/score", body, **({} if body else {"Content-Length": "0"}))
    assert status == 400, told
    assert complaint in told
    assert told.count("\n") == 1


def test_other_requests_are_refused(server: TeacherServer) -> None:
    status, told = ask(server, "GET", "/v1/models")
    assert (status, told) == (404, "there is no GET /v1/models here; this is `poweropd serve-teacher`\n")
    assert ask(server, "GET", "/head?vocab_size=529")[0] == 400
    assert ask(server, "GET", "/head")[0] == 400
    connection = HTTPConnection(*server.server_address[:2], timeout=10)
    connection.putrequest("POST", "/score")
    connection.putheader("Authorization", "Bearer secret")
    connection.putheader("Content-Length", str(LARGEST_REQUEST + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    connection.putrequest("POST", "/score")
    connection.putheader("Authorization", "Bearer secret")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_who_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "teacher.example"):
        with pytest.raises(ConfigError, match="lets other machines in, and there is no token"):
            TeacherServer(host, 0, None)
    with TeacherServer("127.0.0.1", 0, None) as one:
        one.server_activate()
        with pytest.raises(
            ConfigError, match=r"listen on port \d+ of 127\.0\.0\.1: Address already in use; choose another"
        ):
            TeacherServer("127.0.0.1", one.server_address[1], None)
    assert token_from(None, "teacher.token_env") is None
    for value, wrong in (
        (None, "is not set"),
        ("", "is not set"),
        ("two words", "holds spaces"),
        ("é", "holds spaces or other than printable ASCII"),
    ):
        monkeypatch.delenv("OUR_TOKEN", raising=False)
        if value is not None:
            monkeypatch.setenv("OUR_TOKEN", value)
        with pytest.raises(ConfigError, match=f"teacher.token_env: the environment variable OUR_TOKEN {wrong}"):
            token_from("OUR_TOKEN", "teacher.token_env")
    monkeypatch.setenv("OUR_TOKEN", "secret")
    assert token_from("OUR_TOKEN", "teacher.token_env") == "secret"


def test_a_client_with_the_wrong_token(server: TeacherServer) -> None:
    with pytest.raises(TeacherError, match=r"refuses: 401 a bearer token is needed.*teacher\.token_env"):
        ServedTeacher(connect(server.url, "wrong"), vocab_size=512)


def test_many_clients_at_once_get_what_each_alone_gets(server: TeacherServer) -> None:
    asked = [make_rollouts([(3, 5 + place), (7, 3)]) for place in range(6)]
    alone = [served(server).score(rollouts, needs="sampled") for rollouts in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda rollouts: served(server).score(rollouts, needs="sampled"), asked))
    for one, other in zip(alone, together, strict=True):
        for own, theirs in zip(one, other, strict=True):
            assert torch.equal(own.logprobs, theirs.logprobs)


def test_half_precision_stays_half_precision_on_the_wire() -> None:
    model = make_model(dtype=torch.bfloat16).bfloat16()
    with serving(model) as server:
        rollouts = make_rollouts(LENGTHS)
        remote, local = served(server), HFTeacher(model, vocab_size=512)
        for one, other in zip(remote.score(rollouts, needs="full"), local.score(rollouts, needs="full"), strict=True):
            assert one.distribution.hidden[0].dtype == one.distribution.heads[0].weight.dtype == torch.bfloat16
            assert torch.equal(one.distribution.hidden[0], other.distribution.hidden[0])
        for one, other in zip(
            remote.score(rollouts, needs="sampled"), local.score(rollouts, needs="sampled"), strict=True
        ):
            assert one.logprobs.dtype == torch.float32
            assert torch.equal(one.logprobs, other.logprobs)


Spoil = Callable[[dict[str, Tensor], dict[str, object]], object]


class SpoiltService:
    """The real one, but its first answers are spoilt."""

    def __init__(self, service: object, spoil: Spoil, times: int) -> None:
        self._service, self._spoil, self.left = service, spoil, times
        self.info, self.head = service.info, service.head

    def answer(self, body: bytes) -> bytes:
        answer = self._service.answer(body)
        if not self.left:
            return answer
        self.left -= 1
        tensors, facts = unpack(answer)
        given = self._spoil(tensors, facts)
        return given if isinstance(given, bytes) else pack(tensors, **facts)


def out_of_memory(tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    raise RuntimeError("CUDA out of memory\nand so on")


def lose_entropies(tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    del tensors["entropies"]


def change(name: str, make: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
        tensors[name] = make(tensors[name])

    return spoil


def score_through(spoil: Spoil, times: int, needs: Needs, model: PreTrainedModel, deadline_s: float = 10) -> int:
    """Score through a spoilt server; the number of spoilt answers that were never given."""
    rollouts = make_rollouts(LENGTHS)
    with serving(model) as server:
        client = ServedTeacher(connect(server.url, deadline_s=deadline_s), vocab_size=512)
        expected = client.score(rollouts, needs=needs, k=3)
        server.service = SpoiltService(server.service, spoil, times)
        for one, other in zip(client.score(rollouts, needs=needs, k=3), expected, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=0)
            torch.testing.assert_close(one.top_ids, other.top_ids, rtol=0, atol=0)
        return server.service.left


UNUSABLE: dict[str, tuple[Needs, Spoil, str]] = {
    "garbage": ("sampled", lambda tensors, facts: b"garbage" * 100, "no message of this protocol"),
    "too few tokens": ("sampled", change("logprobs", lambda column: column[:-1]), r"logprobs of shape \(40,\) were asked for, it gave shape \(39,\)"),
    "a column missing": ("sampled", lose_entropies, r"entropies of shape \(40,\) were asked for, it gave none"),
    "too few of the likeliest": ("top_k", change("top_logprobs", lambda column: column[:, :2]), r"top_logprobs of shape \(40, 3\)"),
    "no ids": ("top_k", change("top_ids", lambda column: column + 511), "top_ids are not all ids of the 512 tokens"),
    "another width": ("full", change("hidden", lambda rows: rows[:, :-1]), r"hidden of shape \(40, 16\) were asked for"),
    "out of memory": ("sampled", out_of_memory, "status 500 CUDA out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_answer_is_asked_for_again_and_never_used(name: str, model: PreTrainedModel) -> None:
    needs, spoil, reason = UNUSABLE[name]
    assert score_through(spoil, 2, needs, model) == 0
    with pytest.raises(TeacherError, match=f"gave no usable answer to /score in .*{reason}"):
        score_through(spoil, 1000, needs, model, deadline_s=0.3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("needs", "name"), [("sampled", "logprobs"), ("top_k", "top_logprobs"), ("full", "hidden")])
def test_scores_that_are_not_finite_stop_at_once(needs: Needs, name: str, value: float, model: PreTrainedModel) -> None:
    def spoil(column: Tensor) -> Tensor:
        column[-1] = value
        return column

    with pytest.raises(TeacherError, match=f"gives {name} that are not finite; no rollout is trained on"):
        score_through(change(name, spoil), 1, needs, model)


def test_a_restart_with_the_same_model_goes_unnoticed_and_with_another_does_not(model: PreTrainedModel) -> None:
    rollouts = make_rollouts(LENGTHS)
    with serving(model) as server:
        client, port = served(server), server.server_address[1]
        before = client.score(rollouts, needs="full")
    client._connection.close()  # the old server's threads would answer on
    for seed in (None, 1):
        again = model if seed is None else make_model(rows=528, seed=seed)
        with serving(again, port=port):
            if seed is None:
                after = client.score(rollouts, needs="full")
                assert all(
                    torch.equal(one.distribution.hidden[0], other.distribution.hidden[0])
                    for one, other in zip(before, after, strict=True)
                )
            else:
                with pytest.raises(TeacherError, match=r"now has other weights than when .*; serve the same model"):
                    client.score(rollouts, needs="sampled")
            client._connection.close()


def test_another_model_than_the_recipes_is_refused(server: TeacherServer) -> None:
    client = served(server)
    known = {"head_rows": 528, "end_ids": (END, 2), "context": 128, "parameters": client.info.parameters}
    client.refuse_other_model("m", embedded_tokenizer(), **known)
    for name, value, told in (
        ("head_rows", 512, "rows of the LM head, 528 there and 512 here"),
        ("end_ids", (7,), r"end tokens, \[0, 2\] there and \[7\] here"),
        ("context", 64, "positions, 128 there and 64 here"),
        ("parameters", 7, f"parameters, {client.info.parameters} there and 7 here"),
    ):
        with pytest.raises(ModelError, match=f"is 'served model', and not the 'm' of teacher.model: {told}"):
            client.refuse_other_model("m", embedded_tokenizer(), **{**known, name: value})


def test_what_is_no_teacher_is_told() -> None:
    with serving(make_model()) as server:
        info = replace(server.service.info, protocol=9)
        server.service.info = info
        with pytest.raises(TeacherError, match="speaks protocol 9, this poweropd 1; install one version"):
            served(server)
