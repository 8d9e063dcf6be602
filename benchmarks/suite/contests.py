"""What is measured against what.

A contest is a set of contestants that do the same work in turns; a contestant is a function of a module and what it is
told. Names and functions only: nothing heavy is imported here.
"""

from dataclasses import dataclass, field
from typing import Any

OURS = "poweropd"
SCORED = {"prompt": 32, "response": 1024}
WAYS = (("window", 4), ("window, at once", 7), ("one pass", 7))  # of the naive way, with the GiB it takes
ALPHA = 1.0  # at larger ones the reward of a random model's tokens is a denormal number, which slows the naive way
ROLLOUT_CASES = ("quickstart:student", "512 x 8, V 512", "256 x 4, V 151,936")
MORE_ROLLOUT_CASES = ("quickstart:teacher", "512 x 8, V 151,936")
IDLE_GIB = 1.3  # what a contestant holds at most while it waits


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        function: `module:function`, called with the turns and `options`.
        is_peer: whether it runs in the peers' environment.
        group: of contestants of one group, only the fastest of the first round goes on.
        gib: memory it is known to need; without as much it does not start.
    """

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    is_peer: bool = False
    group: str | None = None
    gib: float = 1.5


@dataclass(frozen=True)
class Contest:
    """Turns of some contestants on the same work.

    Attributes:
        rounds: turns of each that count.
        dropped: turns before those that count.
    """

    name: str
    contestants: tuple[Contestant, ...]
    rounds: int = 5
    dropped: int = 0


def contests(*, full: bool, bf16: bool) -> list[Contest]:
    """All contests, in the order in which they are held.

    Args:
        full: whether long ones are held, and all with more work.
        bf16: whether bf16 is worth a contestant on this machine.
    """
    trainers = TRAINERS if full else TRAINERS[:2]
    made = [
        Contest("rates", (Contestant("machine", "suite.rates:measure"),), rounds=2),
        Contest("start", (Contestant("starts", "suite.starts:measure"),), rounds=3),
        sampled(bf16=bf16, ways=WAYS if full else WAYS[:1], rollouts=2 if full else 1),
        full_vocabulary(bf16=bf16, rollouts=2 if full else 1),
        steps(
            "real vocabulary",
            trainers,
            prompts=16 if full else 8,
            micro_batch=8,
            new_tokens=128 if full else 32,
            lr=1e-6,
        ),
        steps("quickstart-sized", trainers, prompts=32, micro_batch=32, new_tokens=128 if full else 64, lr=1e-6),
        steps("quickstart", TRAINERS[:1], prompts=48, micro_batch=48, new_tokens=160, lr=1e-5, ends=True),
        *map(rollouts, ROLLOUT_CASES + (MORE_ROLLOUT_CASES if full else ())),
        memory(full=full),
        Contest("profile", profiles(), rounds=1),
    ]
    return [*made, Contest("objectives", every_objective(), rounds=1)] if full else made


def sampled(*, bf16: bool, ways: tuple[tuple[str, float], ...], rollouts: int) -> Contest:
    """Scoring and update of a sampled objective, by the naive way in several `ways`."""
    real = {"shape": "real vocabulary", "alpha": ALPHA, "rollouts": rollouts, **SCORED}
    naive = [
        Contestant(f"naive, {way}", "suite.naive:score", {**real, "way": way}, group="naive", gib=gib)
        for way, gib in ways
    ]
    return Contest(
        "score and update, sampled",
        (
            Contestant(OURS, "suite.ours:score", {**real, "objective": "power"}),
            Contestant("poweropd, z-score", "suite.ours:score", {**real, "objective": "zscore", "alpha": None}),
            *(
                [
                    Contestant(
                        "poweropd, bf16", "suite.ours:score", {**real, "objective": "power", "precision": "bfloat16"}
                    )
                ]
                if bf16
                else []
            ),
            Contestant("TRL chunked", "peers.trl_chunked:score", {**real, "objective": "power"}, is_peer=True, gib=4),
            *naive,
        ),
    )


def full_vocabulary(*, bf16: bool, rollouts: int) -> Contest:
    """Scoring and update of the exact reverse KL."""
    real = {"shape": "real vocabulary", "objective": "reverse_kl", "rollouts": rollouts, **SCORED}
    halves = [Contestant("poweropd, bf16", "suite.ours:score", {**real, "precision": "bfloat16"})] if bf16 else []
    return Contest(
        "score and update, full vocabulary",
        (
            Contestant(OURS, "suite.ours:score", real),
            *halves,
            Contestant("TRL chunked", "peers.trl_chunked:score", {**real, "alpha": ALPHA}, is_peer=True, gib=4.5),
        ),
    )


TRAINERS = ("DistillationTrainer", "IWOPDTrainer", "GKDTrainer")


def steps(
    shape: str,
    trainers: tuple[str, ...],
    *,
    prompts: int,
    micro_batch: int,
    new_tokens: int,
    lr: float,
    ends: bool = False,
) -> Contest:
    """Whole training steps; the peers take `micro_batch` prompts in one pass."""
    work = {"shape": shape, "prompts": prompts, "new_tokens": new_tokens, "ends": ends, "lr": lr}
    peers = [
        Contestant(
            f"TRL {trainer}",
            "peers.trl_steps:steps",
            {**work, "trainer": trainer, "micro_batch": micro_batch},
            is_peer=True,
            gib=1.5 if shape != "real vocabulary" else 9 if new_tokens > 64 else 6,
        )
        for trainer in trainers
    ]
    return Contest(
        f"step, {shape}",
        (
            Contestant(OURS, "suite.ours:steps", {**work, "objective": "log_ratio"}),
            Contestant("poweropd, reverse KL", "suite.ours:steps", {**work, "objective": "reverse_kl"}),
            *peers,
        ),
        dropped=1,
    )


def rollouts(case: str) -> Contest:
    """Sampling of responses of uneven length, of a case of `rollout.py`."""
    return Contest(
        f"rollouts, {case}",
        (
            Contestant(OURS, "suite.sampling:ours", {"case": case}),
            Contestant("transformers generate", "suite.sampling:hugging_face", {"case": case}),
        ),
        dropped=1,
    )


def memory(*, full: bool) -> Contest:
    """Peak memory of scoring and update by the number of tokens, one rollout of 1,024 tokens in a pass."""
    sizes = (1, 8, 32) if full else (1, 4)
    return Contest(
        "memory",
        tuple(
            Contestant(
                f"{objective}, {rollouts * 1024:,} tokens",
                "suite.ours:score",
                {
                    **{"shape": "real vocabulary", "objective": objective, "micro_batch": 1056},
                    **{**SCORED, "rollouts": rollouts},
                },
            )
            for rollouts in sizes
            for objective in ("power", "reverse_kl")
        ),
        rounds=1,
    )


def profiles() -> tuple[Contestant, ...]:
    """One step each, by groups of operators."""
    real = {"shape": "real vocabulary", "prompts": 16, "new_tokens": 48, "ends": False}
    return (
        Contestant("real vocabulary", "suite.profiles:random_step", real),
        Contestant("quickstart", "suite.profiles:quickstart_step"),
    )


def every_objective() -> tuple[Contestant, ...]:
    """Scoring and update of 1,024 tokens by each objective."""
    from poweropd.objectives import OBJECTIVES

    work = {"shape": "real vocabulary", **SCORED, "rollouts": 1}
    names = [name for name, row in OBJECTIVES.items() if not row.on_golden_answers]
    return tuple(Contestant(name, "suite.ours:score", {**work, "objective": name}) for name in names)
