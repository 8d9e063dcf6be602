"""The training loop: sample, score, update, record."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from poweropd import checkpoint, cpu, guards
from poweropd.assembly import assemble
from poweropd.batching import shared_out
from poweropd.config import Recipe, label, load_recipe
from poweropd.diagnostics import Clock, GradNorms, loss_metrics, rollout_metrics, rollout_records
from poweropd.distributed import ALONE, World
from poweropd.errors import CollapseError, NonFiniteError, RolloutError, RunError, TeacherError, UserError
from poweropd.evaluation.grading import Grader
from poweropd.evaluation.runner import evaluate
from poweropd.evaluation.summary import Summaries, results
from poweropd.export import export_student
from poweropd.interrupts import StopRequest
from poweropd.objectives import Objective, build
from poweropd.objectives.schedules import Coefficient
from poweropd.progress import Progress, Stateful
from poweropd.rollout.engine import Sampler
from poweropd.rollout.golden import GoldenEngine
from poweropd.rollout.schedule import Schedule
from poweropd.rollout.shared import driven
from poweropd.rollout.sources import off_policy_notes
from poweropd.runlog import CHECKPOINTS, RECIPE, STUDENT, SUMMARY, RunDirectory, Unrecorded
from poweropd.step_statistics import StepStatistics
from poweropd.streaming import merge_ranks
from poweropd.teacher.scorer import judge
from poweropd.teachers import SameTeachers, examine_remote
from poweropd.trackers import Trackers, require
from poweropd.types import Prompt, ScoredRollout
from poweropd.update import GradientResult, accumulate_gradient

WHERE_A_TEACHER_IS = {"sharding", "url", "token_env", "timeout_s", "deadline_s", "verify", "cache"}
MAY_CHANGE_ON_RESUME = {
    "train": {"steps", "sharding"},
    "teacher": WHERE_A_TEACHER_IS,
    "teachers": {"__all__": WHERE_A_TEACHER_IS},
    "rollout": {"vllm": {"url", "token_env", "weights_folder", "timeout_s", "deadline_s"}},
    "checkpoint": True,
    "guard": True,
    "log": True,
    "evaluation": {"every", "subset", "cache"},
}


class Observer(Protocol):
    """Whoever watches a run: a terminal, a test."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def on_evaluation(self, name: str, done: int, total: int, accuracy: float | None) -> None: ...
    def on_step(self, step: int, steps: int, metrics: dict[str, float]) -> None: ...


def train(recipe: Recipe, out: Path, observer: Observer, *, resume: bool = False, world: World = ALONE) -> None:
    """Run a recipe in a new directory, or go on with the run in `out`. Of several ranks, all call; the first records.

    Raises:
        UserError: what is wrong, in one line; nothing of the run is lost.
        KeyboardInterrupt: the user stopped it; it can be resumed.
    """
    require(recipe.log.trackers)

    def opened() -> RunDirectory:
        if not world.is_main:
            return Unrecorded(out)
        return RunDirectory.open(out) if resume else RunDirectory.create(out, recipe.to_yaml())

    with world.agreed(opened) as run, Trackers(recipe, run, observer, resume=resume) as trackers:
        if not all(world.gather((out / RECIPE).is_file())):
            raise RunError(f"{out} is not seen by all processes of this run; give an --out that all machines share")
        if world.on_main(lambda: _is_finished(out, recipe.train.steps)):
            observer.say(f"{out} is finished, all {recipe.train.steps} steps; nothing to resume")
            return
        run.set_status("running")
        try:
            with world.in_words():
                _Training(recipe, run, observer, trackers, world).run()
        except KeyboardInterrupt:
            run.set_status("interrupted")
            raise
        except NonFiniteError as error:
            run.set_status("failed", error=str(error))
            newest = checkpoint.newest_step(out / CHECKPOINTS)
            kept = "no checkpoint was due yet" if newest is None else f"the checkpoint of step {newest} is kept"
            raise NonFiniteError(f"{error}; {kept}") from error
        except BaseException as error:
            run.set_status("failed", error=str(error))
            raise


def _is_finished(out: Path, steps: int) -> bool:
    return (out / SUMMARY).is_file() and checkpoint.newest_step(out / CHECKPOINTS) == steps


def recipe_to_resume(out: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe that the run in `out` was started with, and goes on with.

    Raises:
        RunError: there is no run, or an override would change what its finished steps were made with.
    """
    path = out / RECIPE
    if not path.is_file():
        raise RunError(f"{out} holds no run to resume: there is no {RECIPE} in it. Start one without --resume")
    started, wanted = load_recipe(path), load_recipe(path, overrides)
    if started.model_dump(exclude=MAY_CHANGE_ON_RESUME) != wanted.model_dump(exclude=MAY_CHANGE_ON_RESUME):  # type: ignore[arg-type]
        raise RunError(
            f"--set {' '.join(overrides or [])}: the run in {out} was started otherwise. On --resume only train.steps "
            "and .sharding, where a teacher or a vLLM server is and how long it may take, evaluation.every, .subset and "
            ".cache, checkpoint, guard and log may change; start a new run for the rest"
        )
    return wanted


class _Training:
    """One run, from its parts to its finished student. Of several ranks, each computes its share and knows all results."""

    def __init__(self, recipe: Recipe, run: RunDirectory, observer: Observer, trackers: Trackers, world: World) -> None:
        self._recipe = recipe
        self._run = run
        self._observer = observer
        self._trackers = trackers
        self._world = world
        cpu.settle(recipe.train.threads)
        self._parts = assemble(recipe, world)
        self._guard = guards.CollapseGuard(recipe.guard)
        self._reference_kl = Coefficient.of(self._parts.objective.settings, "reference_kl")
        self._golden = Coefficient.of(self._parts.objective.settings, "golden")
        self._grad_norms = GradNorms()
        self._schedule = Schedule(
            self._parts.engine,
            self._parts.sampling,
            partial(self._parts.stream.take, count=recipe.train.prompts_per_step),
            partial(step_seed, recipe.train.seed),
            steps=recipe.train.steps,
            staleness=recipe.rollout.max_staleness,
        )
        decisive: dict[str, Stateful] = {
            "guard": self._guard,
            "reference_kl": self._reference_kl,
            "grad_norms": self._grad_norms,
            "schedule": self._schedule,
            "teachers": SameTeachers(self._parts.teachers),
        }
        self._progress = Progress(run, self._parts.student, decisive, keep=recipe.checkpoint.keep)

    def run(self) -> None:
        recipe, parts = self._recipe, self._parts
        self._run.set_status(
            "running", data_fingerprint=parts.data_fingerprint, gradient_of=parts.objective.gradient_of
        )
        for message in parts.pair.introduction():
            self._observer.say(message)
        on = f" on {self._world.size} processes" if self._world.size > 1 else ""
        self._observer.say(
            f"{parts.objective}: {recipe.train.steps} steps of {recipe.train.prompts_per_step} prompts{on}"
        )
        for note in off_policy_notes(recipe.rollout, parts.objective):
            self._observer.say(note)
        for finding in examine_remote(recipe, parts.pair, parts.teachers, parts.probe_rollouts):
            self._observer.say(finding)
        if self._world.is_main:
            self._trackers.start(checkpoint.newest_step(self._run.path / CHECKPOINTS) or 0)
        evaluations: dict[str, Summaries] = {}
        if parts.problems:
            if recipe.evaluation.teacher:
                for name, engine in parts.teacher_engines.items():
                    evaluations[_place(name)] = self._evaluate(_place(name), engine, label(name))
            evaluations["before"] = self._evaluate_student(0, "student before")
        with self._schedule:
            start = self._progress.restore()
            if start:
                self._observer.say(f"resumed at step {start}")
            self._loop(start)
        if parts.problems:
            evaluations["after"] = self._evaluate_student(recipe.train.steps, "student after")
        export_student(parts.student, self._run.path / STUDENT, recipe, parts.pair.end_tokens.stop_ids, evaluations)
        facts = {
            "objective": {"name": parts.objective.name, **parts.objective.shown},
            "steps": recipe.train.steps,
            "seed": recipe.train.seed,
            "seconds": round(self._progress.seconds, 1),
        }
        told = {when: {name: results(summary) for name, summary in each.items()} for when, each in evaluations.items()}
        self._run.write_json(SUMMARY, {**told, **facts})
        self._run.set_status("finished")

    def _loop(self, start: int) -> None:
        config, log, parts, world = self._recipe.train, self._recipe.log, self._parts, self._world
        tokenizer, device = parts.pair.tokenizer, parts.student.device
        with StopRequest(lambda: self._observer.say("stopping after this step; once more to stop at once")) as stop:
            for step in range(start, config.steps):
                done = step + 1
                clock = Clock(device)
                prompts = parts.stream.take(step, config.prompts_per_step)
                try:
                    rollouts = self._schedule.take(step)
                except RolloutError as error:
                    raise self._without_server(step, error) from error
                clock.lap("rollout")
                objective = self._objective_at(step)
                share = shared_out(rollouts, world.size)[world.rank]
                own = [rollouts[place] for place in share]
                try:
                    scored = world.agreed(partial(judge, own, objective, parts.teacher, parts.reference))
                except TeacherError as error:
                    self._schedule.put_back(step, rollouts)
                    raise self._without_server(step, error) from error
                clock.lap("teacher")
                in_detail = step % log.rollouts_every == 0 or done == config.steps
                seen = StepStatistics(
                    objective, rollouts, parts.sampling, version=step, device=device, detailed=in_detail
                )
                keep = log.rollouts if in_detail else 0
                result = accumulate_gradient(
                    parts.student, scored, objective, parts.how, version=step, watch=seen.add, keep=keep, places=share
                )
                merge_ranks(seen.parts)
                golden = self._add_golden_answers(prompts, objective)
                parts.student.add_up_gradients()
                grad_norm = parts.student.gradient_norm()
                guards.refuse_non_finite(result, grad_norm, rollouts, tokenizer, step)
                update = parts.student.update(step, grad_norm)
                clock.lap("update")

                metrics = loss_metrics(result, golden, objective) | {"lr": update.lr} | seen.metrics()
                metrics |= rollout_metrics(step, rollouts, tokenizer, parts.sampling)
                metrics |= self._grad_norms.metrics(update.grad_norm) | clock.metrics(result.num_loss_tokens)
                metrics["memory/peak"] = max(world.gather(metrics["memory/peak"]))
                self._reference_kl.observe(metrics.get("reference_kl/mean", 0.0))
                self._run.append("metrics", {"step": step, **metrics})
                self._trackers.log(done, metrics)
                own_weights = self._recipe.rollout.engine != "hf"
                if warning := guards.mismatch_warning(metrics, step, own_weights=own_weights, first=step == start):
                    self._observer.warn(warning)
                if in_detail:
                    self._run.append("positions", *seen.position_records(step))
                    self._run.append("distributions", seen.distribution_record(step))
                    self._run.append("rollouts", *rollout_records(step, rollouts, result.terms, objective, tokenizer))
                self._observer.on_step(done, config.steps, metrics)
                if _is_due(done, self._recipe.evaluation.every) and done < config.steps and parts.problems:
                    self._evaluate_student(done, f"student at step {done}", subset=self._recipe.evaluation.subset)
                if alarm := self._guard.observe(step, metrics):
                    self._heed(alarm)
                stops = any(world.gather(stop.requested))
                if _is_due(done, self._recipe.checkpoint.every) or done == config.steps or stops:
                    self._progress.save(done)
                if stops and done < config.steps:
                    raise KeyboardInterrupt

    def _objective_at(self, step: int) -> Objective:
        """The objective with the coefficients of this step."""
        steps = self._recipe.train.steps
        return self._parts.objective.at(
            step / steps, reference_kl=self._reference_kl.at(step, steps), golden=self._golden.at(step, steps)
        )

    def _add_golden_answers(self, prompts: Sequence[Prompt], objective: Objective) -> GradientResult | None:
        """Add the weighted cross-entropy of the prompts' golden answers to the gradient, a mean over their tokens."""
        if not objective.golden_weight:
            return None
        answers = GoldenEngine().generate(prompts, self._parts.sampling, seed=0)
        share = shared_out(answers, self._world.size)[self._world.rank]
        scored = [ScoredRollout(answers[place]) for place in share]
        student, how, weight = self._parts.student, self._parts.how, objective.golden_weight
        return accumulate_gradient(student, scored, build("sft"), how, weight=weight, keep=0, places=share)

    def _heed(self, alarm: guards.Alarm) -> None:
        """Do what the recipe says of a collapse.

        Raises:
            CollapseError: it says stop; a checkpoint of this step is saved.
        """
        action = self._recipe.guard.action
        if action == "stop":
            done = alarm.step + 1
            self._progress.save(done)
            raise CollapseError(
                f"{alarm.text}. guard.action stop: the checkpoint of step {done} is kept, go on all the same with "
                "--resume --set guard.action=warn"
            )
        if action == "raise_reference_kl":
            self._reference_kl.raise_()
        self._observer.warn(alarm.text + (". The reference KL is doubled" if action == "raise_reference_kl" else ""))

    def _without_server(self, done: int, error: TeacherError | RolloutError) -> UserError:
        """Save what the finished steps have made; nothing of the step that was not sampled or judged is in the student."""
        if done and checkpoint.newest_step(self._run.path / CHECKPOINTS) != done:
            self._progress.save(done)
        kept = f"the checkpoint of step {done} is kept" if done else "no step was finished"
        return type(error)(f"{error}; {kept}, go on with --resume")

    def _evaluate_student(self, version: int, name: str, *, subset: int | None = None) -> Summaries:
        """Of the student as it is now, after `version` optimizer steps."""
        self._schedule.finish()
        self._parts.student_engine.update_weights(version=version)
        return self._evaluate(f"{version:06d}", self._parts.student_engine, name, subset=subset)

    def _evaluate(self, place: str, engine: Sampler, name: str, *, subset: int | None = None) -> Summaries:
        """Evaluate, unless an earlier session of this run, or whoever shares its cache, has done so already.

        Args:
            place: below `eval/`.
            subset: ask so many problems of each set only.
        """
        config, parts = self._recipe.evaluation, self._parts

        def evaluate_all(sampler: Sampler) -> Summaries:
            summaries = {}
            with Grader(mode=config.grading) as grader:
                for problems in parts.problems:
                    title = name if len(parts.problems) == 1 else f"{name}, {problems.title}"
                    summaries[problems.name] = evaluate(
                        sampler,
                        parts.pair.tokenizer,
                        problems.subset(subset),
                        parts.asking,
                        grader,
                        self._run.path / "eval" / place,
                        cache=Path(config.cache) if config.cache else None,
                        replace_other=True,  # a checkpoint was gone back to, and the steps since were taken otherwise
                        on_progress=partial(self._observer.on_evaluation, title),
                    )
                    self._trackers.log_evaluation(place, problems.name, summaries[problems.name])
            return summaries

        return driven(engine, self._world, evaluate_all)


def _place(teacher: str) -> str:
    """Where below eval/ the evaluation of a teacher lies: `teacher`, or `teacher-math`."""
    return label(teacher).replace(" ", "-")


def step_seed(seed: int, step: int) -> int:
    """The seed of the rollouts of one optimizer step."""
    return (seed << 40) + step + 1  # + 1: the seed of an evaluation is never that of a step


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
