"""A plan in words."""

from collections.abc import Iterator, Sequence

from poweropd.config import label
from poweropd.pair import readable
from poweropd.plan.advice import Advice
from poweropd.plan.load import Load
from poweropd.plan.machines import GB, GIB, MACHINES, TERA, Machine
from poweropd.plan.memory import Memory, total
from poweropd.plan.timing import COMPUTE, Phase, seconds


def introduction(load: Load) -> Iterator[str]:
    """What is planned."""
    machine = load.machine
    name = "this machine" if machine.device == "cpu" else f"{load.gpus} x {machine.name}, each"
    rates = f"{machine.flops / 1e12:.4g} TFLOP/s, {machine.bandwidth / 1e9:.4g} GB/s"
    yield f"{name} {machine.memory / GIB:.4g} GiB, {rates}"
    for model, shape in [("student", load.student), *((label(each.name), each.shape) for each in load.teachers)]:
        yield f"{model} {readable(shape.parameters)} parameters, {shape.layers} layers, {shape.vocabulary:,} rows of LM head"
    yield (
        f"a step of {load.sequences} sequences a GPU, each of {load.prompt} + {load.response} tokens: as if no answer ended "
        "early; --prompt and --response say otherwise"
    )


def memory_lines(memory: Memory) -> Iterator[str]:
    """Every figure with what it rests on."""
    rows = [("memory of each GPU", "GiB", "because"), ("always", _gib(total(memory.always)), "")]
    rows += [(f"  {line.name}", _gib(line.bytes), line.why) for line in memory.always]
    for phase, lines in memory.phases.items():
        rows.append((phase, _gib(total(lines)), "the fullest phase" if phase == memory.fullest else ""))
        rows += [(f"  {line.name}", _gib(line.bytes), line.why) for line in lines]
    rows.append(("peak", _gib(memory.peak), "always and the fullest phase"))
    return _columns(rows)


def time_lines(phases: Sequence[Phase]) -> Iterator[str]:
    """The same of time."""
    whole = seconds(phases)
    rows: list[tuple[str, ...]] = [("time of a step", "s", "share", "TFLOP", "GB", "because")]
    for each in phases:
        work = (f"{amount:,.1f}" if amount else "" for amount in (each.flops / TERA, each.bytes / GB))
        rows.append((each.name, f"{each.seconds:.3g}", f"{each.seconds / whole:.0%}", *work, each.why))
    rows.append(("step", f"{whole:.3g}", "100%", "", "", "one phase after the other"))
    return _columns(rows)


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Names to the left, numbers to the right, reasons as long as they are."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, why in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=False)]
        yield "  ".join([f"{name:<{widths[0]}}", *cells, why]).rstrip()


def verdict(memory: Memory) -> str:
    """Whether it fits."""
    there = f"of {_gib(memory.room)} GiB that a run may take"
    return f"{'fits' if memory.fits else 'does not fit'}: {_gib(memory.peak)} GiB at the peak, {there}"


def advised(advice: Advice, before: Load, memory: Memory, time: float) -> Iterator[str]:
    """What to change, and the plan after it."""
    options = [f"--set '{setting}'" for change in advice.changes for setting in change.sets]
    if advice.load.gpus != before.gpus:
        options.append(f"--gpus {advice.load.gpus}")
    if not advice.fits:
        yield f"no change makes it fit; with all together it needs {_gib(memory.peak)} GiB: {' '.join(options)}"
        return
    yield f"the cheapest change that fits: {' '.join(options)}"
    for change in advice.changes:
        yield f"  {', '.join(change.sets)}: {change.cost}"
    yield f"  then {_gib(memory.peak)} GiB at the peak and {time:.3g} s a step"


def larger(memory: Memory) -> Machine | None:
    """The smallest GPU on which the same fits."""
    ordered = sorted(MACHINES.values(), key=lambda each: each.memory)
    return next((each for each in ordered if Memory(each, memory.always, memory.phases).fits), None)


def caution(machine: Machine) -> str:
    """What the figures are worth."""
    if machine.device == "cpu":
        return (
            "memory is a model, within 10 % of real runs on a CPU; times take the rates of the machine of docs/performance.md and "
            "are for comparison. docs/scaling.md says more"
        )
    return (
        f"memory and time are models, not yet measured on a GPU; times assume {COMPUTE:.0%} of the stated FLOP/s and are for "
        "comparison. docs/scaling.md says more"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
