"""The two stages (paper, algorithm 1): first the gate alone, then gate and specialists together.

Also the one stage that `specialize` needs: a single specialist is a fused model with N = 1, whose gate weight
is always one, so the same trainer, batches and loss fine-tune it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ultrafuser.errors import ConversationTooLongError, DataError, RecipeError, located
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder, EncodedConversation
from ultrafuser.progress import ProgressBar
from ultrafuser.training.data import BalancedBatchSampler, ConversationDataset, Messages, MicroBatchSampler
from ultrafuser.training.features import StateCache, StateDataset, cache_states, collate_states
from ultrafuser.training.recipe import LoraSettings, Stage1, Stage2, StageSettings, TuningSettings
from ultrafuser.training.trainer import FusionTrainer, last_checkpoint

_DAY_S = 24 * 3600


@dataclass(frozen=True)
class EncodedData:
    """Training conversations, encoded for the specialists.

    Attributes:
        conversations: all domains, one after another.
        domain_sizes: domain -> number of conversations, in that order.
        dropped: domain -> conversations that were too long and left out, where any were.
        truncated: domain -> conversations that were too long and lost the end of their responses, where any
            were.
        kept: domain -> which of its rows are there, by their places.
    """

    conversations: Sequence[EncodedConversation]
    domain_sizes: Mapping[str, int]
    dropped: Mapping[str, int]
    truncated: Mapping[str, int]
    kept: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        losses: (step, mean loss in nats per response token since the last entry).
        seconds: of training, of this process; what came before a resume is not in it.
        cache: the cached states, where they were used.
    """

    losses: list[tuple[int, float]]
    seconds: float
    cache: StateCache | None = None


def encode_data(
    encoder: ConversationEncoder,
    conversations: Mapping[str, Sequence[Messages]],
    too_long: Literal["truncate", "drop", "error"],
    section: str = "data",
) -> EncodedData:
    """Encode every domain's conversations.

    Args:
        encoder: of the specialists.
        conversations: domain -> conversations.
        too_long: what to do with conversations that a specialist cannot read to the end: cut response tokens
            from their end (and drop those of which none is left), drop them, or refuse.
        section: of the recipe that they come from, for messages.

    Raises:
        TemplateError: a conversation cannot be read, or is too long and `too_long` is "error"; the message
            names its domain and number.
        DataError: nothing is left of a domain.
    """
    encoded: dict[str, dict[int, EncodedConversation]] = {}
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for domain, rows in conversations.items():
        encoded[domain] = {}
        for place, row in enumerate(rows):
            with located(f"{section}.{domain}, conversation {place + 1}"):
                try:
                    encoded[domain][place] = encoder.encode(row)
                except ConversationTooLongError:
                    if too_long == "error":
                        raise
                    rest = _shortened(encoder, row) if too_long == "truncate" else None
                    (dropped if rest is None else truncated)[domain] += 1
                    if rest is not None:
                        encoded[domain][place] = rest
        if not encoded[domain]:
            raise DataError(
                f"{section}.{domain}: all {len(rows)} conversations are longer than a specialist reads "
                f"({min(encoder.max_length.values())} tokens). Raise max_length, or shorten them."
            )
    sizes = {domain: len(rows) for domain, rows in encoded.items()}
    kept = {domain: list(rows) for domain, rows in encoded.items()}
    return EncodedData(
        [row for rows in encoded.values() for row in rows.values()], sizes, dropped, truncated, kept
    )


def _shortened(encoder: ConversationEncoder, conversation: Messages) -> EncodedConversation | None:
    """A conversation cut to what every specialist reads; None when not one response token is left."""
    try:
        return encoder.encode(conversation, too_long="truncate")
    except ConversationTooLongError:
        return None


def run_stage1(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    data: EncodedData,
    settings: Stage1,
    folder: Path,
    seed: int,
) -> StageResult:
    """Train the gate alone; the specialists run without autograd, or only once.

    Args:
        model: trained in place.
        encoder: that encoded the data.
        data: conversations of every domain.
        settings: of the stage.
        folder: for checkpoints and cached states; a training that stopped there goes on.
        seed: of the order of examples.
    """
    model.requires_grad_(False)
    model.gate.requires_grad_(True)
    groups = [{"params": list(model.gate.parameters())}]
    arguments = _arguments(settings, folder, seed, bf16=False)  # all that is trained is the gate, in float32
    arguments.ddp_find_unused_parameters = False  # the gate is always used
    if not settings.cache_states or settings.steps == 0:
        dataset: Dataset = ConversationDataset(data.conversations, data.domain_sizes)
        return _train(model, dataset, encoder.collate, data, settings, groups, arguments, "stage 1")
    place = folder / "states" if settings.cache_states is True else Path(settings.cache_states)
    with (
        arguments.main_process_first(local=False),  # the others find what it wrote
        ProgressBar("Running the specialists once", quiet=arguments.process_index > 0) as bar,
    ):
        cache = cache_states(model.to(arguments.device), encoder, data.conversations, place, bar.update)
    dataset = StateDataset(cache.folder, data.conversations)
    result = _train(model, dataset, collate_states, data, settings, groups, arguments, "stage 1")
    return replace(result, cache=cache)


def run_stage2(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    data: EncodedData,
    settings: Stage2,
    folder: Path,
    seed: int,
) -> StageResult:
    """Train gate and specialists together; see `run_stage1`.

    Raises:
        RecipeError: see `check_stage2`.
    """
    check_stage2(model, settings)
    model.requires_grad_(False)
    prepare_specialists(model, settings.train, settings.lora, seed)
    trained = [p for p in model.bank.parameters() if p.requires_grad]
    model.gate.requires_grad_(True)
    gate_rate = settings.learning_rate if settings.gate_learning_rate is None else settings.gate_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": trained},
        {"params": list(model.gate.parameters()), "lr": gate_rate},
    ]
    return _train_specialists(
        model, encoder, data, settings, groups, folder, seed, "stage 2", settings.gradient_checkpointing
    )


def run_specialize(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    data: EncodedData,
    settings: TuningSettings,
    mode: str,
    folder: Path,
    seed: int,
    gradient_checkpointing: bool = False,
) -> StageResult:
    """Fine-tune the one specialist of a fused model with N = 1; its gate has no say and is left alone.

    Args:
        model: trained in place; with an adapter bank for mode "lora", a whole one for "full".
        encoder: that encoded the data.
        data: conversations of every domain.
        settings: of the stage.
        mode: "full" or "lora".
        folder: for checkpoints; a training that stopped there goes on.
        seed: of the order of examples.
        gradient_checkpointing: recompute activations.
    """
    model.requires_grad_(False)
    prepare_specialists(model, mode, None, seed)
    groups = [{"params": [p for p in model.bank.parameters() if p.requires_grad]}]
    return _train_specialists(
        model, encoder, data, settings, groups, folder, seed, "specialize", gradient_checkpointing
    )


def check_stage2(model: UltraFuserForCausalLM, settings: Stage2) -> None:
    """See before stage 1 that stage 2 will be able to train these specialists.

    Args:
        model: is left as it is.
        settings: of stage 2.

    Raises:
        RecipeError: full training of adapters, LoRA with nothing to train or settings that nothing takes, or a GPU
            without bfloat16.
        UltrafuserError: no layer of a specialist carries one of the names in lora.target_modules.
    """
    computes_in_bfloat16(settings)
    bank = model.bank
    if isinstance(bank, WholeSpecialists):
        if settings.train == "lora":
            for specialist in bank.models:
                fresh_adapter(specialist, settings.lora, "", seed=0)
        return
    assert isinstance(bank, AdapterSpecialists)
    if settings.train == "full":
        raise RecipeError(
            "stage2.train: full needs whole specialists, but these are adapters over one base, which they share. "
            "Use train: lora or bank: whole, or leave stage 2 out (stage2: null)."
        )
    if settings.lora is not None:
        raise RecipeError(
            "stage2.lora shapes new adapters on whole specialists, but these are adapters already, which are trained "
            "as they are. Leave stage2.lora out."
        )
    if not list(bank.lora_parameters()):
        raise RecipeError(
            "stage2.train: lora has nothing to train: no specialist of this bank has an adapter. "
            "Use bank: whole, or leave stage 2 out (stage2: null)."
        )


def computes_in_bfloat16(settings: TuningSettings) -> bool:
    """What `mixed_precision` means on this machine.

    Raises:
        RecipeError: it asks for bfloat16, and the GPU has no such arithmetic.
    """
    has_gpu = torch.cuda.is_available()
    able = not has_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.mixed_precision == "bfloat16" and not able:
        raise RecipeError(
            f"mixed_precision: bfloat16 needs a GPU that computes in it, got {torch.cuda.get_device_name()}. "
            "Use auto or none."
        )
    return settings.mixed_precision == "bfloat16" or (settings.mixed_precision == "auto" and has_gpu and able)


def prepare_specialists(
    model: UltraFuserForCausalLM, mode: str, lora: LoraSettings | None, seed: int
) -> None:
    """Make the specialists' weights trainable, in float32: see `TuningSettings`.

    Args:
        model: changed in place.
        mode: "full" (every weight of whole specialists) or "lora" (an adapter bank's adapters; whole
            specialists get new ones).
        lora: settings of new adapters; the defaults when None.
        seed: of new adapters.
    """
    bank = model.bank
    assert isinstance(bank, WholeSpecialists | AdapterSpecialists)
    if mode == "full":
        trained = list(bank.parameters())
    else:
        if isinstance(bank, WholeSpecialists):
            lora = LoraSettings() if lora is None else lora
            bank.adopt_adapters(lora.rank, lora.alpha, lora.target_modules, seed)
        trained = list(bank.lora_parameters())
    hold_in(trained, torch.float32)
    for parameter in trained:
        parameter.requires_grad_(True)


def hold_in(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Change the type of parameters. Buffers stay as they are: rotary frequencies do not bear bfloat16."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def fresh_adapter(base: nn.Module, lora: LoraSettings | None, base_name: str, seed: int) -> Adapter:
    """A new adapter over a base, with a PEFT configuration of its own.

    Args:
        base: the model it will change.
        lora: rank, alpha and layers; the defaults when None.
        base_name: written into the configuration.
        seed: of its random start.
    """
    lora = LoraSettings() if lora is None else lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": lora.target_modules,
    }
    return Adapter.initial(base, settings, seed)


def _train_specialists(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    data: EncodedData,
    settings: TuningSettings,
    groups: list[dict[str, Any]],
    folder: Path,
    seed: int,
    title: str,
    gradient_checkpointing: bool,
) -> StageResult:
    dataset = ConversationDataset(data.conversations, data.domain_sizes)
    arguments = _arguments(settings, folder, seed, computes_in_bfloat16(settings))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return _train(model, dataset, encoder.collate, data, settings, groups, arguments, title)
    finally:
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()


def _train(
    model: UltraFuserForCausalLM,
    dataset: Dataset,
    collator: Callable[[list[Any]], dict[str, Any]],
    data: EncodedData,
    settings: StageSettings,
    groups: list[dict[str, Any]],
    arguments: TrainingArguments,
    title: str,
) -> StageResult:
    if settings.steps == 0:
        return StageResult([], 0.0)
    accumulation = _accumulation(settings, arguments.world_size)
    arguments.gradient_accumulation_steps = accumulation
    batches = BalancedBatchSampler(
        data.domain_sizes,
        examples_per_domain=settings.examples_per_domain,
        num_batches=settings.steps,
        seed=arguments.seed,
        balanced=settings.balanced,
    )
    lengths = [max(len(ids) for ids in c.input_ids) for c in data.conversations]
    sampler = MicroBatchSampler(batches, accumulation * arguments.world_size, lengths)
    checkpoint = last_checkpoint(Path(arguments.output_dir))
    with ProgressBar(title, keep=True, quiet=arguments.process_index > 0) as bar:
        trainer = FusionTrainer(model, arguments, dataset, sampler, collator, groups, bar)
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return StageResult(losses, output.metrics["train_runtime"])


def _accumulation(settings: StageSettings, num_processes: int) -> int:
    """Micro-batches that one process runs for one step."""
    per_pass = settings.examples_per_pass
    share, rest = divmod(settings.examples_per_domain, num_processes)
    if rest or (per_pass is not None and share % per_pass):
        raise RecipeError(
            f"examples_per_domain ({settings.examples_per_domain}) must be a multiple of the processes "
            f"({num_processes}){'' if per_pass is None else f' times examples_per_pass ({per_pass})'}. "
            "Change one of them."
        )
    return 1 if per_pass is None else share // per_pass


def _scheduler(settings: StageSettings) -> str:
    """Hugging Face's name of the schedule: its plain `constant` knows no warm-up."""
    return "constant_with_warmup" if settings.schedule == "constant" else settings.schedule


def _arguments(settings: StageSettings, folder: Path, seed: int, bf16: bool) -> TrainingArguments:
    save_every = settings.save_every if settings.save_every is not None else max(1, settings.steps // 10)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_scheduler(settings),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it would show the mean of the losses before
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_timeout=_DAY_S,  # the others wait while one process runs the specialists for the cached states
    )
    # Also where a machine has several GPUs, one process drives one: torchrun starts more.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.mixed_precision = "bf16" if bf16 else "no"  # the recipe's word, not a launcher's
    return arguments
