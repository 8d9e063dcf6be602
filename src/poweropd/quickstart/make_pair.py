"""Train the embedded pair from nothing: `python -m poweropd.quickstart.make_pair --out DIR`.

Both models read the same base text: transcripts of solved problems in several styles, some of which run on into the
next problem, all ended by `<|endoftext|>`. The student stops there, small and early: a base model. The teacher is
larger and is then trained to answer chats in one style, ended by `<|im_end|>`: a chat model. So the pair has what
makes distilling a chat teacher into a base student hard: another end token, another format, and confident teacher
probabilities that give the student's habits very negative log-ratios.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from poweropd.tasks import Problem, base_style_solution, problems, worked_solution

RECIPE = Path(__file__).with_name("recipe.yaml")
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 512
SIZES = {"teacher": (192, 6), "student": (128, 4)}  # hidden size, layers
Row = tuple[list[int], list[int]]  # token ids, and 1 where the token is trained on


def chat(question: str, answer: str) -> tuple[str, str]:
    """A chat prompt and its answer, up to but without the end token."""
    return f"{CHAT_START}user\n{question}{CHAT_END}\n{CHAT_START}assistant\n", answer


def page(question: str, answer: str) -> str:
    """A problem and its answer as plain text."""
    return f"Question: {question}\nAnswer: {answer}"


def base_documents(stream: Iterator[Problem], rng: random.Random) -> Iterator[str]:
    """Unedited text: chat transcripts and plain question-and-answer pages, of which some run on to the next problem."""
    while True:
        problem = next(stream)
        answer = base_style_solution(problem, rng)
        is_chat = rng.random() < 0.5
        document = "".join(chat(problem["question"], answer)) if is_chat else page(problem["question"], answer)
        while rng.random() < 0.3:
            problem = next(stream)
            document += "\n\n" + page(problem["question"], base_style_solution(problem, rng))
        yield document + END_OF_TEXT


def train_tokenizer(documents: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, as Qwen's, at a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def base_rows(stream: Iterator[Problem], rng: random.Random, encode: Callable[[str], list[int]]) -> Iterator[Row]:
    for document in base_documents(stream, rng):
        ids = encode(document)
        yield ids, [1] * len(ids)


def chat_rows(stream: Iterator[Problem], rng: random.Random, encode: Callable[[str], list[int]]) -> Iterator[Row]:
    """The teacher's second school: chats in one style, and a tenth of plain pages so that it keeps reading them."""
    base = base_rows(stream, rng, encode)
    for problem in stream:
        if rng.random() < 0.1:
            yield next(base)
        else:
            prompt, answer = chat(problem["question"], worked_solution(problem))
            prompt_ids, answer_ids = encode(prompt), encode(answer + CHAT_END)
            yield prompt_ids + answer_ids, [0] * len(prompt_ids) + [1] * len(answer_ids)


def blocks(rows: Iterator[Row], batch: int, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Packed training blocks `[batch, length]` of ids and loss mask; each line starts with a whole row."""
    while True:
        ids, mask = torch.zeros(2, batch, length, dtype=torch.long)
        for line in range(batch):
            filled = 0
            while filled < length:
                row_ids, row_mask = next(rows)
                taken = min(len(row_ids), length - filled)
                ids[line, filled : filled + taken] = torch.tensor(row_ids[:taken])
                mask[line, filled : filled + taken] = torch.tensor(row_mask[:taken])
                filled += taken
        yield ids, mask


def train(
    model: Qwen3ForCausalLM, rows: Iterator[Row], *, steps: int, batch: int, length: int, lr: float, label: str
) -> None:
    """AdamW on next-token cross-entropy: linear warm-up, then cosine down to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(100, steps // 10 + 1)
    start = time.monotonic()
    model.train()
    for step, (ids, mask) in enumerate(islice(blocks(rows, batch, length), steps)):
        share = step / steps
        scale = min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        loss = (losses * mask[:, 1:].flatten()).sum() / mask[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"{label} step {step} loss {loss.item():.3f} {seconds:.0f}s", flush=True)
    model.eval()


def make_model(size: tuple[int, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    hidden_size, layers = size
    heads = hidden_size // 32
    config = Qwen3Config(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        intermediate_size=3 * hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, end_token: str, folder: Path) -> None:
    """bf16 weights, with the end token that this model was taught."""
    end = tokenizer.convert_tokens_to_ids(end_token)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(folder)
    tokenizer.eos_token = end_token
    tokenizer.save_pretrained(folder)
    model.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["teacher", "student"])
    parser.add_argument("--base-steps", type=int, default=2000, help="teacher: steps on base text")
    parser.add_argument("--chat-steps", type=int, default=5000, help="teacher: steps on chats")
    parser.add_argument("--student-steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    families = yaml.safe_load(RECIPE.read_text())["data"]["families"]
    sample = base_documents(problems(families, split="train", seed=1), random.Random(1))
    tokenizer = train_tokenizer(islice(sample, 5000))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def rows(kind: Callable[..., Iterator[Row]], seed: int) -> Iterator[Row]:
        return kind(problems(families, split="train", seed=seed), random.Random(seed), encode)

    shape = {"batch": args.batch, "length": args.length}
    if args.only != "teacher":
        student = make_model(SIZES["student"], tokenizer, args.seed)
        train(student, rows(base_rows, 2), steps=args.student_steps, lr=2e-3, label="student base", **shape)
        save(student, tokenizer, END_OF_TEXT, args.out / "student")
    if args.only != "student":
        teacher = make_model(SIZES["teacher"], tokenizer, args.seed + 1)
        train(teacher, rows(base_rows, 3), steps=args.base_steps, lr=1.5e-3, label="teacher base", **shape)
        train(teacher, rows(chat_rows, 4), steps=args.chat_steps, lr=1e-3, label="teacher chat", **shape)
        save(teacher, tokenizer, CHAT_END, args.out / "teacher")
    (args.out / "made_by.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
