"""Several `poweropd quickstart --compare --seed N` as one table: `python benchmarks/compare_seeds.py DIR DIR ...`.

Every figure is the mean over seeds and, behind it, the lowest and the highest if there are several. `gap` is the share of the distance
between the untrained student and the teacher that training closed.
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from poweropd.report.runs import RunData, read_run
from poweropd.report.scores import mean as over_benchmarks
from poweropd.report.verdict import change


def main(folders: list[Path]) -> None:
    arms: dict[str, list[RunData]] = defaultdict(list)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if (path / "summary.json").is_file():
                arms[path.name.replace("_", " ") if path.name.startswith("power") else path.name].append(read_run(path))
    print(
        "| objective | Avg@8 | gap closed | Pass@8 | length | cut | lowest log-ratio | largest gradient norm | s/step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, runs in sorted(arms.items(), key=lambda arm: -mean(_after(run, "avg") for run in arm[1])):
        cells = [
            _spread([_after(run, "avg") for run in runs], ".3f"),
            f"{mean(_gap(run) for run in runs):.0%}",
            _spread([_after(run, "pass") for run in runs], ".3f"),
            _spread([_after(run, "mean_length") for run in runs], ".1f"),
            f"{mean(_after(run, 'truncation') for run in runs):.1%}",
            f"{min(min(run.column('log_ratio/min')[1], default=0) for run in runs):.1f}",
            f"{max(max(run.column('grad_norm')[1]) for run in runs):.2g}",
            f"{mean(mean(run.column('time/step')[1]) for run in runs):.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def _after(run: RunData, measure: str) -> float:
    assert run.last is not None
    level = over_benchmarks(run.last[1], measure)
    assert level is not None
    return level.mean


def _gap(run: RunData) -> float:
    found = change(run)
    assert found is not None
    assert found.closed is not None
    return found.closed


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
