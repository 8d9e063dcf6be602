"""Rollouts of uneven length, by poweropd and by plain `model.generate` of transformers."""

from typing import Any

import torch

from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from suite.ours import asked
from suite.shapes import SHAPES, Shape, build, tokenizer
from suite.turns import Turns


def stop_ids(shape: Shape, stop_share: float) -> tuple[int, ...]:
    """The tokens that end a response: the embedded models' own, or so many that random ones end at uneven lengths."""
    return tuple(range(round(stop_share * shape.vocabulary))) or (tokenizer().eos_token_id,)


def ours(turns: Turns, *, shape: str, prompts: int, new_tokens: int, stop_share: float) -> None:
    """`HFEngine`, log-probabilities of every token included."""
    pair = SHAPES[shape]
    engine = HFEngine(build(pair, "student"), vocab_size=pair.vocabulary, pad_id=0)
    sampling = Sampling(stop_ids=stop_ids(pair, stop_share), max_new_tokens=new_tokens)
    for step in range(turns.count):
        given = asked(prompts, seed=step)
        turns.begin()
        rollouts = engine.generate(given, sampling, seed=step)
        turns.end(tokens=sum(map(len, rollouts)))


@torch.no_grad()
def hugging_face(turns: Turns, *, shape: str, prompts: int, new_tokens: int, stop_share: float) -> None:
    """`model.generate`, all prompts at once, without log-probabilities."""
    pair = SHAPES[shape]
    model, stops = build(pair, "student"), stop_ids(pair, stop_share)
    model.generation_config.pad_token_id = 0
    generate: Any = model.generate
    ends = torch.tensor(stops)
    for step in range(turns.count):
        torch.manual_seed(step)
        ids = torch.tensor([prompt.prompt_ids for prompt in asked(prompts, seed=step)])
        turns.begin()
        made = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            eos_token_id=list(stops),
        )
        ended = torch.isin(made[:, ids.shape[1] :], ends).long()
        turns.end(tokens=int((ended.cumsum(1) - ended == 0).sum()))
