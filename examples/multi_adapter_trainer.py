"""Three adapters trained at once in mixed batches with Hugging Face's Trainer.

Each has its own data, learning rate, optimizer state, schedule and clipping, and its steps are
those that it would take alone on the same rows (with dropout: padded to the same length).
Checkpoints resume exactly; adapters are saved in PEFT's format.

    python examples/multi_adapter_trainer.py --out adapters            # SmolLM2, about a minute
    python examples/multi_adapter_trainer.py --out adapters --resume   # goes on from a checkpoint
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fastlora
from fastlora.commands import smollm2
from fastlora.commands.demo import examples_data_path
from fastlora.train import AdapterOptimizers, causal_lm_losses, count_tokens, train_adapters
from fastlora.train.data import read_samples

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How one adapter trains.

    Attributes:
        learning_rate: Of its AdamW, reached after the warm-up.
        weight_decay: Of its AdamW.
        warmup_steps: In steps of this adapter; those without it do not count.
        max_grad_norm: Its gradient is clipped to this norm, whatever the others' are.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 3
    max_grad_norm: float = 1.0


class NoSchedule:
    """Stands where Trainer expects one schedule: each adapter has its own."""

    def __init__(self, optimizers: AdapterOptimizers) -> None:
        self._optimizers = optimizers

    def step(self) -> None:
        """Does nothing: `AdapterOptimizers.step` moves the schedules of those that stepped."""

    def get_last_lr(self) -> list[float]:
        """Returns the adapters' learning rates, of which Trainer logs the first."""
        return [o.param_groups[0]["lr"] for o in self._optimizers.by_adapter.values()]

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the schedules' states lie with the optimizers'."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over nothing."""


class MultiAdapterTrainer(Trainer):
    """A Trainer whose batches mix adapters; see the module's docstring.

    Args:
        model: A `fastlora.LoraModel` with an adapter for each recipe.
        args: Its ``learning_rate``, ``optim``, ``lr_scheduler_type``, ``weight_decay`` and
            ``max_grad_norm`` do not act here: the recipes have them.
        recipes: How each adapter trains.
        datasets: For each adapter its examples: dicts of ``input_ids`` and ``labels``, lists of
            token numbers of one length, -100 where a label does not count.
        pad_token_id: Fills up shorter examples.
    """

    def __init__(
        self,
        model: fastlora.LoraModel,
        args: TrainingArguments,
        recipes: Mapping[str, Recipe],
        datasets: Mapping[str, Sequence[Mapping[str, list[int]]]],
        pad_token_id: int = 0,
    ) -> None:
        if set(recipes) != set(datasets):
            raise ValueError(
                f"recipes are for {sorted(recipes)} and datasets for {sorted(datasets)}, expected "
                "the same adapters"
            )
        if args.n_gpu > 1 or args.world_size > 1:
            raise ValueError(
                f"{max(args.n_gpu, args.world_size)} devices; expected one: an adapter's rows "
                "would have to be counted over all of them (set CUDA_VISIBLE_DEVICES=0)"
            )
        args.remove_unused_columns = False  # the adapter's name is no argument of the model
        # It would be over all adapters together; see `_clip_grad_norm` below.
        args.max_grad_norm = 0.0
        # Rows of all adapters in one list: Trainer's shuffling mixes them.
        rows = [{**row, "adapter": name} for name, data in datasets.items() for row in data]
        collate = partial(collate_rows, pad_token_id=pad_token_id)
        super().__init__(model, args, train_dataset=rows, data_collator=collate)
        self.recipes = dict(recipes)
        self.losses: dict[str, list[float]] = {name: [] for name in recipes}
        self._logged: dict[str, list[float]] = defaultdict(list)
        self._tokens: Counter[str] = Counter()

    # --------------------------------------------------------------------- what Trainer calls

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes each adapter's optimizer and schedule."""
        if self.optimizer is None:
            train_adapters(self.model, list(self.recipes))  # resuming froze all but one
            self.optimizer = AdapterOptimizers(
                self.model,
                {
                    name: partial(AdamW, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
                    for name, recipe in self.recipes.items()
                },
                schedulers={
                    name: partial(LinearLR, start_factor=0.1, total_iters=recipe.warmup_steps)
                    for name, recipe in self.recipes.items()
                },
                max_grad_norm={name: recipe.max_grad_norm for name, recipe in self.recipes.items()},
                scaler=torch.amp.GradScaler if self.args.fp16 else None,
                seed=self.args.seed,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tells Trainer that there is nothing to do."""
        self.lr_scheduler = NoSchedule(self.optimizer)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Takes the batches of one step, and counts each adapter's tokens in all of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens = Counter()
        for batch in batches:
            self._tokens.update(count_tokens(batch["labels"], batch["adapters"]))
        return batches, None

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Runs one mixed batch forward and backward; returns the sum of the adapters' losses."""
        model.train()
        batch = dict(self._prepare_inputs(inputs))
        labels, names = batch.pop("labels"), batch.pop("adapters")
        seeds = self.optimizer.draw_seeds(names)
        with fastlora.adapters(self.model, names, seeds=seeds), self.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits
        losses = causal_lm_losses(logits, labels, names, tokens=self._tokens)
        self.optimizer.backward(losses)
        for name, value in losses.values.items():
            # Of this batch alone, also where a step has several.
            value *= self._tokens[name] / losses.tokens[name]
            self.losses[name].append(value)
            self._logged[name].append(value)
        return losses.total.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each adapter's mean loss since the last entry, and what was not finite."""
        for name, values in self._logged.items():
            logs[f"loss/{name}"] = sum(values) / len(values)
        self._logged.clear()
        counts = {} if self.optimizer is None else self.optimizer.counts
        for name, count in counts.items():
            bad = count.skipped_steps + count.non_finite_losses
            if bad:
                logs[f"non_finite/{name}"] = bad
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Nothing: a norm over all adapters would let one scale, or spoil, the others' steps."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """Nothing either: transformers takes this norm by clipping to infinity."""


# ------------------------------------------------------------------------------------- the data


def collate_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Returns a batch padded on the right, int64 ``[B, T]`` each, with ``adapters``: B names."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values])

    ids = [list(row["input_ids"]) for row in rows]
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(v) for v in ids], 0),
        "labels": padded([list(row["labels"]) for row in rows], IGNORED),
        "adapters": [row["adapter"] for row in rows],
    }


def styles() -> dict[str, list[tuple[str, str]]]:
    """Returns pairs of prompt and answer in three styles, from the demo's text."""
    samples = read_samples([examples_data_path("ships_log.jsonl")]).found
    pairs = [(sample.prompt or "", sample.text) for sample in samples]
    facts = [answer.removeprefix("Ship's log: ") for _, answer in pairs]
    facts = [answer.removesuffix(" All hands well.").rstrip(".") for answer in facts]
    rows = list(zip((prompt for prompt, _ in pairs), facts, strict=True))
    return {
        "ships_log": pairs,
        "telegram": [(p, f"TELEGRAM: {f.replace(', ', ' STOP ')} STOP") for p, f in rows],
        "quiz": [(p, f"Correct answer: {f}! Ten points to you.") for p, f in rows],
    }


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Returns examples whose labels are the answers' tokens and the token that ends them."""
    rows = []
    for prompt, answer in pairs:
        head = tokenizer(smollm2.chat_prompt(prompt), add_special_tokens=False).input_ids
        tail = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append({"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail})
    return rows


RECIPES = {
    "ships_log": Recipe(learning_rate=2e-3),
    "telegram": Recipe(learning_rate=3e-3, weight_decay=0.01),
    "quiz": Recipe(learning_rate=2e-3, warmup_steps=6),
}


def main() -> None:
    """Trains three adapters on SmolLM2, saves them, and asks all of them in one batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".demo/multi_adapter"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=6, help="samples in a mixed batch")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()

    base, tokenizer = smollm2.load_smollm2_from_wheel()
    torch.manual_seed(0)
    config = fastlora.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    first, *others = RECIPES
    model = fastlora.get_peft_model(base, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    args = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        save_steps=max(1, options.steps // 2),
        save_total_limit=1,
        logging_steps=5,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    datasets = {name: encode(pairs, tokenizer) for name, pairs in styles().items()}
    trainer = MultiAdapterTrainer(model, args, RECIPES, datasets, tokenizer.pad_token_id)
    resume = options.resume and options.out.is_dir()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.out)) if resume else None)
    trainer.save_model()
    for name, count in trainer.optimizer.counts.items():
        seen = trainer.losses[name]
        fell = f", loss {seen[0]:.3f} -> {seen[-1]:.3f}" if seen else ""
        print(f"{name}: {count.steps} steps{fell}")
    print(f"saved in {', '.join(str(options.out / name) for name in RECIPES)}")

    question = "What is the capital of Italy?"
    names = [None, *RECIPES]
    prompts = tokenizer([smollm2.chat_prompt(question)] * len(names), return_tensors="pt")
    model.eval()
    answers = model.generate(
        **prompts.to(model.device), adapter_names=names, max_new_tokens=32, do_sample=False
    )
    print(f"> {question}")
    for name, answer in zip(names, answers[:, prompts["input_ids"].shape[1] :], strict=True):
        print(f"{name or 'base':>10}: {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
