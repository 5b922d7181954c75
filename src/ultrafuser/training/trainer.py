"""Hugging Face's Trainer, taught balanced batches, checkpoints of what is trained only, and no pickles."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.progress import ProgressBar
from ultrafuser.training.data import MicroBatchSampler
from ultrafuser.training.state import load_optimizer, load_random_state, save_optimizer, save_random_state

TRAINED = "trained.safetensors"


class FusionTrainer(Trainer):
    """Trains whatever parameters of a fused model require gradients.

    Args:
        model: trained in place.
        args: Hugging Face's settings.
        dataset: rows.
        sampler: which rows make up the micro-batches, for the whole run.
        collator: rows -> batch.
        groups: (parameters, learning rate) of the optimiser.
        bar: shows the steps and the latest loss.
    """

    optimizer: Any  # None before `create_optimizer`

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        args: TrainingArguments,
        dataset: Dataset,
        sampler: MicroBatchSampler,
        collator: Callable[[list[Any]], dict[str, Any]],
        groups: list[dict[str, Any]],
        bar: ProgressBar,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogWithCheckpoints())
        self.add_callback(_ShowSteps(bar))
        self._title = bar.title
        self._sampler = sampler
        self._groups = groups
        self._bank_is_frozen = not any(p.requires_grad for p in model.bank.parameters())
        self._loss_shifts_labels = False  # labels stand already where they are predicted

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer`; the model comes back as it was given, without autocast around its forward pass."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # accelerate leaves these on the model. A mark of an earlier stage would keep it from autocast in the next.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)

    def get_train_dataloader(self) -> DataLoader:
        """The whole run as one pass: the sampler knows how many batches there are."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer`; frozen specialists run as they do in use, without dropout."""
        if self._bank_is_frozen:
            self.accelerator.unwrap_model(model).bank.eval()
        return super().compute_loss(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer`; what is not finite ends the training, before a checkpoint keeps it."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UltrafuserError(
                    f"{self._title}: {name} is {logs[name]} at step {self.state.global_step}. Lower learning_rate, or "
                    "set max_grad_norm or warmup_steps, in a new run."
                )
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the given groups."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self._groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _trained(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / TRAINED)
        parameters = self._trained()
        if tensors.keys() != parameters.keys():
            raise CheckpointError(f"{resume_from_checkpoint} was written by another stage or another recipe.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_random_state(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint), self.args.process_index, self.args.world_size)


class LogWithCheckpoints(TrainerCallback):
    """Logs at every checkpoint, so that a run that goes on from there logs what an unbroken one does."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint is due."""
        control.should_log |= control.should_save


class _ShowSteps(TrainerCallback):
    """Moves a progress bar."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:  # nothing is left of a finished stage that is resumed
            self._bar.update(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self._bar.update(state.global_step, state.max_steps, f"loss {logs['loss']:.4f}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint; one that a killed run left half-written does not count.

    `trainer_state.json` is what the Trainer writes last.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, json.JSONDecodeError):
            continue
    return max(found)[1] if found else None
