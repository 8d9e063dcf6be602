"""One short run of the quickstart for every objective, estimator, shaping and source of trajectories.

`python benchmarks/compare_methods.py --out DIR` trains them, as many at once as there are cores; with `--only` some of
them. `python benchmarks/compare_seeds.py DIR` then prints the table. All share problems, order, random numbers and
learning rate: what differs is on the lines below.
"""

import argparse
from pathlib import Path

from rich.console import Console

from poweropd.config import load_recipe
from poweropd.console import ConsoleObserver
from poweropd.objectives import OBJECTIVES
from poweropd.quickstart.compare import Arm, train_all
from poweropd.quickstart.run import RECIPE

SAMPLED = "objective.estimator=sampled"
PLUS = [SAMPLED, "objective.gauge=opd_plus"]
STOPPED = [SAMPLED, "objective.gauge=stop_gradient"]
TWO_SAMPLES = ["sampling.samples_per_prompt=2", "train.prompts_per_step=24"]  # as many rollouts as the others
METHODS: dict[str, list[str]] = {
    **{name: [f"objective.name={name}"] for name, row in OBJECTIVES.items() if not row.on_golden_answers},
    "sft": ["objective.name=sft", "rollout.sources={golden: 1}"],
    **{
        f"{name}-{form}": [f"objective.name={name}", *settings]
        for name in ("reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger")
        for form, settings in (("sampled", [SAMPLED]), ("opd-plus", PLUS), ("stop-gradient", STOPPED))
        if (name, form) != ("reverse_kl", "sampled")  # log_ratio
    },
    "forward_kl-sampled-limit-3": ["objective.name=forward_kl", SAMPLED, "objective.ratio_limit=3"],
    "reverse_kl-top-8": ["objective.name=reverse_kl", "objective.estimator=top_k", "objective.k=8"],
    "reverse_kl-top-8-sampled-tail": [
        "objective.name=reverse_kl", "objective.estimator=top_k", "objective.k=8", "objective.tail=sample",
    ],
    "power-exact-baseline": ["objective.baseline=exact"],
    "power-leave-one-out": ["objective.baseline=leave_one_out", *TWO_SAMPLES],
    "power-zscore": ["objective.normalize=zscore"],
    "log_ratio-reward-to-go": ["objective.name=log_ratio", "objective.discount=1"],
    "stable_opd-k2": ["objective.name=stable_opd", "objective.reference_kl_form=k2_loss"],
    "stable_opd-k1": ["objective.name=stable_opd", "objective.reference_kl_form=k1_reward"],
    "power-golden": ["objective.golden=0.1"],
    "generalized_jsd-half-golden": ["objective.name=generalized_jsd", "rollout.sources={student: 0.5, golden: 0.5}"],
    "log_ratio-mixed": ["objective.name=log_ratio", "rollout.teacher_mixing=0.2"],
    "log_ratio-of-teacher": ["objective.name=log_ratio", "rollout.sources={teacher: 1}"],
    "forward_kl-of-teacher": ["objective.name=forward_kl", "rollout.sources={teacher: 1}"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    shared = [f"train.steps={args.steps}", f"train.seed={args.seed}", "evaluation.every=0"]
    shared += [f"evaluation.seed={args.seed}", f"evaluation.cache={args.out / 'evaluations'}"]
    arms = [Arm(name, load_recipe(RECIPE, [*METHODS[name], *shared]), args.out / name) for name in args.only]
    with ConsoleObserver(Console()) as observer:
        train_all(arms, observer)


if __name__ == "__main__":
    main()
