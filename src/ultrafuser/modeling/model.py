"""The fused model as a Hugging Face model: forward, generate, from_pretrained, save_pretrained.

The path of a token: bank -> hidden states -> gate -> gate weights -> one scaled product with the heads.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationConfig
from transformers.utils import ModelOutput

from ultrafuser.errors import ShapeError, TemplateError, UltrafuserError
from ultrafuser.fusion import Gate, fused_cross_entropy, fused_logits
from ultrafuser.fusion.loss import IGNORE_INDEX
from ultrafuser.modeling.cache import FusedCache
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.specialists import SpecialistBank, build_bank
from ultrafuser.modeling.templates import ConversationEncoder


@dataclass
class UltraFuserOutput(ModelOutput):
    """What `UltraFuserForCausalLM.forward` returns.

    Attributes:
        loss: scalar, nats per labelled token; with labels.
        logits: fused logits, (B, T', V): for the kept positions; with labels only on request.
        past_key_values: the cache, when one is used.
        gate_weights: float32, (B, T', N), for the same positions as the loss or the logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FusedCache | None = None
    gate_weights: Tensor | None = None


class UltraFuserForCausalLM(PreTrainedModel, GenerationMixin):
    """N specialists and a gate that weighs their logits for every token.

    Args:
        config: with every specialist's architecture; weights are random until they are loaded.
        bank: specialists already in memory, instead of building them from `config`.
    """

    config_class = UltraFuserConfig
    base_model_prefix = "bank"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = False

    def __init__(self, config: UltraFuserConfig, bank: SpecialistBank | None = None) -> None:
        super().__init__(config)
        self.bank = build_bank(config, config.dtype) if bank is None else bank
        self.gate = Gate(self.bank.hidden_sizes, config.gate_size, config.gate_form)
        self.config.vocab_size = self.bank.vocab_size
        self.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Names of the specialists, in order."""
        return self.bank.names

    @property
    def num_specialists(self) -> int:
        """N."""
        return self.bank.num_specialists

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the first specialist."""
        return self.bank.embeddings()

    def get_output_embeddings(self) -> None:
        """None: the output is a gate-weighted sum of several heads, not one layer."""
        return

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        labels: Tensor | None = None,
        specialist_input_ids: Tensor | None = None,
        specialist_attention_mask: Tensor | None = None,
        response_positions: Tensor | None = None,
        specialist_hidden_states: Sequence[Tensor] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> UltraFuserOutput:
        """Run all specialists, weigh them, and give fused logits or the loss.

        Three ways in: `input_ids` when all specialists read the same tokens (then everything is as in any causal
        language model); `specialist_input_ids` when each reads its own prompt; `specialist_hidden_states` when the
        specialists have already run (stage 1 with cached states).

        Args:
            input_ids: int64, (B, T), read by every specialist.
            attention_mask: int64, (B, past + T), for input_ids.
            position_ids: int64, (B, T), for input_ids; counted from the mask when None.
            past_key_values: cache of an earlier call; it is extended in place.
            labels: int64. With input_ids (B, T), shifted here as usual; with the other two (B, R), already aligned:
                labels[:, r] is what position response_positions[..., r] predicts. -100 carries no loss.
            specialist_input_ids: int64, (B, N, T).
            specialist_attention_mask: int64, (B, N, T).
            response_positions: int64, (B, N, R): where each specialist predicts response token r. Without it the
                output is for all T positions, as they stand side by side; left-padded prompts agree on the last.
            specialist_hidden_states: N tensors, float, (B, R, H_j): run nothing but gate and heads.
            use_cache: make a cache and return it.
            logits_to_keep: as in Hugging Face: last positions to give logits for (0: all), or their indices.
            return_logits: give logits; by default only when there are no labels.
            num_items_in_batch: divides the summed loss; the labelled tokens of this call when None.
            prompt_length: set by `generate`, not read here.
            **kwargs: what trainers and `generate` add (such as return_dict); not read.

        Returns:
            UltraFuserOutput.

        Raises:
            ShapeError: none or several of the ways in, or shapes that do not fit N.
        """
        _one_way_in(input_ids, specialist_input_ids, specialist_hidden_states)
        cache = self._cache_for(past_key_values, use_cache) if specialist_hidden_states is None else None
        if specialist_hidden_states is not None:
            states = list(specialist_hidden_states)
        elif specialist_input_ids is not None:
            self._check_shapes(specialist_input_ids, response_positions)
            states = self._run_bank(specialist_input_ids, specialist_attention_mask, None, cache)
            states = _gather(states, response_positions) if response_positions is not None else states
        else:
            assert input_ids is not None
            states = self._run_shared(input_ids, attention_mask, position_ids, cache)
            labels = None if labels is None else _shifted(labels)
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            states = [state[:, keep] for state in states]
        return self._fuse(states, labels, return_logits, num_items_in_batch, cache)

    def hidden_states(self, specialist_input_ids: Tensor, specialist_attention_mask: Tensor | None = None,
                      response_positions: Tensor | None = None) -> list[Tensor]:  # fmt: skip
        """The specialists' last hidden states, without gate and heads.

        Args:
            specialist_input_ids: int64, (B, N, T).
            specialist_attention_mask: int64, (B, N, T).
            response_positions: int64, (B, N, R); all positions when None.

        Returns:
            N tensors, (B, R, H_j) or (B, T, H_j).
        """
        self._check_shapes(specialist_input_ids, response_positions)
        states = self._run_bank(specialist_input_ids, specialist_attention_mask, None, None)
        return states if response_positions is None else _gather(states, response_positions)

    def conversation_encoder(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> ConversationEncoder:
        """The encoder that reads conversations for this model, each specialist in its own template.

        Args:
            tokenizer: the specialists' tokenizer.
            max_length: tokens a specialist reads at most, where its own context is not shorter.

        Raises:
            TemplateError: a specialist has no template, or one that cannot be aligned.
        """
        templates, limits = {}, {}
        for member, context in zip(self.config.members, self.bank.context_lengths, strict=True):
            if member.template is None:
                raise TemplateError(f"specialist {member.name} has no chat template. Set one when fusing.")
            templates[member.name] = member.template
            known = [limit for limit in (context, max_length) if limit is not None]
            limits[member.name] = min(known, default=sys.maxsize)
        return ConversationEncoder(
            tokenizer, templates, end_token_id=self.config.end_token_id, max_length=limits
        )

    def _fuse(
        self,
        states: list[Tensor],
        labels: Tensor | None,
        return_logits: bool | None,
        num_items: int | Tensor | None,
        cache: FusedCache | None,
    ) -> UltraFuserOutput:
        weights = self.gate(states)
        heads = self.bank.heads()
        loss = None if labels is None else fused_cross_entropy(states, weights, heads, labels, num_items)
        wanted = labels is None if return_logits is None else return_logits
        return UltraFuserOutput(
            loss=loss,
            logits=fused_logits(states, weights, heads) if wanted else None,
            past_key_values=cache,
            gate_weights=weights,
        )

    def _run_shared(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: FusedCache | None,
    ) -> list[Tensor]:
        length = input_ids.shape[1]
        ids = input_ids.unsqueeze(1).expand(-1, self.num_specialists, -1)
        mask = None if attention_mask is None else attention_mask[:, None, -length:].expand_as(ids)
        positions = None if position_ids is None else position_ids[:, None, -length:].expand_as(ids)
        return self._run_bank(ids, mask, positions, cache)

    def _run_bank(
        self, ids_BNT: Tensor, mask_BNT: Tensor | None, positions_BNT: Tensor | None, cache: FusedCache | None
    ) -> list[Tensor]:
        tracker = FusedCache([], self.num_specialists) if cache is None else cache
        new_mask = torch.ones_like(ids_BNT) if mask_BNT is None else mask_BNT
        full_mask, counted = tracker.extend(new_mask)
        # Frozen specialists run without autograd: nothing is kept of their passes (stage 1).
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.bank.parameters())
        with torch.set_grad_enabled(trains):
            return self.bank(
                ids_BNT,
                full_mask,
                counted if positions_BNT is None else positions_BNT,
                None if cache is None else cache.parts,
            )

    def _cache_for(self, past: FusedCache | None, use_cache: bool | None) -> FusedCache | None:
        if past is not None and not isinstance(past, FusedCache):
            raise UltrafuserError(
                f"past_key_values must be a FusedCache (model.new_cache()), got {type(past).__name__}: every "
                "specialist has keys and values of its own."
            )
        return self.new_cache() if past is None and use_cache else past

    def new_cache(self) -> FusedCache:
        """An empty cache for one batch."""
        return FusedCache(self.bank.new_caches(), self.num_specialists)

    def _check_shapes(self, ids_BNT: Tensor, positions_BNR: Tensor | None) -> None:
        for name, tensor in (("specialist_input_ids", ids_BNT), ("response_positions", positions_BNR)):
            if tensor is not None and (tensor.dim() != 3 or tensor.shape[1] != self.num_specialists):
                raise ShapeError(
                    f"{name} must be (B, N, ...) with N = {self.num_specialists} specialists, "
                    f"got {tuple(tensor.shape)}."
                )

    # --- generation -------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Hugging Face's `generate`, also over prompts that differ per specialist.

        Args:
            inputs: int64, (B, P): a prompt that all specialists read.
            **kwargs: what `GenerationMixin.generate` takes. For prompts of their own, what
                `ConversationEncoder.batch_prompts` gives: `specialist_input_ids` and `specialist_attention_mask`
                are read; `input_ids` (the first specialist's prompt) is what the returned sequences begin with.

        Returns:
            As `GenerationMixin.generate`.

        Raises:
            UltrafuserError: specialist_input_ids without input_ids, or with a cache that is not empty.
        """
        if kwargs.get("specialist_input_ids") is not None:
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            if prompt is None:
                raise UltrafuserError(
                    "generate: specialist_input_ids need input_ids beside them, the first specialist's prompts, which "
                    "the returned sequences begin with. ConversationEncoder.batch_prompts gives both."
                )
            past = kwargs.get("past_key_values")
            if past is not None and past.is_initialized:
                raise UltrafuserError(
                    "generate: past_key_values have been read into before, but prompts that differ per specialist are "
                    "always read from their beginning. Leave past_key_values out."
                )
            kwargs["prompt_length"] = prompt.shape[1]
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FusedCache | None = None,
        attention_mask: Tensor | None = None,
        specialist_input_ids: Tensor | None = None,
        specialist_attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step reads: see `GenerationMixin.prepare_inputs_for_generation`."""
        if specialist_input_ids is None:
            return super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
        common = {
            "logits_to_keep": 1,
            "use_cache": past_key_values is not None,
            "past_key_values": past_key_values,
        }
        response = input_ids[:, prompt_length:]
        if past_key_values is not None and past_key_values.is_initialized:
            # After the prompt all specialists read the same tokens; the cache knows what each has read before.
            read = past_key_values.get_seq_length() - specialist_input_ids.shape[-1]
            return {"input_ids": response[:, read:], **common}
        new = response.unsqueeze(1).expand(-1, self.num_specialists, -1)
        if specialist_attention_mask is None:
            specialist_attention_mask = torch.ones_like(specialist_input_ids)
        return {
            "specialist_input_ids": torch.cat([specialist_input_ids, new], dim=-1),
            "specialist_attention_mask": torch.cat([specialist_attention_mask, torch.ones_like(new)], dim=-1),
            **common,
        }

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise UltrafuserError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: a fused model "
                "keeps one growing cache per specialist."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], gate_only: bool = False, **kwargs: Any
    ) -> None:
        """Write a checkpoint folder: `config.json`, `generation_config.json` and safetensors.

        Args:
            save_directory: the folder; files of the same names are replaced.
            gate_only: write only the gate and where the specialists come from (a megabyte or a few).
            **kwargs: `max_shard_size` ("5GB") is read; `push_to_hub` and the rest are refused.

        Raises:
            UltrafuserError: an option that is not supported; gate_only for specialists that came from nowhere.
        """
        from ultrafuser.modeling.checkpoint import save_model

        save_model(self, save_directory, gate_only, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Self:
        """Open a checkpoint, self-contained or gate-only, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            *args: not accepted.
            **kwargs: `dtype` (torch dtype, its name, or "auto"), `device_map` (a device), `revision`,
                `attn_implementation`, `config`.

        Returns:
            The model in evaluation mode.

        Raises:
            CheckpointError: tensors missing, unexpected, pickled; specialists whose vocabularies differ.
        """
        from ultrafuser.modeling.checkpoint import load_model

        return load_model(cls, pretrained_model_name_or_path, *args, **kwargs)


def _one_way_in(*inputs: object) -> None:
    if sum(given is not None for given in inputs) != 1:
        raise ShapeError(
            "give exactly one of input_ids (all specialists read the same), specialist_input_ids (each reads its own) "
            "and specialist_hidden_states (they have already run)."
        )


def _shifted(labels: Tensor) -> Tensor:
    """Labels aligned with the positions that predict them: moved one to the left, -100 at the end."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE_INDEX)], dim=1)


def _gather(states: Sequence[Tensor], positions_BNR: Tensor) -> list[Tensor]:
    """Each specialist's states at its response positions: N x (B, T, H_j) -> N x (B, R, H_j)."""
    rows = torch.arange(positions_BNR.shape[0], device=positions_BNR.device).unsqueeze(1)
    return [state[rows, positions_BNR[:, index]] for index, state in enumerate(states)]


AutoConfig.register("ultrafuser", UltraFuserConfig)
AutoModelForCausalLM.register(UltraFuserConfig, UltraFuserForCausalLM)
