"""Verdict, tables and figures against numbers computed here from the files of the committed run."""

import json
import re
import shutil
from pathlib import Path
from statistics import NormalDist, median

import numpy as np
import pytest
from fixtures import FIXTURE, REAL, drawn, edit_summaries, lines, summary, variant, write_lines

from poweropd.report.figure import TEACHER
from poweropd.report.figures import figures
from poweropd.report.figures.curves import thinned
from poweropd.report.runs import read_run
from poweropd.report.tables import Table, results_table, tables
from poweropd.report.verdict import change, comparison, headline, ranking, verdict

BENCHMARKS = ("gsm8k", "math500")


def share_of_correct(place: str, benchmark: str, folder: Path = FIXTURE) -> dict[str, float]:
    found = summary(folder, place, benchmark)
    return {problem: count / found["samples"] for problem, count in found["correct"].items()}


def accuracy(place: str, problems: set[str] | None = None) -> float:
    """The mean over benchmarks of the share of correct samples."""
    means = []
    for benchmark in BENCHMARKS:
        shares = share_of_correct(place, benchmark)
        means.append(np.mean([share for key, share in shares.items() if problems is None or key in problems]))
    return float(np.mean(means))


def differences(first: str, second: str) -> list[np.ndarray]:
    return [
        np.array([share_of_correct(second, name)[key] - share for key, share in share_of_correct(first, name).items()])
        for name in BENCHMARKS
    ]


def table(title: str, *folders: Path) -> Table:
    (found,) = (t for t in tables([read_run(folder) for folder in folders or (FIXTURE,)]) if t.title == title)
    return found


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_the_answer_is_the_paired_difference_and_the_share_of_the_gap() -> None:
    before, after, teacher = (accuracy(place) for place in ("000000", "000060", "teacher"))
    changes = differences("000000", "000060")
    # the interval of a mean of two means, by the normal approximation instead of resampling
    error = np.sqrt(sum(values.var() / len(values) for values in changes)) / 2
    middle, width = after - before, NormalDist().inv_cdf(0.975) * error
    found = change(read_run(FIXTURE))
    assert found is not None
    assert found.paired is not None
    assert found.paired.difference == pytest.approx((middle, middle - width, middle + width), abs=0.006)
    assert found.paired.difference.mean == pytest.approx(middle)
    was, now = (
        {key: share for name in BENCHMARKS for key, share in share_of_correct(place, name).items()}
        for place in ("000000", "000060")
    )
    gained = sum(was[key] < 0.5 <= now[key] for key in was)
    lost = sum(now[key] < 0.5 <= was[key] for key in was)
    assert (found.paired.gained, found.paired.lost, found.paired.problems) == (gained, lost, 100)
    closed = (after - before) / (teacher - before)
    answer, problems, length = verdict([read_run(FIXTURE)])
    assert answer.startswith("The student came closer to the teacher: Avg@4 went from ")
    assert numbers(answer)[:3] == pytest.approx([before, after, middle], abs=6e-4)
    assert answer.endswith(f"over 100 problems; the teacher has {teacher:.3f}, so {closed:.0%} of the gap is closed.")
    assert problems.startswith(f"It gained {gained} problems and lost {lost}, ")
    assert length.startswith("Its answers are 16% shorter (45 to 38 tokens)")
    assert numbers(headline(read_run(FIXTURE)))[:3] == pytest.approx([before, after, middle], abs=6e-4)


def test_a_real_run() -> None:
    (name,) = (path.stem for path in (REAL / "eval" / "teacher").glob("*.json"))
    before, after, teacher = (share_of_correct(place, name, REAL) for place in ("000000", "000080", "teacher"))
    levels = [float(np.mean(list(shares.values()))) for shares in (before, after, teacher)]
    answer = verdict([read_run(REAL)])[0]
    assert answer.startswith("The student came closer to the teacher: Avg@4 went from 0.332 to 0.590 in 80 steps")
    assert numbers(answer)[:3] == pytest.approx([levels[0], levels[1], levels[1] - levels[0]], abs=6e-4)
    changes = np.array([after[key] - share for key, share in before.items()])
    width = NormalDist().inv_cdf(0.975) * changes.std() / len(changes) ** 0.5
    assert numbers(answer)[3:5] == pytest.approx([changes.mean() - width, changes.mean() + width], abs=0.01)


def test_what_cannot_be_told_apart_is_not_called_better(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    for benchmark in BENCHMARKS:  # after training one problem is solved once more, and another once less
        found = summary(folder, "000000", benchmark)
        correct = dict(found["correct"])
        up = next(key for key, count in correct.items() if count == 1)
        down = next(key for key, count in correct.items() if count == 2)
        correct[up], correct[down] = 2, 1
        (folder / "eval" / "000060" / f"{benchmark}.json").write_text(json.dumps({**found, "correct": correct}))
    answer = verdict([read_run(folder)])[0]
    assert answer.startswith("The change is not distinguishable from no change: ")
    assert "gap" not in answer
    line = headline(read_run(folder))
    assert "not distinguishable from no change" in line
    assert "gap" not in line


def test_a_student_that_got_worse_is_said_to_have(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    (folder / "eval" / "000000").rename(tmp_path / "first")
    (folder / "eval" / "000060").rename(folder / "eval" / "000000")
    (tmp_path / "first").rename(folder / "eval" / "000060")
    assert verdict([read_run(folder)])[0].startswith("The student got worse: Avg@4 went from")


def test_few_problems_are_said_to_be_few(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    shutil.rmtree(folder / "eval" / "000030")
    edit_summaries(folder, lambda place, found: {**found, "correct": dict(list(found["correct"].items())[:4])})
    run = read_run(folder)
    answer = verdict([run])[0]
    assert answer.startswith("The student did better on few problems, which is not certain: Avg@4 went from ")
    assert "over 8 problems, too few for the interval to be trusted" in answer
    assert "on few problems" in headline(run)
    other = read_run(variant(tmp_path / "other"))
    assert not any(
        "gap" in text or "distinguishable lead" in text for text in (answer, headline(run), *verdict([run, other]))
    )


def test_results_and_benchmarks() -> None:
    results = results_table([read_run(FIXTURE)])
    assert results.headings == ["", "Avg@4", "Pass@4", "Maj@4", "length", "cut", "repeated", "minutes"]
    rows = {row[0]: row[1:] for row in results.rows}
    assert list(rows) == ["teacher", "student before", "student after"]
    for name, place in (("teacher", "teacher"), ("student before", "000000"), ("student after", "000060")):
        assert float(rows[name][0].split()[0]) == pytest.approx(accuracy(place), abs=6e-4)
        solved = [np.mean([share > 0 for share in share_of_correct(place, b).values()]) for b in BENCHMARKS]
        assert float(rows[name][1]) == pytest.approx(np.mean(solved), abs=6e-4)
        assert float(rows[name][2]) == pytest.approx(
            np.mean([summary(FIXTURE, place, b)["maj_at_4"] for b in BENCHMARKS]), abs=6e-4
        )
    assert rows["student after"][-1] == "2.5"
    benchmarks = table("Benchmarks")
    assert benchmarks.headings == ["", "GSM8K", "MATH-500", "mean"]
    (row,) = (row for row in benchmarks.rows if row[0] == "Avg@4 student after")
    means = [100 * np.mean(list(share_of_correct("000060", b).values())) for b in BENCHMARKS]
    assert [float(cell.rstrip("*")) for cell in row[1:]] == pytest.approx([*means, np.mean(means)], abs=0.06)
    assert all(cell.endswith("*") for cell in row[1:])
    assert not any("*" in cell for row in benchmarks.rows if "teacher" in row[0] or "before" in row[0] for cell in row)


def test_columns_are_in_the_order_of_the_paper(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    names = ["olympiadbench", "aime25", "mine", "minerva_math", "aime24", "amc23"]
    for place in ("teacher", "000000", "000060"):
        for name in names:
            copy = {**summary(folder, place, "gsm8k"), "benchmark": name, "title": name.upper()}
            (folder / "eval" / place / f"{name}.json").write_text(json.dumps(copy))
    assert table("Benchmarks", folder).headings == [
        "", "GSM8K", "MATH-500", "AMC23", "AIME24", "AIME25", "MINERVA_MATH", "OLYMPIADBENCH", "MINE", "mean",
    ]  # fmt: skip


def test_pairs_cost_and_grading(tmp_path: Path) -> None:
    pairs = {row[0]: row[1:] for row in table("On the same problems").rows}
    assert list(pairs) == ["after - before", "teacher - after"]
    for name, places in (("after - before", ("000000", "000060")), ("teacher - after", ("000060", "teacher"))):
        expected = np.mean([values.mean() for values in differences(*places)])
        assert numbers(pairs[name][0])[0] == pytest.approx(expected, abs=6e-4)
        assert pairs[name][3] == "100"
    metrics = lines(FIXTURE, "metrics")
    (cost,) = table("Cost").rows
    total = sum(record["time/step"] for record in metrics)
    assert cost[1:] == [
        f"{median(record['time/step'] for record in metrics):.2f}",
        f"{np.mean([record['tokens_per_second'] for record in metrics]):,.0f}",
        "1.5",
        *(f"{sum(r[f'time/{phase}'] for r in metrics) / total:.0%}" for phase in ("rollout", "teacher", "update")),
        f"{total / 3600:.2f}",
    ]
    grading = table("Grading")
    assert grading.headings[1:] == ["correct", "wrong", "no answer", "unparsable", "timeout"]
    (after,) = (row for row in grading.rows if row[0] == "student after")
    right = sum(sum(summary(FIXTURE, "000060", b)["correct"].values()) for b in BENCHMARKS)
    assert after[1:] == [str(right), str(400 - right - 6), "6", "0", "0"]
    plain = variant(tmp_path / "run")
    edit_summaries(plain, lambda place, found: {**found, "status": {"correct": 1, "wrong": 399}})
    assert "Grading" not in {t.title for t in tables([read_run(plain)])}


def test_accuracy_over_training_is_on_the_problems_that_every_evaluation_asked() -> None:
    """The evaluation during training asks half of them."""
    asked = {key for name in BENCHMARKS for key in share_of_correct("000030", name)}
    figure = drawn([read_run(FIXTURE)])["accuracy"]
    student, teacher = figure.lines
    assert student.x == [0, 30, 60]
    assert student.y == pytest.approx([accuracy(place, asked) for place in ("000000", "000030", "000060")])
    assert all(low < y < high for low, y, high in zip(student.low, student.y, student.high, strict=True))
    assert teacher.run == TEACHER
    assert teacher.y == pytest.approx([accuracy("teacher", asked)] * 2)
    assert "On what every evaluation asked: GSM8K, MATH-500, 50 problems." in figure.caption


def test_the_reward_figures() -> None:
    run = drawn([read_run(FIXTURE)])
    last = lines(FIXTURE, "distributions")[-1]
    (bars,) = run["reward-distribution"].bars
    edges, counts = np.array(last["reward"]["edges"]), np.array(last["reward"]["counts"])
    assert set(bars.edges) <= set(edges)
    assert (bars.edges[0], bars.edges[-1]) == (edges[0], edges[-1])
    for low, high, height in zip(bars.edges, bars.edges[1:], bars.heights, strict=False):
        inside = counts[(edges[:-1] >= low) & (edges[1:] <= high)].sum()
        assert height * (high - low) == pytest.approx(inside / last["tokens"])
        assert high - low >= 0.99 * (edges[-1] - edges[0]) / 100 or high == edges[-1]
    assert run["reward-distribution"].log_y
    bins = [record for record in lines(FIXTURE, "positions") if record["step"] == 59]
    (line,) = run["reward-by-position"].lines
    assert (line.y, line.low, line.high) == tuple([b[f"reward/{q}"] for b in bins] for q in ("mean", "p5", "p95"))
    assert line.x[0] == 1
    assert all(b["first"] + 1 <= x <= b["last"] + 1 for b, x in zip(bins, line.x, strict=True))
    weight, tokens = run["gradient-share"].lines
    assert sum(weight.y) == pytest.approx(1, abs=1e-3)
    assert tokens.y == pytest.approx([b["tokens"] / sum(b["tokens"] for b in bins) for b in bins])
    metrics = lines(FIXTURE, "metrics")
    assert [line.name for line in run["reward-extremes"].lines] == ["min", "p1", "p99", "max"]
    assert run["reward-extremes"].lines[0].y == [record["reward/min"] for record in metrics]
    plane = run["reward-plane"].plane
    assert plane is not None
    assert sum(map(sum, plane.counts)) == last["tokens"]
    for student, teacher, count, reward in last["plane"]["cells"]:
        assert (plane.values[teacher][student], plane.counts[teacher][student]) == (reward, count)
    assert sum(value is not None for row in plane.values for value in row) == len(last["plane"]["cells"])


def test_every_figure_says_what_is_healthy_and_has_a_key_of_its_own() -> None:
    found = [figure for section in figures([read_run(FIXTURE)]) for figure in section.figures]
    assert [section.title for section in figures([read_run(FIXTURE)])] == [
        "Over training", "The reward", "The update", "The cost",
    ]  # fmt: skip
    assert len({figure.key for figure in found}) == len(found) >= 25
    assert all(re.fullmatch(r"[a-z0-9-]+", figure.key) for figure in found)
    assert [figure.key for figure in found if "ealthy" not in figure.caption or figure.caption[-1] != "."] == []
    assert {"mismatch", "staleness"}.isdisjoint(figure.key for figure in found)  # nothing to see


def test_mismatch_and_staleness_are_drawn_when_there_is_something_to_see(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run", lambda r: {**r, "rollout/mismatch": 0.01, "staleness/max": r["step"] % 3})
    assert {"mismatch", "staleness"} <= drawn([read_run(folder)]).keys()


def test_several_runs(tmp_path: Path) -> None:
    """The second solves every third problem in all samples and else does as the first, the third is as the first was."""
    paths = [variant(tmp_path / name) for name in ("one", "two", "three")]
    expected = []
    for benchmark in BENCHMARKS:
        found = summary(FIXTURE, "000060", benchmark)
        better = {key: 4 if i % 3 == 0 else count for i, (key, count) in enumerate(found["correct"].items())}
        expected.append(np.mean([(better[key] - count) / 4 for key, count in found["correct"].items()]))
        (paths[1] / "eval/000060" / f"{benchmark}.json").write_text(json.dumps({**found, "correct": better}))
        shutil.copy(FIXTURE / f"eval/000000/{benchmark}.json", paths[2] / f"eval/000060/{benchmark}.json")
    recipe = paths[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("alpha: 5", "alpha: 1"))
    runs = [read_run(path) for path in paths]
    assert [run.name for run, _ in ranking(runs)] == ["two", "one", "three"]
    lead, differing = verdict(runs)
    assert lead.startswith("two has the highest Avg@4, ")
    assert numbers(lead)[1] == pytest.approx(np.mean(expected), abs=6e-4)
    assert "more than one over 100 problems, a distinguishable lead" in lead
    assert differing == "The recipes differ in objective.alpha; all else is equal."
    pairs = [row[0] for row in table("On the same problems", *paths).rows]
    assert pairs == [*(f"{run.name}: after - before" for run in runs), "two - one", "two - three"]
    assert [row[0] for row in results_table(runs).rows] == ["teacher", "student before", "one", "two", "three"]
    found = drawn(runs)
    assert [line.name for line in found["accuracy"].lines] == ["one", "two", "three", "teacher"]
    assert all(line.low for line in found["accuracy"].lines[:3])
    assert {"reward-plane-1", "reward-plane-2", "reward-plane-3"} <= found.keys()
    many = drawn([*runs, *runs])
    assert not any(line.low for figure in many.values() for line in figure.lines)
    assert len(many["reward-extremes"].lines) == 6
    assert "reward-plane-5" not in many


def test_a_teacher_of_several_runs_is_shown_once_and_another_by_its_run(tmp_path: Path) -> None:
    paths = [variant(tmp_path / name) for name in ("one", "two", "three")]
    for path in paths[1:]:
        shutil.copy(path / "eval/000060/gsm8k.json", path / "eval/teacher/gsm8k.json")
    runs = [read_run(path) for path in paths]
    names = [row[0] for row in results_table(runs).rows]
    assert names == ["teacher", "teacher of two", "student before", "one", "two", "three"]
    assert [line.name for line in drawn(runs)["accuracy"].lines][3:] == ["teacher", "teacher of two"]


def test_equal_runs_have_no_distinguishable_lead(tmp_path: Path) -> None:
    runs = [read_run(variant(tmp_path / name)) for name in ("one", "two")]
    lead, differing = verdict(runs)
    assert lead.startswith("one and two are level with the highest Avg@4, 0.")
    assert "lead" not in lead
    assert differing == comparison(runs) == "The recipes are equal."


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("student-0.6b", "student-8b", "differ in student.model"),
        ("teacher-4b", "teacher-8b", "differ in teacher.model"),
        ("problems.jsonl", "others.jsonl", "differ in data.path"),
        ("samples: 4", "samples: 2", "differ in evaluation.samples"),
        ("lr: 1.0e-06", "lr: 2.0e-06", ""),
        ("every: 30", "every: 20", ""),
    ],
)
def test_what_is_not_like_with_like_is_said(tmp_path: Path, old: str, new: str, told: str) -> None:
    one, two = (variant(tmp_path / name) for name in ("one", "two"))
    recipe = two / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(old, new))
    text = " ".join(verdict([read_run(one), read_run(two)]))
    assert ("does not compare like with like" in text) == bool(told)
    assert told in text


def test_runs_that_cannot_be_ranked(tmp_path: Path) -> None:
    one, two = (variant(tmp_path / name) for name in ("one", "two"))
    shutil.rmtree(two / "eval" / "000060")
    (two / "eval" / "000030").rename(two / "eval" / "000045")
    (two / "manifest.json").write_text('{"status": "interrupted"}')
    text = verdict([read_run(one), read_run(two)])
    assert text[0] == "two was interrupted after 60 of 60 steps."
    assert text[-1].endswith("their last evaluations are after 45 and 60 steps.")
    shutil.rmtree(two / "eval")
    text = verdict([read_run(one), read_run(two)])
    assert "Without an evaluation after training, and so not ranked: two." in text[0]
    assert text[1].startswith("one: Avg@4 on held-out problems went from")
    edit_summaries(one, lambda place, found: {**found, "correct": {f"x{k}": c for k, c in found["correct"].items()}})
    other = variant(tmp_path / "other")
    text = verdict([read_run(one), read_run(other)])
    assert text[0] == "No two of these runs were evaluated on the same problems, so which is best is not known."


def test_benchmarks_of_another_version_are_not_compared(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    edit_summaries(folder, lambda place, found: {**found, "version": 2 if found["benchmark"] == "gsm8k" and place == "000060" else 1})  # fmt: skip
    found = change(read_run(folder))
    assert found is not None
    assert found.paired is not None
    assert found.paired.problems == 40


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path: Path) -> None:
    folder = variant(tmp_path / "run")
    rng = np.random.default_rng(0)
    norms = rng.lognormal(0, 0.3, 10_000)
    norms[[1234, 8765]] = [1e-4, 500.0]
    first = lines(folder, "metrics")[0]
    write_lines(folder, "metrics", [{**first, "step": i, "grad_norm": float(norm)} for i, norm in enumerate(norms)])
    run = read_run(folder)
    every = [line for figure in drawn([run]).values() for line in figure.lines]
    assert max(len(line.x) for line in every) <= 600
    (line,) = drawn([run])["gradient-norm"].lines
    points = dict(zip(line.x, line.y, strict=True))
    assert (points[1234], points[8765]) == pytest.approx((1e-4, 500.0))
    assert (line.x[0], line.x[-1]) == (0, 9999)
    assert line.x == sorted(line.x)


@pytest.mark.parametrize("count", [1, 599, 600, 601, 1234, 10_000])
def test_thinned_lines_are_made_of_their_points(count: int) -> None:
    x = [float(place) for place in range(count)]
    y = np.random.default_rng(count).normal(size=count).tolist()
    kept, values = thinned(x, y)
    assert len(kept) == len(values) == min(count, len(kept)) <= 600
    assert all(y[int(place)] == value for place, value in zip(kept, values, strict=True))
    assert (min(values), max(values)) == (min(y), max(y))
    if count <= 600:
        assert (kept, values) == (x, y)
