"""Peak memory and time of one loss and its gradient at a real vocabulary: `python benchmarks/memory.py`.

Each measurement is a process of its own; memory is its peak resident size above that with the hidden states and heads
loaded, scoring by the teacher and the gradient of the LM head included. The unit is one fp32 tensor of [tokens,
vocabulary]. `naive` builds both models' log-softmaxes over the whole vocabulary, as the authors of PowerOPD do (written
here from the formulas).

On a GPU (`--device cuda`) memory is the peak allocated. Prints a table and writes benchmarks/results/memory-<name>.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import replace

import torch

from poweropd.objectives import OBJECTIVES, build
from poweropd.objectives.fused import token_scores
from poweropd.objectives.lm_head import Distribution, LMHead
from poweropd.objectives.loss import loss_of
from poweropd.objectives.objective import Shaped
from poweropd.objectives.positions import TokenInputs

HIDDEN, TEACHER_HIDDEN = 256, 512
METHODS = [*(name for name, row in OBJECTIVES.items() if not row.on_golden_answers), "naive power", "naive reverse_kl"]


def measure(method: str, tokens: int, vocabulary: int, device: str) -> dict[str, float]:
    """Memory in units of [tokens, vocabulary] fp32, and seconds, of one forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN, device=device).mul_(0.1).requires_grad_()
    teacher_hidden = torch.randn(tokens, TEACHER_HIDDEN, device=device)
    teacher_weight = torch.randn(vocabulary, TEACHER_HIDDEN, device=device).mul_(0.1)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    torch.mm(hidden[:8], hidden[:8].T).sum().item()  # starts the thread pool and the libraries
    before, start = _memory(device), time.perf_counter()
    if method.startswith("naive "):
        loss = _naive(build(method.removeprefix("naive ")), hidden, weight, teacher_hidden, teacher_weight, targets)
    else:
        objective = build(method)
        teacher = Distribution((teacher_hidden,), (LMHead(teacher_weight, vocab_size=vocabulary),))
        head = LMHead(weight, vocab_size=vocabulary)
        inputs = TokenInputs(targets, teacher=teacher)
        if objective.needs != "full":
            k = objective.k if objective.needs == "top_k" else 0
            inputs = TokenInputs(targets, *token_scores(teacher_hidden, teacher.heads[0], targets, k=k))
        if objective.needs_of_reference == "full":
            inputs = replace(
                inputs, reference=Distribution((hidden.detach(),), (replace(head, weight=weight.detach()),))
            )
        shaped = Shaped(*torch.ones(2, tokens, device=device)) if objective.needs_whole_step else None
        loss = loss_of(objective, hidden, head, inputs, denominator=tokens, shaped=shaped).loss
    loss.backward()
    loss.item()
    return {"memory": (_memory(device) - before) / (tokens * vocabulary * 4), "seconds": time.perf_counter() - start}


def _naive(objective, hidden, weight, teacher_hidden, teacher_weight, targets):  # type: ignore[no-untyped-def]
    student = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax((teacher_hidden @ teacher_weight.T).float(), -1)
    if objective.needs == "full":
        return objective.full(student, teacher).mean()
    student, teacher = (logprobs.gather(1, targets[:, None])[:, 0] for logprobs in (student, teacher))
    return -(objective.sampled(student, teacher) * student).mean()


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default=platform.node() or "machine")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--flush-denormals", action="store_true", help="on one thread")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.flush_denormals:  # holds for the calling thread alone
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.vocabulary, args.device)))
        return
    command = [sys.executable, __file__, "--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary)]
    command += ["--device", args.device, *(["--flush-denormals"] if args.flush_denormals else [])]
    found: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for _ in range(args.repeats):  # interleaved, so that a busy moment does not fall on one method
        for method in args.methods:
            output = subprocess.run([*command, "--one", method], capture_output=True, text=True, check=True).stdout
            found[method].append(json.loads(output))
    unit = args.tokens * args.vocabulary * 4 / 2**30
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, one [tokens, vocabulary] fp32 is {unit:.2f} GiB")
    print("| objective | memory, x [tokens, vocabulary] | seconds, median (range) |\n|---|---|---|")
    for method, runs in found.items():
        seconds = sorted(run["seconds"] for run in runs)
        memory = max(run["memory"] for run in runs)
        print(f"| {method} | {memory:.2f} | {statistics.median(seconds):.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f}) |")
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "platform": platform.platform()}
    setting = {key: getattr(args, key) for key in ("tokens", "vocabulary", "device", "flush_denormals")}
    path = Path(__file__).parent / "results" / f"memory-{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "setting": setting, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
