"""Rollouts of uneven length, by poweropd and by plain `model.generate` of transformers: the cases of `rollout.py`."""

from poweropd.rollout.hf import HFEngine
from rollout import CASES, hf_generate
from suite.turns import Turns


def ours(turns: Turns, *, case: str) -> None:
    """`HFEngine`, log-probabilities of every token included."""
    own = CASES[case]()
    engine = HFEngine(own.model, vocab_size=own.model.config.vocab_size, pad_id=0, sequences_per_batch=256)
    for seed in range(turns.count):
        turns.begin()
        rollouts = engine.generate(own.prompts, own.sampling, seed=seed)
        turns.end(tokens=sum(map(len, rollouts)))


def hugging_face(turns: Turns, *, case: str) -> None:
    """`model.generate`, all prompts at once, without log-probabilities."""
    own = CASES[case]()
    for seed in range(turns.count):
        turns.begin()
        turns.end(tokens=hf_generate(own, seed))
