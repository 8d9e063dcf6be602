"""The finished student as a folder that anyone can load."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from poweropd.config import Recipe
from poweropd.evaluation.summary import Summaries
from poweropd.policy import Student

CARD = """\
---
library_name: transformers
base_model: {student}
tags: [on-policy-distillation, poweropd]
---

# {student}, distilled from {teacher}

Trained by on-policy distillation with poweropd: the student wrote its own
answers and the teacher judged every token.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```

* objective: `{objective}`
* steps: {steps}, {prompts} prompts a step, learning rate {lr:g}, seed {seed}
* data: `{data}`
* an answer ends with any of the token ids {stop_ids}, which `generation_config.json` declares

{results}
The licences of the student, the teacher and the data apply.
"""


def export_student(
    student: Student, folder: Path, recipe: Recipe, stop_ids: tuple[int, ...], evaluations: Mapping[str, Summaries]
) -> None:
    """Write weights, config, tokenizer and model card: beside `folder` first, then renamed. All ranks call.

    Args:
        stop_ids: tokens that end an answer.
        evaluations: by whose they are, for the card.
    """
    unfinished = folder.with_name(f".{folder.name}.partial")
    student.world.on_main(partial(shutil.rmtree, unfinished, ignore_errors=True))
    student.model.generation_config.eos_token_id = list(stop_ids)
    student.save(unfinished)
    card = CARD.format(
        student=recipe.student.model,
        teacher=" and ".join(dict.fromkeys(config.model for config in recipe.named_teachers.values())),
        folder=folder,
        objective=recipe.objective.build(),
        steps=recipe.train.steps,
        prompts=recipe.train.prompts_per_step,
        lr=recipe.optimizer.lr,
        seed=recipe.train.seed,
        data=", ".join(data.path or ", ".join(data.families) for data in recipe.data_sections.values()),
        stop_ids=list(stop_ids),
        results=_results(evaluations),
    )

    def finish() -> None:
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    student.world.on_main(finish)


def _results(evaluations: Mapping[str, Summaries]) -> str:
    rows = [(when, summary) for when, summaries in evaluations.items() for summary in summaries.values()]
    if not rows:
        return ""
    k = rows[0][1]["samples"]
    keys = [f"avg_at_{k}", f"pass_at_{k}", "mean_length", "truncation"]
    lines = ["| | problems | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    lines += [
        f"| {when} | {summary['title']} | " + " | ".join(f"{summary[key]:.3g}" for key in keys) + " |"
        for when, summary in rows
    ]
    return "\n".join(lines) + "\n"
