"""One training stage on Hugging Face Trainer: checkpoints, exact resume, logs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class _Batches(Dataset[dict[str, Any]]):
    """Step -> batch, built when it is asked for."""

    def __init__(self, indices: Dataset[list[int]], build: Callable[[list[int], int], dict[str, Any]]) -> None:
        self.indices, self.build = indices, build

    def __len__(self) -> int:
        return len(self.indices)  # type: ignore[arg-type]

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.build(self.indices[step], step)


class _StageTrainer(Trainer):
    """Logs what the model returns beside its loss, and reads batches in their order."""

    def __init__(self, *args: Any, log_path: Path, pretrained_rate: float, **kwargs: Any) -> None:
        self._pretrained_rate = pretrained_rate
        super().__init__(*args, **kwargs)
        self._figures: dict[str, list[float]] = defaultdict(list)
        self._log_path = log_path

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(cast(Sized, self.train_dataset))

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """AdamW; what starts from pretrained weights moves slower than what starts from nothing."""
        if self.optimizer is None:
            slow: list[nn.Parameter] = []
            fast: list[nn.Parameter] = []
            for name, weight in cast(nn.Module, self.model).named_parameters():
                (slow if ".bert." in name else fast).append(weight)
            rate = self.args.learning_rate
            groups = [{"params": fast, "lr": rate}, {"params": slow, "lr": rate * self._pretrained_rate}]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                betas=(0.9, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._figures[name].append(float(value))
        return cast(Tensor, outputs["loss"])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # save_model knows tied weights; what Trainer does for a plain module does not.
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_model(cast(nn.Module, self.model), str(directory / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # What Trainer does here takes tied weights, which are saved once, for missing ones.
        load_model(model or cast(nn.Module, self.model), Path(resume_from_checkpoint) / "model.safetensors")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self._figures.items() if values}
            self._figures.clear()
            with self._log_path.open("a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, *args, **kwargs)


def train_stage(
    model: nn.Module,
    indices: Dataset[list[int]],
    build: Callable[[list[int], int], dict[str, Any]],
    directory: Path,
    *,
    learning_rate: float,
    warmup: float = 0.04,
    weight_decay: float = 0.01,
    save_every: int = 100,
    seed: int = 0,
    schedule: str = "cosine",
    pretrained_rate: float = 1.0,
    result: nn.Module | None = None,
) -> None:
    """Train ``model`` on every batch once, in order.

    Continues from the last checkpoint in ``directory`` where there is one.

    Args:
        model: Its ``forward(**batch)`` returns ``{"loss": ..., figure: ...}``; figures are averaged into ``log.jsonl``.
        indices: Step -> indices of that step's items.
        build: (indices, step) -> batch.
        directory: Checkpoints and the log.
        learning_rate: Peak, AdamW.
        warmup: Share of the steps.
        weight_decay: AdamW's.
        save_every: Steps between checkpoints.
        seed: Of everything random.
        schedule: A Hugging Face scheduler name.
        pretrained_rate: Learning rate of the base model's own layers, as a share of ``learning_rate``.
        result: What is written to ``final/model.safetensors``; None means ``model``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    steps = len(indices)  # type: ignore[arg-type]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=int(steps * warmup),
        weight_decay=weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=min(10, steps),
        save_steps=save_every,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=None,
    )
    trainer = _StageTrainer(
        model=model,
        args=arguments,
        train_dataset=_Batches(indices, build),
        data_collator=lambda batches: batches[0],
        log_path=directory / "log.jsonl",
        pretrained_rate=pretrained_rate,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(directory)))
    # Written beside its place, then moved there: what is called final is whole.
    final, unfinished = directory / "final", directory / "model.safetensors.part"
    final.mkdir(exist_ok=True)
    save_model(result if result is not None else model, str(unfinished))
    unfinished.replace(final / "model.safetensors")
