"""Hugging Face's Trainer, taught balanced batches, checkpoints of what is trained only, and no pickles."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ultrafuser.errors import CheckpointError
from ultrafuser.modeling.model import UltraFuserForCausalLM
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
        title: shown beside the progress bar.
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
        title: str,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogWithCheckpoints())
        self.add_callback(ProgressBar(title))
        self._sampler = sampler
        self._groups = groups
        self._bank_is_frozen = not any(p.requires_grad for p in model.bank.parameters())
        self._loss_shifts_labels = False  # labels stand already where they are predicted

    def get_train_dataloader(self) -> DataLoader:
        """The whole run as one pass: the sampler knows how many batches there are."""
        loader = DataLoader(self.train_dataset, batch_sampler=self._sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer`; frozen specialists run as they do in use, without dropout."""
        if self._bank_is_frozen:
            self.accelerator.unwrap_model(model).bank.eval()
        return super().compute_loss(model, *args, **kwargs)

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
            load_random_state(Path(checkpoint), self.args.process_index)


class LogWithCheckpoints(TrainerCallback):
    """Logs at every checkpoint, so that a run that goes on from there logs what an unbroken one does."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint is due."""
        control.should_log |= control.should_save


class ProgressBar(TrainerCallback):
    """A bar with the latest loss on standard error; a line per log step where that is no terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=self._console,
                disable=not self._console.is_terminal,
            )
            self._bar.start()
            self._bar.add_task(self._title, total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self._bar is None or logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self._bar.update(self._bar.task_ids[0], loss=f"loss {loss:.3f}")
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: step {state.global_step}/{state.max_steps}, loss {loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()


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
