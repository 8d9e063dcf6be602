"""The verb about the table of objectives."""

import sys
from typing import Annotated

import typer

from poweropd.cli.shared import Debug, app, console, plain_errors


@app.command()
def objectives(
    check: Annotated[
        str | None, typer.Option(help="Examine one: a name of the table, or `module:attribute` of a file of yours.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="As docs/objectives.md.")] = False,
    debug: Debug = False,
) -> None:
    """The table of objectives: equation, what it needs of the teacher, what its gradient is of, source.

    Example: `poweropd objectives --check my_module:my_objective`
    """
    with plain_errors(debug):
        from poweropd.objectives.describe import as_markdown, facts

        if check is not None:
            _check_objective(check)
        elif markdown:
            sys.stdout.write(as_markdown())
        else:
            from poweropd.objectives import OBJECTIVES

            for name in OBJECTIVES:
                console.print(f"[bold]{name}[/bold]")
                for label, text in facts(name):
                    console.print(f"  {label:<18} {text}", markup=False)


def _check_objective(name: str) -> None:
    from poweropd.errors import ConfigError
    from poweropd.objectives.conformance import check

    try:
        findings = check(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for finding in findings:
        verdict = "[green]ok  [/green]" if finding.holds else "[red]fail[/red]"
        console.print("[dim]-   [/dim]" if finding.reason else verdict, finding.title, end="")
        remark = finding.problem or (f"does not apply: {finding.reason}" if finding.reason else "")
        console.print(f": {remark}" if remark else "", markup=False)
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)
