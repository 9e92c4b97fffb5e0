"""Tokens per second of HLAT beside `transformers.Trainer`: same parameters, batches and optimizer, same two
cores.

    python tests/bench/compare_trainer.py                # five interleaved rounds of all three, medians and
    ratios python tests/bench/compare_trainer.py --only hlat    # one of: hlat, trainer, trainer-compiled

Each measurement is a process of its own; step times exclude the first steps, whose total is reported as
start-up (compilation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch

WARM_UP, STEPS = 4, 16
KINDS = ("hlat", "trainer", "trainer-compiled")


def measure_hlat() -> dict[str, float]:
    """Step times of HLAT with its default `compile: auto`."""
    from model import build

    from hlat.train.loop import manual_collection
    from hlat.train.step import train_step

    run = build(compiled=True)
    times, losses = [], []
    with manual_collection() as collector:  # as the training loop does
        for _ in range(WARM_UP + STEPS):
            start = time.perf_counter()
            losses.append(float(train_step(run)["loss"]))
            collector()
            times.append(time.perf_counter() - start)
    return summary(times, losses, run.recipe.tokens_per_step)


def measure_trainer(compiled: bool) -> dict[str, float]:
    """Step times of `transformers.Trainer` with bf16 autocast, SDPA and fused AdamW, from the same initial
    weights.
    """
    from model import recipe, rows
    from transformers import Trainer, TrainerCallback, TrainingArguments

    chosen = recipe()
    model, data = to_llama(chosen), rows(chosen)
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        """From the end of a step to the end of the next: loading and book-keeping count, as for HLAT."""

        def on_train_begin(self, *args, **kwargs):
            self.last = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            times.append(now - self.last)
            self.last = now

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data) * 100

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = data[index % len(data)]
            return {"input_ids": row, "labels": row}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=WARM_UP + STEPS,
            bf16=True,
            torch_compile=compiled,
            optim="adamw_torch_fused",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_steps=1000,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = InOrder(model, arguments, train_dataset=Rows(), callbacks=[Clock()])
        losses.append(trainer.train().training_loss)
    return summary(times, losses, chosen.tokens_per_step)


def to_llama(chosen):
    """The recipe's initial weights in `transformers`' Llama. HLAT's backend stays untouched here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hlat.checkpoint.hf_config import hf_name
    from hlat.model.init import init_tensor, parameter_shapes

    m = chosen.model
    config = LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.ffn, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, max_position_embeddings=m.max_seq_len,
        rms_norm_eps=m.norm_eps, tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    shapes = parameter_shapes(m)
    state = {hf_name(name): init_tensor(m, name, shape, chosen.run.seed) for name, shape in shapes.items()}
    model.load_state_dict(state)
    return model


def summary(times: list[float], losses: list[float], tokens: int) -> dict[str, float]:
    """Median speed after the warm-up steps."""
    return {
        "tokens_per_second": tokens / statistics.median(times[WARM_UP:]),
        "start_up_seconds": sum(times[:WARM_UP]),
        "loss": losses[-1] if len(losses) == 1 else statistics.mean(losses),
    }


def main() -> None:
    """Measure, print a line per process, then medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.only:
        torch.set_num_threads(2)
        result = measure_hlat() if args.only == "hlat" else measure_trainer(args.only == "trainer-compiled")
        print(json.dumps(result))
        return
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, "--only", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[kind].append(json.loads(output.strip().splitlines()[-1]))
            print(f"round {number + 1} {kind:17} {results[kind][-1]}", flush=True)
    for kind in KINDS:
        speeds = [r["tokens_per_second"] for r in results[kind]]
        ratios = [
            h["tokens_per_second"] / r["tokens_per_second"]
            for h, r in zip(results["hlat"], results[kind], strict=True)
        ]
        print(
            f"{kind:17} {statistics.median(speeds):9,.0f} tokens/s; HLAT / this: "
            f"median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
