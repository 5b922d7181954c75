"""N LoRA adapters over one base, folded into the batch.

Every targeted linear layer sees the rows of all specialists at once (specialist-major: row n * B + b), multiplies them
by the base weight, which is read once, and adds each specialist's low-rank part with one batched product. Layers that
read the same input (q/k/v, gate/up) are joined into one wider layer: on a decode step, which is bound by the number
of small operations and of bytes read, that is what keeps N adapters near the cost of one model.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.modeling.sources import ADAPTER_WEIGHTS, read_adapter_config

PEFT_PREFIX = "base_model.model."
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers that the supported architectures feed with one and the same tensor."""

_NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "bias", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "target_parameters", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
"""PEFT settings under which an adapter is more, or other, than W + scaling * B A."""
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "none")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """One specialist's LoRA adapter.

    Attributes:
        config: its PEFT configuration; None for the bare base.
        weights: PEFT tensor names without the `base_model.model.` prefix -> tensors.
    """

    config: Mapping[str, Any] | None
    weights: Mapping[str, Tensor]

    @classmethod
    def bare(cls) -> "Adapter":
        """The base model itself, as a specialist."""
        return cls(None, {})

    @classmethod
    def from_folder(cls, folder: Path) -> "Adapter":
        """Read a PEFT adapter folder as it is.

        Raises:
            CheckpointError: the adapter is not a plain LoRA (DoRA, bias or saved modules, another PEFT method).
        """
        config = read_adapter_config(folder)
        check_lora_config(config, str(folder))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        return cls(config, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()})

    @classmethod
    def initial(cls, model: nn.Module, config: Mapping[str, Any], seed: int = 0) -> "Adapter":
        """A fresh adapter that changes nothing yet: A as PEFT starts it (Kaiming uniform), B zero.

        Args:
            model: the base model.
            config: PEFT configuration; `r` and `target_modules` (names of linear layers, or "all-linear") are read.
            seed: of the random start.

        Raises:
            UltrafuserError: no layer of the model carries one of the target names.
        """
        generator = torch.Generator().manual_seed(seed)
        targets = [
            (path, linear) for path, linear in _linears(model) if is_target(path, config["target_modules"])
        ]
        if not targets:
            raise UltrafuserError(
                f"target_modules {config['target_modules']} name no linear layer of the base. Linear layers: "
                f"{sorted({path.rpartition('.')[2] for path, _ in _linears(model)})}."
            )
        weights = {}
        for path, linear in targets:
            bound = 1 / math.sqrt(linear.in_features)
            noise = torch.rand(config["r"], linear.in_features, generator=generator)
            weights[f"{path}.lora_A.weight"] = (2 * noise - 1) * bound
            weights[f"{path}.lora_B.weight"] = torch.zeros(linear.out_features, config["r"])
        return cls(config, weights)

    def explicit_config(self, model: nn.Module) -> dict[str, Any] | None:
        """The PEFT configuration with `target_modules` as a list: plain layer names, or paths where those differ.

        Args:
            model: the base, before its layers are folded.
        """
        if self.config is None:
            return None
        paths = {name.removesuffix(".weight").rpartition(".")[0] for name in self.weights}
        names = sorted({path.rpartition(".")[2] for path in paths})
        plain = {path for path, _ in _linears(model) if is_target(path, names)} == paths
        return {**self.config, "target_modules": names if plain else sorted(paths)}

    def scaling(self) -> float:
        """Factor on the low-rank product: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        if self.config is None:
            return 1.0
        rank = self.config["r"]
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def is_target(path: str, target_modules: str | Sequence[str]) -> bool:
    """Whether a layer is meant by a list of layer names or paths ("all-linear" means every one)."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear"
    return path in target_modules or path.rpartition(".")[2] in target_modules


def check_lora_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse adapters that are more than low-rank updates of linear layers.

    Raises:
        CheckpointError: with the setting that is not supported.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"adapter {source}: peft_type must be LORA, got {config.get('peft_type')!r}.")
    refused = {setting: config[setting] for setting in _NOT_PLAIN if config.get(setting) not in _NEUTRAL}
    if config.get("init_lora_weights") not in _PLAIN_STARTS:  # the others change the base's weights too
        refused["init_lora_weights"] = config["init_lora_weights"]
    if refused:
        setting, value = next(iter(refused.items()))
        raise CheckpointError(
            f"adapter {source}: {setting}={value!r} is not supported, only plain low-rank updates are. Merge the "
            "adapter into its base (peft's merge_and_unload) and use it as a whole specialist."
        )
    for setting in ("r", "lora_alpha", "target_modules"):
        if config.get(setting) is None:
            raise CheckpointError(
                f"adapter {source}: {setting} is missing from its configuration. Save it with peft."
            )


class _LowRank(NamedTuple):
    """The low-rank parts of joined layers as two products, in `dtype`; what they were made from, and its state then.

    down is (N, in_features, R), R the sum of the layers' ranks; up is (N, R, sum of out_features), block-diagonal.
    """

    dtype: torch.dtype
    down: Tensor
    up: Tensor
    sources: tuple[Tensor, ...]
    state: list[int]


def _state(tensors: Sequence[Tensor]) -> list[int]:
    """What differs after tensors were changed in place or given other storage."""
    return [tensor._version for tensor in tensors] + [tensor.data_ptr() for tensor in tensors]


@dataclass(slots=True)
class _Waiting:
    """Outputs of a joined product that siblings have yet to ask for, by index, and the input they belong to."""

    input: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class FoldedLinear(nn.Module):
    """One or several joined linear layers over one input, with N low-rank updates each.

    Rows are specialist-major: x is (N * B, T, in_features) and rows n * B ... (n + 1) * B - 1 are specialist n's.

    Args:
        linears: the layers to join (same in_features); their weights move into this module, frozen.
        names: the layers' names among their siblings.
        path: module path of the parent, for tensor names.
        adapters: the N adapters; one without tensors for a layer leaves that layer as it is.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], names: Sequence[str], path: str, adapters: Sequence[Adapter]
    ) -> None:
        super().__init__()
        self.paths = [f"{path}.{name}" if path else name for name in names]
        self.out_sizes = [linear.out_features for linear in linears]
        self.has_bias = [linear.bias is not None for linear in linears]
        self.num_specialists = len(adapters)
        self.weight = nn.Parameter(
            torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False
        )
        self.bias = _joined_bias(linears)
        self.scalings = [adapter.scaling() for adapter in adapters]
        stacks = [_stack(adapters, path, linear) for path, linear in zip(self.paths, linears, strict=True)]
        self.lora_A = nn.ParameterList([nn.Parameter(down, requires_grad=False) for down, _ in stacks])
        self.lora_B = nn.ParameterList([nn.Parameter(up, requires_grad=False) for _, up in stacks])
        self._assembled: _LowRank | None = None
        self._waiting = _Waiting()

    def forward(self, x: Tensor) -> Tensor:
        """The joined outputs side by side.

        Args:
            x: float, (N * B, T, in_features), specialist-major.

        Returns:
            (N * B, T, sum of out_features).
        """
        base = F.linear(x, self.weight, self.bias)
        rows = x.reshape(self.num_specialists, -1, x.shape[-1])
        if torch.is_grad_enabled():
            # An optimiser's step may follow, and a fused one leaves no trace on the tensors it changes.
            self._assembled = None
            trained = self._trained_update(rows.to(base.dtype))  # autocast: base is not in the dtype of x
            return base + trained.view_as(base)
        # A CPU spends more on setting up a bfloat16 product of a few rows than on computing it in float32.
        dtype = torch.promote_types(base.dtype, torch.float32) if base.is_cpu else base.dtype
        update = self._low_rank(dtype)
        inner = torch.bmm(rows.to(dtype), update.down)
        outputs = base.view(self.num_specialists, -1, base.shape[-1])
        if base.dtype == dtype:
            outputs.baddbmm_(inner, update.up)
        else:
            outputs.add_(torch.bmm(inner, update.up))
        return base

    def part(self, index: int, x: Tensor) -> Tensor:
        """Output of one of the joined layers; the first sibling asked computes for all that read the same tensor."""
        waiting = self._waiting
        if waiting.input is not x or index not in waiting.outputs:
            waiting.outputs = dict(enumerate(self.forward(x).split(self.out_sizes, dim=-1)))
            waiting.input = x
        output = waiting.outputs.pop(index)
        if not waiting.outputs:
            waiting.input = None
        return output

    def _trained_update(self, rows: Tensor) -> Tensor:
        """The low-rank parts, layer by layer, so that gradients reach each adapter's own tensors."""
        scale = rows.new_tensor(self.scalings).view(-1, 1, 1)
        down = torch.cat([a.to(rows.dtype) for a in self.lora_A], dim=1)
        inner = (torch.bmm(rows, down.transpose(1, 2)) * scale).split(
            [a.shape[1] for a in self.lora_A], dim=-1
        )
        ups = [
            torch.bmm(part, b.to(rows.dtype).transpose(1, 2))
            for part, b in zip(inner, self.lora_B, strict=True)
        ]
        return torch.cat(ups, dim=-1)

    def _low_rank(self, dtype: torch.dtype) -> "_LowRank":
        """All low-rank parts, kept until a tensor changes. Every decode step asks for them in every layer."""
        kept = self._assembled
        if kept is None or kept.dtype != dtype or kept.state != _state(kept.sources):
            kept = self._assembled = self._assemble(dtype)
        return kept

    def low_rank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The updates as two products: x @ down[n] @ up[n] is specialist n's, scaling included.

        Args:
            dtype: of the result.

        Returns:
            down (N, in_features, R) and up (N, R, sum of out_features), R the sum of the joined layers' ranks.
        """
        assembled = self._assemble(dtype)
        return assembled.down, assembled.up

    def _assemble(self, dtype: torch.dtype) -> "_LowRank":
        sources = (*self.lora_A, *self.lora_B)
        down = torch.cat([a.detach().to(dtype) for a in self.lora_A], dim=1).transpose(1, 2).contiguous()
        scale = sources[0].new_tensor(self.scalings).view(-1, 1, 1)
        blocks = [(b.detach() * scale.to(b)).to(dtype).transpose(1, 2) for b in self.lora_B]
        up = torch.stack([torch.block_diag(*parts) for parts in zip(*blocks, strict=True)])
        return _LowRank(dtype, down, up, sources, _state(sources))

    def _apply(self, fn: Any, recurse: bool = True) -> "FoldedLinear":
        self._assembled = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._assembled = None
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> "FoldedLinear":
        """Switch between training and evaluation; parts are assembled anew."""
        self._assembled = None
        return super().train(mode)

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The base's own tensors under their original names."""
        for path, weight in zip(self.paths, self.weight.split(self.out_sizes), strict=True):
            yield f"{path}.weight", weight
        if self.bias is not None:
            for path, bias, present in zip(
                self.paths, self.bias.split(self.out_sizes), self.has_bias, strict=True
            ):
                if present:
                    yield f"{path}.bias", bias

    def lora_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path, A (N, r, in), B (N, out, r)) of every joined layer."""
        yield from zip(self.paths, self.lora_A, self.lora_B, strict=True)

    def merged_weight(self, specialist: int) -> Iterator[tuple[str, Tensor]]:
        """(path + ".weight", W + scaling * B A) of one specialist, in the base's dtype."""
        weights = self.weight.split(self.out_sizes)
        for path, weight, down, up in zip(self.paths, weights, self.lora_A, self.lora_B, strict=True):
            update = up[specialist].float() @ down[specialist].float() * self.scalings[specialist]
            yield f"{path}.weight", (weight.float() + update).to(weight.dtype)


class _Part(nn.Module):
    """Stands where one of several joined layers stood."""

    _part_of: FoldedLinear

    def __init__(self, joined: FoldedLinear, index: int) -> None:
        super().__init__()
        # The first part owns the joined layer; the others only know it, so that it is registered once.
        if index == 0:
            self.joined = joined
        object.__setattr__(self, "_part_of", joined)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._part_of.part(self.index, x)


def folded_layer(module: nn.Module) -> FoldedLinear | None:
    """The joined layer that stands (alone or with siblings) where a linear layer stood; None for a plain layer."""
    return (
        module._part_of if isinstance(module, _Part) else module if isinstance(module, FoldedLinear) else None
    )


def fold_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> list[FoldedLinear]:
    """Replace the targeted linear layers of a base model in place.

    Args:
        model: the base, with plain `nn.Linear` layers.
        adapters: N adapters, in the order of the specialists.

    Returns:
        The new layers, in the order of the model.

    Raises:
        CheckpointError: an adapter has a tensor that fits no linear layer of the base.
    """
    linears = dict(_linears(model))
    targets = _checked_targets(adapters, linears)
    paths = list(linears)
    del linears  # or every original layer would live until the last one is replaced
    folded = []
    done: set[str] = set()
    for path in paths:
        if path not in targets or path in done:
            continue
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        siblings = _siblings(parent, name)
        layer = FoldedLinear([getattr(parent, n) for n in siblings], siblings, parent_path, adapters)
        for index, sibling in enumerate(siblings):
            setattr(parent, sibling, layer if len(siblings) == 1 else _Part(layer, index))
            done.add(f"{parent_path}.{sibling}" if parent_path else sibling)
        folded.append(layer)
    return folded


def unfold(model: nn.Module, layers: Sequence[FoldedLinear]) -> None:
    """Undo `fold_adapters` for a single adapter, in place: plain linear layers with the adapter merged in.

    Args:
        model: whose layers `fold_adapters` replaced.
        layers: what it returned; each with N = 1.
    """
    for layer in layers:
        assert layer.num_specialists == 1
        biases = [None] * len(layer.paths) if layer.bias is None else layer.bias.split(layer.out_sizes)
        for (name, weight), present, row in zip(layer.merged_weight(0), layer.has_bias, biases, strict=True):
            bias = row if present else None
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            plain = nn.Linear(1, 1, bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.detach().clone())
            plain.out_features, plain.in_features = weight.shape
            if bias is not None:
                plain.bias = nn.Parameter(bias.detach().clone())
            setattr(model.get_submodule(parent), leaf, plain)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            yield path, module


def _siblings(parent: nn.Module, name: str) -> tuple[str, ...]:
    for group in _SAME_INPUT:
        layers = [getattr(parent, member, None) for member in group]
        if name in group and all(type(layer) is nn.Linear for layer in layers):
            return group
    return (name,)


def _checked_targets(adapters: Sequence[Adapter], linears: Mapping[str, nn.Linear]) -> set[str]:
    targets = set()
    for adapter in adapters:
        for name, tensor in adapter.weights.items():
            path, _, kind = name.removesuffix(".weight").rpartition(".")
            linear = linears.get(path)
            # Rows of an expert's layer are sorted by expert, no longer by specialist.
            if linear is None or kind not in ("lora_A", "lora_B") or ".experts." in path:
                raise CheckpointError(
                    f"adapter tensor {name} fits no linear layer of the base. Expected lora_A / lora_B of a layer such "
                    f"as {next(iter(linears), '(none)')}, not of embeddings, heads or routed experts. Use the base "
                    "that the adapter was trained on, or merge the adapter into it (peft's merge_and_unload)."
                )
            assert adapter.config is not None
            rank = adapter.config["r"]
            expected = (rank, linear.in_features) if kind == "lora_A" else (linear.out_features, rank)
            if tuple(tensor.shape) != expected:
                raise CheckpointError(
                    f"adapter tensor {name} has shape {tuple(tensor.shape)}, expected {expected} for the base's layer "
                    f"and rank {rank}. Use the base model that the adapter was trained on."
                )
            targets.add(path)
    return targets


def _stack(adapters: Sequence[Adapter], path: str, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A (N, r, in) and B (N, out, r) of one layer; ranks padded with zeros, which stay zero under training."""
    downs = [adapter.weights.get(f"{path}.lora_A.weight") for adapter in adapters]
    ups = [adapter.weights.get(f"{path}.lora_B.weight") for adapter in adapters]
    rank = max((down.shape[0] for down in downs if down is not None), default=1)
    dtypes = [tensor.dtype for tensor in (*downs, *ups) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else linear.weight.dtype
    device = linear.weight.device
    stacked_down = torch.zeros(len(adapters), rank, linear.in_features, dtype=dtype, device=device)
    stacked_up = torch.zeros(len(adapters), linear.out_features, rank, dtype=dtype, device=device)
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if (down is None) != (up is None):
            raise CheckpointError(f"adapter {index} has only one of lora_A and lora_B for {path}.")
        if down is not None and up is not None:
            stacked_down[index, : down.shape[0]] = down
            stacked_up[index, :, : up.shape[1]] = up
    return stacked_down, stacked_up


def _joined_bias(linears: Sequence[nn.Linear]) -> nn.Parameter | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
