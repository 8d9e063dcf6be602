"""Evaluate one model on benchmarks and files of problems, outside any run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd import cpu
from poweropd.errors import ConfigError, RunError
from poweropd.evaluation.benchmarks import BENCHMARKS, PRESETS, benchmark
from poweropd.evaluation.grading import Grader, GradingMode
from poweropd.evaluation.runner import Asking, Problems, evaluate
from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
from poweropd.prompts import load_prompts
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.sections import DataConfig
from poweropd.vocabulary import end_token_ids, real_vocab_size

DEFAULT_SAMPLES, DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE = 8, 1024, 0.6


@dataclass(frozen=True)
class Settings:
    """How a model is evaluated; what is None is chosen by `evaluate_model`."""

    samples: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0
    precision: str = "auto"
    sequences_per_batch: int = 64
    grading: GradingMode = "math"
    further_ks: tuple[int, ...] = ()  # of Pass@k


def chosen_sets(
    names: list[str],
    files: list[Path],
    folder: Path | None,
    preset: str | None,
    file: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> dict[str, DataConfig]:
    """Where the problems of each benchmark and file are read, by name.

    Args:
        file: columns of the files.
        asked: settings of `DataConfig` that hold for all; those that are None are left to the benchmark.

    Raises:
        ConfigError: nothing is chosen, an unknown name, or two files of one name.
    """
    asked = {key: value for key, value in asked.items() if value is not None}
    names = list(dict.fromkeys([*names, *(PRESETS[preset].benchmarks if preset else ())]))
    sets = {name: benchmark(name).data(folder, **asked) for name in names}
    for path in files:
        if not path.is_file():
            raise ConfigError(f"--data {path}: there is no such file{', it is a folder' if path.is_dir() else ''}")
        if path.stem in sets:
            raise ConfigError(f"two sets of problems are called {path.stem}; rename the file {path}")
        source = "parquet" if path.suffix == ".parquet" else "jsonl"
        sets[path.stem] = DataConfig(source=source, path=str(path), **file, **asked)  # type: ignore[arg-type]
    if not sets:
        raise ConfigError(
            f"say what to evaluate on: --benchmark NAME ({', '.join(BENCHMARKS)}), --preset paper, or --data FILE.jsonl"
        )
    return sets


def evaluate_model(
    name: str,
    sets: Mapping[str, DataConfig],
    settings: Settings,
    out: Path,
    on_progress: Callable[[str, int, int, float | None], None],
    *,
    preset: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate the model on every set, going on with what `out` holds already; returns the summaries by set.

    What `settings` leaves open is the preset's, else 8 samples at temperature 0.6 (one where that is 0) of at most 1,024
    tokens, or of half the model's context where that is less.

    Raises:
        ConfigError, ModelError: data or model cannot be read, or do not fit together.
        RunError: `out` holds another evaluation of one of the sets.
    """
    published = PRESETS[preset] if preset else None
    temperature = _first(settings.temperature, published and published.temperature, DEFAULT_TEMPERATURE)
    samples = _first(settings.samples, published and published.samples, 1 if temperature == 0 else DEFAULT_SAMPLES)
    if temperature == 0 and samples > 1:
        raise ConfigError(
            f"temperature 0 is greedy: its {samples} samples of a problem would all be the same; use --samples 1, or a "
            "temperature above 0"
        )
    impossible = [k for k in settings.further_ks if k > samples]
    if impossible:
        raise ConfigError(
            f"Pass@{impossible[0]} needs at least {impossible[0]} samples a problem, there are {samples}; use --samples "
            f"{max(impossible)}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror or error}. Use another --out") from None
    cpu.settle()
    device = default_device()
    dtype = resolve_precision(settings.precision, device)
    tokenizer = load_tokenizer(name)
    if tokenizer.chat_template is None and any(data.chat for data in sets.values()):
        raise ConfigError(f"{name} has no chat template; use --no-chat to ask with the bare text of the problem")
    model = load_model(name, dtype=dtype, device=device)
    end_ids = end_token_ids(model, tokenizer)
    context = model.config.get_text_config().max_position_embeddings
    by_default = published.max_new_tokens if published else min(DEFAULT_NEW_TOKENS, context // 2)
    max_new_tokens = _first(settings.max_new_tokens, by_default)
    problems = [
        Problems(
            each,
            load_prompts(data, tokenizer, end_id=end_ids[0], max_prompt_tokens=context - max_new_tokens, key=each),
            BENCHMARKS[each].title if each in BENCHMARKS else each,
            BENCHMARKS[each].version if each in BENCHMARKS else 1,
        )
        for each, data in sets.items()
    ]
    engine = HFEngine(
        model,
        vocab_size=real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0],
        precision=dtype,
        sequences_per_batch=settings.sequences_per_batch,
    )
    asking = Asking(
        Sampling(
            stop_ids=end_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=settings.top_p,
            samples_per_prompt=samples,
        ),
        seed=settings.seed,
        problems_per_call=max(1, settings.sequences_per_batch // samples),
    )
    with Grader(mode=settings.grading) as grader:
        return {
            each.name: evaluate(
                engine,
                tokenizer,
                each,
                asking,
                grader,
                out,
                on_progress=lambda *progress, title=each.title: on_progress(title, *progress),
            )
            for each in problems
        }


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)
