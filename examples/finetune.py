"""Fine-tune a causal language model with fastpeft, and see what it learned.

    python examples/finetune.py                     SmolLM2-135M learns Shakespeare
    python examples/finetune.py --method dora       the same with DoRA
    python examples/finetune.py --method lisa       two of its own layers at a time; also badam, topk, ist
    python examples/finetune.py --model FOLDER --text FILE
    python examples/finetune.py --help              every option

What fastpeft asks of a training loop is in `main`: `fastpeft.patch` before it, `fastpeft.save` after it,
`fastpeft.load` to have the adapter back. The loop itself, `train`, is plain PyTorch; a layer-sparse method is
another optimiser in it.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import corpus
import fastpeft
import layers
import options
import report
import shakespeare
import smollm2
from dtypes import DTYPES
from errors import InputError, exit_code
from report import say

# Held-out tokens scored per text, in windows spread over the whole of it.
EVALUATION_TOKENS = 4096
# As many of those are scored again to check that a saved adapter gives the same loss.
CHECK_TOKENS = 1024
SAMPLE_TOKENS = 48

WARMUP = 0.1  # share of the steps in which the learning rate rises
MAX_GRAD_NORM = 1.0

# fastpeft reads back what it wrote, so only the order of a sum may differ. PEFT computes the same function
# with other roundings: on SmolLM2 in bf16 the losses differed by 2 parts in ten thousand.
SAME_LOSS = 1e-5
PEFT_SAME_LOSS = {"bf16": 2e-3, "fp32": 1e-4}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole job; returns the exit code: 0, 1 if the saved adapter differs, 2 for wrong input."""
    o = options.parse(argv)
    transformers.utils.logging.disable_progress_bar()
    return exit_code("finetune.py", lambda: finetune(o))


def finetune(o: options.Options) -> int:
    """Train, judge on held-out text before and after, save, reload and check."""
    began = time.perf_counter()
    make_folder(o.out, "--out")
    make_folder(o.cache, "--cache")
    check_model(o.model)
    if o.prompt is not None and not o.prompt.strip():
        raise InputError("--prompt: holds no text")

    text = corpus.from_file(o.text) if o.text else shakespeare.load(o.cache, say)
    folder = o.model or smollm2.prepare(o.cache, say)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, o.dtype)
    train_rows, held_out = tokenize(text, tokenizer, model, o.sequence)
    prompt = text.prompt if o.prompt is None else o.prompt
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"model     {folder.resolve().name}, {o.dtype}, {millions:.1f}M parameters")
    say(f"text      {text.name}: {train_rows.numel():,} tokens to train on, {len(text.train)} file(s)")
    for part, rows in held_out.items():
        say(f"held out  {part}: {rows.numel():,} tokens scored")

    say("before training ...")
    perplexity_before = evaluate(model, held_out)
    sample_before = sample(model, tokenizer, prompt, o.seed)

    torch.manual_seed(o.seed)
    adapted = o.method in options.ADAPTERS
    if adapted:
        dora = o.method == "dora"
        config = fastpeft.LoRA(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, use_dora=dora)
        fastpeft.patch(model, config)
    optimizer = make_optimizer(model, o)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    at_a_time = " at a time" if o.method in options.SCHEDULED else ""
    say(f"training {count:,} parameters{at_a_time}, {o.steps} steps of {o.batch}x{o.sequence} tokens ...")
    losses, seconds, history = train(model, optimizer, train_rows, o)
    saved = o.out / ("adapter" if adapted else "model")
    fastpeft.save(model, saved) if adapted else model.save_pretrained(saved)

    say("after training ...")
    perplexity_after = evaluate(model, held_out)
    sample_after = sample(model, tokenizer, prompt, o.seed)

    say(f"checking the saved {saved.name} ...")
    few = max(1, CHECK_TOKENS // o.sequence)
    check_rows = torch.cat([corpus.spread(rows, few) for rows in held_out.values()])
    trained_loss = mean_loss(model, check_rows)
    del model
    fresh = load_model(folder if adapted else saved, o.dtype)
    if adapted:
        fastpeft.load(fresh, saved)
    reader = "fastpeft" if adapted else "transformers"
    same = agrees(reader, trained_loss, mean_loss(fresh, check_rows), SAME_LOSS)
    del fresh
    if adapted:
        same &= check_with_peft(folder, o, trained_loss, check_rows)

    title = f"{folder.resolve().name} on {text.name}, {o.method}{f' r={o.rank}' if adapted else ''}"
    report.plot_losses(losses, title, o.out / "loss.png")
    if history is not None:
        layers.plot(history, title, o.out / "layers.png")
    figures = {
        "options": asdict(o),
        "perplexity_before": perplexity_before,
        "perplexity_after": perplexity_after,
        "trainable_parameters": count,
        "tokens_per_second": len(losses) * o.batch * o.sequence / seconds,
        "training_seconds": seconds,
        "total_seconds": time.perf_counter() - began,
        "losses": losses,
        "layers": None if history is None else asdict(history),
    }
    # default=str: paths are the only values that JSON does not know.
    (o.out / "figures.json").write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    summarise(o, figures, sample_before, sample_after)
    return 0 if same else 1


def make_optimizer(model: Any, o: options.Options) -> torch.optim.Optimizer:
    """AdamW on the adapters, or on a few layers at a time."""
    if o.method not in options.SCHEDULED:
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=o.lr, weight_decay=0.0
        )
    # Steps of 1e-4 are lost in the rounding of bf16 weights: their active layers have an fp32 copy.
    return fastpeft.LayerSparseAdamW(
        model, lr=o.lr, weight_decay=0.0, schedule=layers.schedule(o), master_weights=o.dtype == "bf16"
    )


def train(
    model: Any, optimizer: torch.optim.Optimizer, rows: torch.Tensor, o: options.Options
) -> tuple[list[float], float, layers.History | None]:
    """Plain PyTorch, warm-up and cosine. Returns every step's loss, the seconds, and which layers trained."""
    sparse = optimizer if isinstance(optimizer, fastpeft.LayerSparseAdamW) else None
    history = None if sparse is None else layers.History(len(sparse.sparse.blocks))
    warmup = max(1, round(WARMUP * o.steps))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, o.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(o.seed)
    order = torch.empty(0, dtype=torch.long)
    losses = []
    began = time.perf_counter()
    model.train()
    with report.progress(o.steps, o.batch * o.sequence) as advance:
        for _ in range(o.steps):
            while len(order) < o.batch:  # every window once before any comes again
                order = torch.cat([order, torch.randperm(len(rows), generator=draw)])
            batch, order = rows[order[: o.batch]], order[o.batch :]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            if history is not None and sparse is not None:
                history.before(sparse, model)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if history is not None and sparse is not None:
                history.after(sparse)
            advance(losses[-1], history.line() if history else "")
    return losses, time.perf_counter() - began, history


@torch.inference_mode()
def mean_loss(model: Any, rows: torch.Tensor, at_once: int = 1024) -> float:
    """Mean loss in nats over every predicted token of the rows, `at_once` tokens in a forward pass."""
    model.eval()
    total, predicted = 0.0, 0
    size = max(1, at_once // rows.shape[1])
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        count = batch.shape[0] * (batch.shape[1] - 1)  # a row's first token has nothing before it
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * count
        predicted += count
    return total / predicted


def evaluate(model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Print and return the perplexity of each text, and of all together where there are several."""
    losses = {title: mean_loss(model, rows) for title, rows in held_out.items()}
    found = {title: math.exp(loss) for title, loss in losses.items()}
    if len(losses) > 1:
        tokens = sum(rows.numel() for rows in held_out.values())
        total = sum(losses[title] * rows.numel() for title, rows in held_out.items())
        found["all held-out text"] = math.exp(total / tokens)
    say("  held-out perplexity: " + ", ".join(f"{title} {value:.1f}" for title, value in found.items()))
    return found


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    """Continue the prompt, equally for equal seeds."""
    model.eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    generated = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def check_with_peft(folder: Path, o: options.Options, expected: float, rows: torch.Tensor) -> bool:
    """Let PEFT load the saved adapter, where it is installed, and compare the loss."""
    try:
        import peft
    except ImportError:
        say("  peft is not installed: its check is skipped")
        return True
    with warnings.catch_warnings():
        # PEFT asks transformers for a flag by its old name; nothing the reader of this can change.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(load_model(folder, o.dtype), str(o.out / "adapter"))
    return agrees("peft", expected, mean_loss(model, rows), PEFT_SAME_LOSS[o.dtype])


def agrees(reader: str, expected: float, found: float, tolerance: float) -> bool:
    """Print and return whether a reloaded adapter gives the trained model's loss."""
    same = abs(found - expected) <= tolerance * abs(expected)
    verdict = "same" if same else "DIFFERENT"
    say(f"  loss {expected:.6f} as trained, {found:.6f} reloaded by {reader}: {verdict}")
    return same


def tokenize(
    text: corpus.Corpus, tokenizer: Any, model: Any, sequence: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cut the text into rows of `--sequence` tokens: all to train on, a spread of each text held out."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise InputError(f"--sequence {sequence}: the model takes at most {longest} tokens")
    train_rows = corpus.windows(tokenizer, text.train.values(), sequence)
    held_out = {title: corpus.windows(tokenizer, [t], sequence) for title, t in text.held_out.items()}
    for part, rows in {"training": train_rows, **held_out}.items():
        if len(rows) == 0:
            raise InputError(
                f"{text.name}: text too short, {part} has fewer than --sequence {sequence} tokens"
            )
    largest = max(int(rows.max()) for rows in (train_rows, *held_out.values()))
    if largest >= model.get_input_embeddings().num_embeddings:
        raise InputError(f"tokenizer and model do not belong together: no embedding for token {largest}")
    count = max(1, EVALUATION_TOKENS // sequence)
    return train_rows, {title: corpus.spread(rows, count) for title, rows in held_out.items()}


def load_model(folder: Path, dtype: str) -> Any:
    """Load a causal language model from a folder; InputError if it is not one."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot load a causal language model: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; InputError if there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: cannot load its tokenizer: {error}") from error


def check_model(folder: Path | None) -> None:
    """Raise InputError if --model names something else than a model's folder, before any long work."""
    if folder and not (folder / "config.json").is_file():
        raise InputError(f"--model {folder}: not a transformers model folder, it has no config.json")


def make_folder(folder: Path, option: str) -> None:
    """Create a folder and try to write into it, before any long work; InputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot write there: {error.strerror}") from error


def summarise(o: options.Options, figures: dict[str, Any], before: str, after: str) -> None:
    """Print both samples and the figures that matter."""
    for label, written in (("before", before), ("after", after)):
        say(f"\n--- sample {label} ---\n{written.strip()}")
    say("\n--- summary ---")
    for title, value in figures["perplexity_before"].items():
        say(f"perplexity  {value:6.1f} -> {figures['perplexity_after'][title]:6.1f}   {title}")
    count = figures["trainable_parameters"]
    adapted, scheduled = o.method in options.ADAPTERS, o.method in options.SCHEDULED
    details = f", r={o.rank}, alpha={o.alpha:g}" if adapted else ""
    at_a_time = 1 if o.method == "badam" else o.layers
    details += f", {at_a_time} of its layers at a time, period {o.period}" if scheduled else ""
    say(f"trained     {count:,} parameters, {o.method}{details}")
    seconds, rate = figures["training_seconds"], figures["tokens_per_second"]
    say(f"time        {seconds:.0f} s training, {rate:.0f} tokens/s; {figures['total_seconds']:.0f} s in all")
    if adapted:
        say(f"adapter     {o.out / 'adapter'}   (PEFT's format: fastpeft.load or peft reads it)")
    else:
        say(f"model       {o.out / 'model'}   (the whole model: transformers reads it)")
    say(f"loss plot   {o.out / 'loss.png'}")
    if scheduled:
        say(f"layer plot  {o.out / 'layers.png'}")
    say(f"figures     {o.out / 'figures.json'}")


if __name__ == "__main__":
    sys.exit(main())
