"""Rollouts against Hugging Face `generate`: `python benchmarks/rollout.py`.

The same model, prompts, sampling and precision, in turns, in one process. Draws differ, so tokens a second are compared,
counted up to each response's end token. The embedded pair has its own prompts and end tokens, and so has a model in a
folder; models of random weights, whose speed is that of any others, end with every n-th token of the vocabulary, so that
lengths are ragged. Prints a table.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from poweropd.assembly import assemble
from poweropd.config import load_recipe
from poweropd.models import load_model, load_tokenizer
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.types import Prompt
from poweropd.vocabulary import end_token_ids

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Case(NamedTuple):
    model: PreTrainedModel
    prompts: Sequence[Prompt]
    sampling: Sampling


def quickstart(name: str) -> Case:
    """`student` or `teacher` of the embedded pair, on a step of its recipe."""
    parts = assemble(load_recipe(ROOT / "recipes" / "quickstart.yaml", ["evaluation.data=null"]))
    model = load_model(f"quickstart:{name}", dtype=torch.float32, device=CPU)
    return Case(model, parts.stream.take(0, 48), parts.sampling)


def random_weights(hidden: int, layers: int, vocabulary: int, *, prompts: int, new: int, end_every: int) -> Case:
    """Qwen3's architecture; prompts of 16 to 64 tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    lengths = torch.randint(16, 65, (prompts,)).tolist()
    asked = [
        Prompt(f"p{i}", tuple(torch.randint(1, vocabulary, (length,)).tolist())) for i, length in enumerate(lengths)
    ]
    stops = tuple(range(0, vocabulary, end_every))
    return Case(Qwen3ForCausalLM(config).eval(), asked, Sampling(stop_ids=stops, max_new_tokens=new))


def folder(path: str, *, prompts: int, new: int) -> Case:
    tokenizer = load_tokenizer(path)
    texts = [f"What is {17 * i + 3} + {i}" + f", and then times {i % 4 + 2}" * (i % 4) + "?" for i in range(prompts)]
    asked = [Prompt(text, tuple(tokenizer(text)["input_ids"])) for text in texts]
    model = load_model(path, dtype=torch.float32, device=CPU)
    return Case(model, asked, Sampling(stop_ids=end_token_ids(model, tokenizer), max_new_tokens=new))


CASES: dict[str, Callable[[], Case]] = {
    "quickstart:student": lambda: quickstart("student"),
    "quickstart:teacher": lambda: quickstart("teacher"),
    "256 x 4, V 151,936": lambda: random_weights(256, 4, 151_936, prompts=16, new=32, end_every=20),
    "512 x 8, V 512": lambda: random_weights(512, 8, 512, prompts=32, new=64, end_every=64),
    "512 x 8, V 151,936": lambda: random_weights(512, 8, 151_936, prompts=16, new=32, end_every=20),
}


def hf_generate(case: Case, seed: int) -> int:
    """Tokens of the responses by Hugging Face `generate`, all prompts as one batch."""
    torch.manual_seed(seed)
    rows = [torch.tensor(prompt.prompt_ids) for prompt in case.prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    stops = torch.tensor(case.sampling.stop_ids)
    generate: Any = case.model.generate
    whole = generate(
        ids,
        attention_mask=(torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long(),
        max_new_tokens=case.sampling.max_new_tokens,
        do_sample=True,
        temperature=case.sampling.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=stops.tolist(),
        pad_token_id=int(stops[0]),
    )
    ended = torch.isin(whole[:, ids.shape[1] :], stops).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def measure(case: Case, *, rounds: int = 5, sequences: int = 256, precision: torch.dtype = torch.float32) -> dict:
    """Both, in turns of changing order: tokens a second (of the wall, and of all threads' CPU) of each round.

    Returns:
        `ours` and `hf`, each `{"tokens": [...], "wall": [...], "cpu": [...]}`; `wall_ratio` and `cpu_ratio`: medians,
        over the rounds, of our tokens a second over theirs.
    """
    engine = HFEngine(
        case.model,
        vocab_size=case.model.config.vocab_size,
        pad_id=0,
        precision=precision,
        sequences_per_batch=sequences,
    )
    ways: dict[str, Callable[[int], int]] = {
        "ours": lambda seed: sum(map(len, engine.generate(case.prompts, case.sampling, seed=seed))),
        "hf": lambda seed: hf_generate(case, seed),
    }
    short = replace(case.sampling, max_new_tokens=4)
    engine.generate(case.prompts, short, seed=0)
    hf_generate(case._replace(sampling=short), 0)
    found: dict[str, Any] = {name: {"tokens": [], "wall": [], "cpu": []} for name in ways}
    for seed in range(1, rounds + 1):
        for name in sorted(ways, reverse=bool(seed % 2)):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = ways[name](seed)
            found[name]["wall"].append(tokens / (time.perf_counter() - wall))
            found[name]["cpu"].append(tokens / (time.process_time() - cpu))
            found[name]["tokens"].append(tokens)
    for clock in ("wall", "cpu"):
        pairs = zip(found["ours"][clock], found["hf"][clock], strict=True)
        found[f"{clock}_ratio"] = statistics.median(ours / hf for ours, hf in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", help="a model's folder as one more case")
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.cases}
    if args.folder:
        cases[args.folder] = lambda: folder(args.folder, prompts=16, new=24)
    print("tokens a CPU second, median (range)")
    print("| model | threads | ours | HF generate | ratio, CPU | ratio, wall |\n|---|---|---|---|---|---|")
    for name, make in cases.items():
        case = make()
        for threads in args.threads:
            torch.set_num_threads(threads)
            found = measure(case, rounds=args.rounds)
            speeds = [sorted(found[way]["cpu"]) for way in ("ours", "hf")]
            cells = [f"{statistics.median(each):,.0f} ({each[0]:,.0f}-{each[-1]:,.0f})" for each in speeds]
            ratios = f"{found['cpu_ratio']:.2f} | {found['wall_ratio']:.2f}"
            print(f"| {name} | {threads} | {' | '.join(cells)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
