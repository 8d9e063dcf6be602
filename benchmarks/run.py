"""The benchmark suite: `make benchmark`, or `python benchmarks/run.py` for a part of it.

Contestants that do the same work take turns in processes of their own; every turn is written at once to
benchmarks/results/<machine>.json, and the tables of docs/performance.md are made from that file at the end. Peers run in
the environment given with --peers.
"""

import argparse
import fnmatch
import importlib
import json
import os
import sys
import time
from pathlib import Path

from suite.contests import Contest, contests
from suite.referee import hold
from suite.results import FOLDER, Results, cores, machine

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more work, 32k tokens and every objective: about an hour")
    parser.add_argument(
        "--only", metavar="PATTERN", help='contests whose names match, such as "step*"; others are kept'
    )
    parser.add_argument("--resume", action="store_true", help="leave out what the file of results holds already")
    parser.add_argument("--tables", action="store_true", help="measure nothing, make the tables anew")
    parser.add_argument("--list", action="store_true", help="name all contests and contestants")
    parser.add_argument("--one", nargs=2, metavar=("CONTEST", "CONTESTANT"), help="one turn of one contestant, printed")
    parser.add_argument("--threads", type=int, default=cores(), help="of every contestant (default: all cores)")
    parser.add_argument("--peers", type=Path, default=PEERS, help="python of the peers' environment")
    parser.add_argument("--results", type=Path, help="another file")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "performance.md", help="where the tables go")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], args.work[1], args.turns)
        return
    peers = args.peers if args.peers.is_file() else None
    here = machine(args.threads, peers)
    path = args.results or FOLDER / f"{here['name']}.json"
    if args.list or args.one:
        show(contests(full=True, bf16=True), args.one, peers, args.threads)
        return
    results = Results(path, here, keep=args.resume or args.tables or args.only is not None)
    if not args.tables:
        measure(results, args, peers)
    write_tables(results, args.docs)


def measure(results: Results, args: argparse.Namespace, peers: Path | None) -> None:
    """Hold all contests that are asked for."""
    if peers is not None:
        os.environ["BENCHMARK_PEERS"] = str(peers)
    start = time.monotonic()
    for name in [contest.name for contest in contests(full=args.full, bf16=False)]:
        asked_for = args.only is None or fnmatch.fnmatch(name, args.only)
        if not asked_for or (args.resume and results.is_done(name)):
            continue
        held = {contest.name: contest for contest in contests(full=args.full, bf16=bf16_pays(results))}[name]
        say(f"{time.monotonic() - start:5.0f}s  {name}")
        hold(held, results, peers=peers, threads=args.threads, say=say)
    say(f"{time.monotonic() - start:5.0f}s  {results.path}")


def bf16_pays(results: Results) -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32 ones, as far as is known."""
    from suite.floor import rates_of

    rates = rates_of(results.data)
    return rates is not None and rates.bf16 > rates.fp32


def write_tables(results: Results, docs: Path) -> None:
    from suite.tables import targets_text, write

    write(results.data, docs)
    say(f"{docs}\n\n{targets_text(results.data)}")


def work(function: str, options: str, turns: int) -> None:
    """Be a contestant."""
    from suite.turns import Turns

    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(Turns(turns), **json.loads(options))


def show(known: list[Contest], one: list[str] | None, peers: Path | None, threads: int) -> None:
    """Name everything, or take one turn."""
    from suite.referee import Process

    if one is None:
        for contest in known:
            say(contest.name)
            for contestant in contest.contestants:
                say(f"    {contestant.name}")
        return
    found = [own for contest in known if contest.name == one[0] for own in contest.contestants if own.name == one[1]]
    if not found:
        sys.exit(f"there is no {one[1]!r} in {one[0]!r}: see --list")
    python = peers if found[0].is_peer else Path(sys.executable)
    if python is None:
        sys.exit("that needs the peers' environment: see --peers")
    process = Process(found[0], python, 1, threads)
    process.wait()
    say(json.dumps(process.turn(), indent=1))
    process.close()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
