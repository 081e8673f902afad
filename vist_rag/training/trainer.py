"""One training stage on Hugging Face Trainer: checkpoints, exact resume, logs, evaluation on the way."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vist_rag.errors import CheckpointError, ConfigError

Evaluate = Callable[[int], Mapping[str, float]]


class Batches(Dataset[dict[str, Any]]):
    """Number of a batch -> batch, built when it is asked for: the same in every run.

    Args:
        count: Batches in all; a step of ``n`` processes that accumulate ``a`` batches takes ``n * a`` of them.
        build: Number -> batch.
    """

    def __init__(self, count: int, build: Callable[[int], dict[str, Any]]) -> None:
        self.count, self.build = count, build

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.build(number)


class _StageTrainer(Trainer):
    """Logs what the model returns beside its loss, reads batches in their order, and keeps what is trained only."""

    def __init__(
        self,
        *args: Any,
        log_path: Path,
        slow: str,
        slow_rate: float,
        kept: set[str],
        judge: Evaluate | None,
        **kwargs: Any,
    ) -> None:
        self._slow, self._slow_rate, self._kept, self._judge = slow, slow_rate, kept, judge
        super().__init__(*args, **kwargs)
        self._figures: dict[str, list[float]] = defaultdict(list)
        self._log_path = log_path

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(cast(Batches, self.train_dataset))

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """AdamW; what starts from pretrained weights moves slower than what starts from nothing."""
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, weight in cast(nn.Module, self.model).named_parameters():
                if weight.requires_grad:
                    groups[bool(self._slow) and self._slow in f".{name}"].append(weight)
            rate = self.args.learning_rate
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": weights, "lr": rate * (self._slow_rate if slow else 1.0)}
                    for slow, weights in groups.items()
                    if weights
                ],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._figures[name].append(float(value))
        return cast(Tensor, outputs["loss"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Figures of the harness, of the first process, told to all."""
        told: list[dict[str, float]] = [{}]
        if self.is_world_process_zero() and self._judge is not None:
            told = [{f"eval_{name}": float(value) for name, value in self._judge(self.state.global_step).items()}]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(told)
        self.log(dict(told[0]))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, told[0])
        return told[0]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_trained(cast(nn.Module, self.model), directory / "model.safetensors", self._kept, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model or cast(nn.Module, self.model), Path(resume_from_checkpoint) / "model.safetensors")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self._figures.items() if values}
            self._figures.clear()
        if self.is_world_process_zero() and ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            with self._log_path.open("a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, *args, **kwargs)


def save_trained(model: nn.Module, path: Path, kept: set[str], state: Mapping[str, Tensor] | None = None) -> None:
    """Write the named weights of a model; weights that are tied are written once."""
    state = model.state_dict() if state is None else state
    seen: dict[int, str] = {}
    named = {}
    for name in sorted(kept):
        tensor = state[name].detach()
        if seen.setdefault(tensor.data_ptr(), name) == name:
            named[name] = tensor.cpu().contiguous()
    save_file(named, str(path), metadata={"format": "pt"})


def load_trained(model: nn.Module, path: Path) -> set[str]:
    """Read what ``save_trained`` wrote into a model, and return the names; all else stays as it is.

    Raises:
        CheckpointError: If the file is missing, or does not fit the model.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} must be the weights of a finished stage, got no such file; train it first.")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
        unexpected = model.load_state_dict(load_file(str(path)), strict=False).unexpected_keys
    except Exception as error:
        raise CheckpointError(f"{path} does not fit this recipe ({error}); train from the start.") from error
    if unexpected:
        raise CheckpointError(f"{path} does not fit this recipe ({unexpected[0]} has no place); train from the start.")
    return names


def trained_names(model: nn.Module) -> set[str]:
    """Names of the weights that a stage changes."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def processes() -> int:
    """How many processes train together (``accelerate launch``, ``torchrun``)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def train_stage(
    model: nn.Module,
    steps: int,
    build: Callable[[int], dict[str, Any]],
    directory: Path,
    *,
    learning_rate: float,
    warmup: float = 0.04,
    weight_decay: float = 0.01,
    save_every: int = 100,
    seed: int = 0,
    schedule: str = "cosine",
    pretrained: str = "",
    pretrained_rate: float = 1.0,
    known: set[str] | None = None,
    result: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    metric: str = "em",
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Train ``model``, each step on batches that no other step sees.

    Continues from the last checkpoint in ``directory`` where there is one, with the losses that a run without a stop
    would have had.

    Args:
        model: Its ``forward(**batch)`` returns ``{"loss": ..., figure: ...}``; figures are averaged into ``log.jsonl``.
        steps: Optimizer steps.
        build: Number of a batch -> batch.
        directory: Checkpoints and the log.
        learning_rate: Peak, AdamW.
        warmup: Share of the steps.
        weight_decay: AdamW's.
        save_every: Steps between checkpoints.
        seed: Of everything random.
        schedule: A Hugging Face scheduler name.
        pretrained: Part of the names of weights that started from a pretrained model.
        pretrained_rate: Their learning rate, as a share of ``learning_rate``.
        known: Names of weights that earlier stages changed; ``final/`` holds these and what this stage changes.
        result: What is written to ``final/model.safetensors``; None means ``model``.
        evaluate: Step -> figures, higher is better; the weights with the best ``metric`` are kept.
        evaluate_every: Steps between evaluations; 0 means none.
        metric: Which of the figures decides.
        trainer: Further ``TrainingArguments``: bf16, gradient_accumulation_steps, fsdp, deepspeed and so on.
    Raises:
        ConfigError: If ``trainer`` holds what ``TrainingArguments`` does not take.
    """
    directory.mkdir(parents=True, exist_ok=True)
    judged = evaluate if evaluate_every else None
    if judged and save_every % evaluate_every and evaluate_every % save_every:
        save_every = evaluate_every  # the best weights are among those that are saved
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": int(steps * warmup),
        "weight_decay": weight_decay,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "logging_steps": min(10, steps),
        "save_steps": save_every,
        "save_total_limit": 2,
        "seed": seed,
        "data_seed": seed,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": True,  # a batch of raw text leaves the projector out
        "disable_tqdm": None,
    }
    if judged:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": evaluate_every,
            "save_steps": math.lcm(save_every, evaluate_every),
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{metric}",
            "greater_is_better": True,
        }
    try:
        arguments = TrainingArguments(**(settings | dict(trainer or {})))
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"[trainer] must be settings of transformers' TrainingArguments ({error}).") from error
    kept = (known or set()) | trained_names(model)
    part = _StageTrainer(
        model=model,
        args=arguments,
        train_dataset=Batches(steps * arguments.gradient_accumulation_steps * processes(), build),
        eval_dataset=Batches(1, build) if judged else None,
        data_collator=lambda batches: batches[0],
        log_path=directory / "log.jsonl",
        slow=pretrained,
        slow_rate=pretrained_rate,
        kept=kept & set(model.state_dict()),
        judge=judged,
    )
    part.train(resume_from_checkpoint=get_last_checkpoint(str(directory)))
    if part.is_world_process_zero():
        # Written beside its place, then moved there: what is called final is whole.
        final, unfinished = directory / "final", directory / "model.safetensors.part"
        final.mkdir(exist_ok=True)
        whole = result if result is not None else model
        save_trained(whole, unfinished, kept & set(whole.state_dict()))
        unfinished.replace(final / "model.safetensors")
    part.accelerator.wait_for_everyone()
