"""Keep of a finished run what the tests need, small enough to commit: `python keep_run.py RUN`, into `real_run`.

Numbers have five significant digits, rollouts and distributions are left out, and of the evaluations there are the summaries alone.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

from build_fixture import rounded

FOLDER = Path(__file__).with_name("real_run")
LOGS = ("metrics", "positions")


def keep(run: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name in ("recipe.yaml", "summary.json"):
        shutil.copy(run / name, FOLDER)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["command"]
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name in LOGS:
        records = [rounded(json.loads(line)) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in (run / "eval").glob("*/*.json"):
        summary = json.loads(path.read_text())
        samples = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        right = Counter({sample["id"]: 0 for sample in samples})
        right.update(sample["id"] for sample in samples if sample["status"] == "correct")
        (FOLDER / "eval" / path.parent.name).mkdir(parents=True)
        kept = json.dumps(rounded({"correct": right, **summary}))
        (FOLDER / "eval" / path.parent.name / path.name).write_text(kept + "\n")


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
