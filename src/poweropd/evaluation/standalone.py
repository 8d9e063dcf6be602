"""Evaluate one model on a file of problems, outside any run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from poweropd.errors import RunError
from poweropd.evaluation.grading import Grader, GradingMode
from poweropd.evaluation.runner import evaluate
from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
from poweropd.prompts import load_prompts
from poweropd.rollout.engine import Sampling
from poweropd.rollout.hf import HFEngine
from poweropd.sections import DataConfig, SamplingConfig
from poweropd.vocabulary import end_token_ids, real_vocab_size


def evaluate_model(
    name: str,
    data: DataConfig,
    sampling: SamplingConfig,
    out: Path,
    on_progress: Callable[[str, int, int], None],
    *,
    precision: str = "auto",
    sequences_per_batch: int = 64,
    grading: GradingMode = "math",
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the model and write `<data>.json` and `<data>.jsonl` into `out`; returns the summary.

    Where `sampling` leaves `max_new_tokens` at its default, a short context lowers it to one half of it.

    Raises:
        ConfigError, ModelError: data or model cannot be read.
        RunError: `out` holds this evaluation already.
    """
    benchmark = Path(str(data.path)).stem
    if (out / f"{benchmark}.json").exists():
        raise RunError(
            f"{out} holds an evaluation on {benchmark} already, which is never written over. Use another --out"
        )
    device = default_device()
    dtype = resolve_precision(precision, device)
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype=dtype, device=device)
    end_ids = end_token_ids(model, tokenizer)
    context = model.config.get_text_config().max_position_embeddings
    if "max_new_tokens" not in sampling.model_fields_set:
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, context // 2)})
    prompts = load_prompts(data, tokenizer, end_id=end_ids[0], max_prompt_tokens=context - sampling.max_new_tokens)
    engine = HFEngine(
        model,
        vocab_size=real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0],
        precision=dtype,
        sequences_per_batch=sequences_per_batch,
    )
    with Grader(mode=grading) as grader:
        result = evaluate(
            engine,
            tokenizer,
            prompts,
            Sampling(stop_ids=end_ids, **sampling.model_dump(exclude={"stop"})),
            grader,
            seed=seed,
            on_progress=lambda done, total: on_progress(benchmark, done, total),
        )
    result.save(out, benchmark)
    return result.summary
