"""One training stage on Hugging Face Trainer: checkpoints, exact resume, logs, evaluation on the way."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from vist_rag.errors import ConfigError
from vist_rag.generation import best_device
from vist_rag.training.checkpoints import last_checkpoint, load_trained, rewind, save_trained, step_of, trained_names

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


class _Rhythm(TrainerCallback):
    """Saves between evaluations too, and logs what is saved, so that a log goes on where its checkpoint does."""

    def __init__(self, save_every: int) -> None:
        self._save_every = save_every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or state.global_step % self._save_every == 0
        control.should_log = control.should_log or control.should_save


class _Bar(TrainerCallback):
    """Progress on stderr, and none where that is a file: transformers' own prints on stdout, too."""

    _bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(
            desc=Path(args.output_dir).name,
            total=state.max_steps,
            initial=state.global_step,
            unit=" steps",
            dynamic_ncols=True,
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


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
        self._figures: dict[str, list[Tensor]] = defaultdict(list)
        self._log_path = log_path

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(cast(Batches, self.train_dataset))

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        """The optimizer; what starts from pretrained weights moves slower than what starts from nothing."""
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, weight in cast(nn.Module, self.model).named_parameters():
                if weight.requires_grad:
                    groups[self._slow != "" and self._slow in f".{name}" and "lora_" not in name].append(weight)
            rate = self.args.learning_rate
            make, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = make(
                [
                    {"params": weights, "lr": rate * (self._slow_rate if slow else 1.0)}
                    for slow, weights in groups.items()
                    if weights
                ],
                **{**options, "weight_decay": self.args.weight_decay},
            )
        return cast(torch.optim.Optimizer, self.optimizer)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._figures[name].append(value.detach())  # a float of it would wait for the device
        return cast(Tensor, outputs["loss"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Figures of the harness, of the first process, told to all."""
        told: list[dict[str, float]] = [{}]
        if self.is_world_process_zero() and self._judge is not None:
            figures = self._judge(self.state.global_step)
            metric = str(self.args.metric_for_best_model).removeprefix("eval_")
            if metric not in figures:
                raise ConfigError(f"metric of [evaluation] must be one of {', '.join(figures)}, got {metric!r}.")
            told = [{f"eval_{name}": float(value) for name, value in figures.items()}]
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
            logs |= {name: round(float(torch.stack(some).mean()), 4) for name, some in self._figures.items()}
            self._figures.clear()
        if self.is_world_process_zero() and ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            with self._log_path.open("a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, *args, **kwargs)


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

    Continues from the last whole checkpoint in ``directory`` where there is one, with the losses that a run without a
    stop would have had; the log is that of such a run.

    Args:
        model: Its ``forward(**batch)`` returns ``{"loss": ..., figure: ...}``; figures are averaged into ``log.jsonl``.
        steps: Optimizer steps.
        build: Number of a batch -> batch.
        directory: Checkpoints and the log.
        learning_rate: Peak, AdamW.
        warmup: Share of the steps.
        weight_decay: AdamW's.
        save_every: Steps between checkpoints; every evaluation has one, too.
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
        CheckpointError: If the last checkpoint does not fit the model.
        ConfigError: If ``trainer`` holds what ``TrainingArguments`` does not take, or no evaluation gives ``metric``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    judged = evaluate if evaluate_every else None
    wanted = dict(trainer or {})
    if not hasattr(model, "activation_checkpointing_enable"):  # no generator runs
        wanted = {name: value for name, value in wanted.items() if "checkpointing" not in name}
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": int(steps * warmup),
        "weight_decay": weight_decay,
        "optim": "adamw_torch",
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "logging_steps": min(10, steps),
        "save_steps": evaluate_every if judged else save_every,  # the best weights are among those that are saved
        "save_total_limit": 2,
        "seed": seed,
        "data_seed": seed,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,  # batches are made where the model is
        "ddp_find_unused_parameters": True,  # a batch of raw text leaves the projector out
        "ddp_broadcast_buffers": False,  # glyphs and embeddings, which do not change
        "use_cpu": best_device().type == "cpu",
        "disable_tqdm": True,
    }
    if judged:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": evaluate_every,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{metric}",
            "greater_is_better": True,
        }
    try:
        arguments = TrainingArguments(**(settings | wanted))
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"[trainer] must be settings of transformers' TrainingArguments ({error}).") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs take a process each; one for all would split batches
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
        callbacks=[_Rhythm(save_every), _Bar()],
    )
    for printing in (PrinterCallback, ProgressCallback):
        part.remove_callback(printing)
    last = last_checkpoint(directory)
    if part.is_world_process_zero():
        rewind(directory / "log.jsonl", step_of(last))
    part.train(resume_from_checkpoint=str(last) if last else None)
    if part.is_world_process_zero():
        # Written beside its place, then moved there: what is called final is whole.
        final, unfinished = directory / "final", directory / "model.safetensors.part"
        final.mkdir(exist_ok=True)
        whole = result if result is not None else model
        save_trained(whole, unfinished, kept & set(whole.state_dict()))
        unfinished.replace(final / "model.safetensors")
    part.accelerator.wait_for_everyone()
