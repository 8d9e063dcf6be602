"""Numbers to one self-contained page."""

from html import escape
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
import yaml

from poweropd.report.figure import Figure, Line
from poweropd.report.figures import figures
from poweropd.report.runs import Record, RunData
from poweropd.report.tables import Table, tables
from poweropd.report.verdict import verdict

# Okabe and Ito's colours, told apart by people with any colour vision, in light and dark.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d3b", "#7fd35f", "#9467bd", "#bcbd22"]
TEACHER_COLOUR = "#888888"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 1.5rem;
  max-width: 72rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.answer { font-size: 1.15rem; max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; } figure h3 { font-size: 1rem; margin: 0; }
.rollout { border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; margin: .75rem 0; }
.tokens { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .9rem; line-height: 1.7; }
.tokens span { border-radius: 3px; } pre { overflow-x: auto; font-size: .85rem; }
"""

# Plots take the ink of the page, also when the reader's system changes between light and dark.
SCRIPT = """
function paint() {
  const css = getComputedStyle(document.documentElement);
  const ink = css.getPropertyValue('--ink').trim(), line = css.getPropertyValue('--line').trim();
  const soft = css.getPropertyValue('--soft').trim();
  for (const plot of document.querySelectorAll('.plotly-graph-div'))
    Plotly.relayout(plot, {'font.color': ink, 'xaxis.gridcolor': line, 'yaxis.gridcolor': line,
      'xaxis.zerolinecolor': line, 'yaxis.zerolinecolor': line, 'modebar.bgcolor': 'transparent',
      'modebar.color': line, 'modebar.activecolor': soft});
}
paint();
document.querySelectorAll('.plotly-graph-div').forEach(plot => Plotly.Plots.resize(plot)); // the first was drawn alone
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
"""


def write_report(runs: list[RunData], path: Path) -> None:
    """One page about a run, or about several side by side, that needs no network."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_page(runs), encoding="utf-8")
    partial.replace(path)


def _page(runs: list[RunData]) -> str:
    drawn = [figure for section in figures(runs) for figure in section.figures]
    plots = "\n".join(_figure(figure, first=index == 0) for index, figure in enumerate(drawn))
    title = f"{runs[0].objective}: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    answer = " ".join(verdict(runs))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<main>
<h1>{escape(title)}</h1>
<p class="answer">{escape(answer)}</p>
{"".join(_follows(run, named=len(runs) > 1) for run in runs)}
<p class="soft">{escape(_provenance(runs[0]))}</p>
{_notes(runs)}
{"".join(_table(table) for table in tables(runs))}
<h2>Curves</h2>
<div class="figures">{plots}</div>
{_rollouts(runs[0]) if len(runs) == 1 else ""}
<h2>Recipe</h2>
{"".join(_recipe(run) for run in runs)}
</main>
<script>{SCRIPT if drawn else ""}</script>
</body></html>
"""


def _follows(run: RunData, *, named: bool) -> str:
    """What the objective's expected update is the gradient of, as the trainer wrote it down."""
    text = run.manifest.get("gradient_of")
    name = f"{run.name}: its" if named else "The"
    return f"<p>{escape(name)} expected update follows the gradient of {escape(text)}.</p>" if text else ""


def _provenance(run: RunData) -> str:
    machine = run.manifest.get("machine", {})
    versions = run.manifest.get("versions", {})
    parts = [
        run.models,
        f"seed {run.section('train').get('seed', '?')}",
        str(run.manifest.get("started", "")),
        f"{machine.get('gpu') or machine.get('processor', '')}, {machine.get('cores', '?')} cores",
        ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    return " · ".join(part for part in parts if part)


def _notes(runs: list[RunData]) -> str:
    notes = []
    for run in runs:
        status = run.manifest.get("status", "unknown")
        if status != "finished":
            notes.append(
                f"{run.name}: {status}; its last logged step is {run.metrics[-1]['step'] if run.metrics else 'none'}."
            )
        if run.skipped_lines:
            notes.append(f"{run.name}: {run.skipped_lines} unfinished log lines were left out.")
    return "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.headings)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="soft">{escape(table.note)}</p>'
    )


def _figure(figure: Figure, *, first: bool) -> str:
    plot = go.Figure()
    for line in figure.lines:
        for trace in _traces(line):
            plot.add_trace(trace)
    for bars in figure.bars:
        plot.add_trace(go.Bar(x=bars.edges[:-1], y=bars.heights, name=bars.name))
    if figure.plane is not None:
        plot.add_trace(go.Heatmap(x=figure.plane.x_edges, y=figure.plane.y_edges, z=figure.plane.values))
    plot.update_layout(
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        height=320,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.25},
        xaxis={"title": figure.x_label, "type": "log" if figure.log_x else "linear"},
        yaxis={"title": figure.y_label, "type": "log" if figure.log_y else "linear"},
        showlegend=len(figure.lines) > 1,
    )
    drawing = plotly.io.to_html(
        plot,
        full_html=False,
        include_plotlyjs=first,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "zoom2d", "autoScale2d"]]},
    )
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure aria-label="{escape(figure.title)}"><h3>{escape(figure.title)}</h3>{drawing}{caption}</figure>'


def _traces(series: Line) -> list[go.Scatter]:
    colour = TEACHER_COLOUR if series.run < 0 else COLOURS[series.run % len(COLOURS)]
    line = go.Scatter(
        x=series.x,
        y=series.y,
        name=series.name,
        legendgroup=series.name,
        mode="lines+markers" if len(series.x) < 12 and series.run >= 0 else "lines",
        line={"color": colour, "dash": series.style, "width": 2},
    )
    if not series.low:
        return [line]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    band = go.Scatter(
        x=[*series.x, *reversed(series.x)],
        y=[*series.high, *reversed(series.low)],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        line={"width": 0},
        legendgroup=series.name,
        showlegend=False,
        hoverinfo="skip",
    )
    return [band, line]


def _rollouts(run: RunData) -> str:
    if not run.rollouts:
        return ""
    steps = sorted({record["step"] for record in run.rollouts})
    chosen = [record for record in run.rollouts if record["step"] in (steps[0], steps[-1])]
    return (
        "<h2>A few rollouts</h2><p class='soft'>Each token is coloured by its training weight: blue is encouraged, "
        "orange discouraged. Point at one for its probabilities.</p>" + "".join(_rollout(record) for record in chosen)
    )


def _rollout(record: Record) -> str:
    weights = record["weights"]
    scale = max((abs(w) for w in weights if w is not None), default=0) or 1.0
    columns = zip(record["tokens"], weights, record["student_logprobs"], record["teacher_logprobs"], strict=False)
    tokens = "".join(_token(*column, scale) for column in columns)
    untrained = escape("".join(record["tokens"][len(weights) :]))
    return (
        f'<div class="rollout"><p class="soft">step {record["step"]} · {escape(record["id"])} · ended by '
        f"{escape(record['finish_reason'])}</p><p>{escape(record['prompt'])}</p>"
        f'<div class="tokens">{tokens}{untrained}</div></div>'
    )


def _token(text: str, weight: float | None, student: float | None, teacher: float | None, scale: float) -> str:
    strength = 0.0 if weight is None else min(abs(weight) / scale, 1.0)
    colour = "0,114,178" if (weight or 0) > 0 else "213,94,0"
    values = (("weight", weight), ("log q (student)", student), ("log p (teacher)", teacher))
    hint = ", ".join(f"{name} {value:.3f}" for name, value in values if value is not None)
    return f'<span style="background:rgba({colour},{0.6 * strength:.2f})" title="{escape(hint)}">{escape(text)}</span>'


def _recipe(run: RunData) -> str:
    text = yaml.safe_dump(run.recipe, sort_keys=False)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
