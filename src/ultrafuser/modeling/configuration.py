"""What a fused model is made of, as a Hugging Face configuration (`config.json` of every checkpoint)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import CONFIG_MAPPING, PretrainedConfig

from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion.gate import GateForm

BankKind = Literal["whole", "adapters"]
BANK_KINDS: tuple[BankKind, ...] = get_args(BankKind)

RESERVED_NAMES = ("uniform", "fused")
"""Rows of loss tables beside the specialists."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class SpecialistConfig:
    """One specialist of a fused model.

    Attributes:
        name: letters, digits, `_` and `-`, starting with a letter; it prefixes the specialist's tensors.
        model: where its (base) weights come from: a folder, a hub id, or `package://<package>/<file>`.
        model_revision: hub revision of `model`, the very commit after `fuse`; None where there are no revisions.
        model_fingerprint: what the files of `model` were (see `fingerprint`); None for the hub, or when unknown.
        adapter: where its PEFT LoRA folder comes from; None for a model without adapter.
        adapter_revision: hub revision of `adapter`, likewise.
        adapter_fingerprint: what the files of `adapter` were, likewise.
        template: its chat template, Jinja text; None when unknown (then no conversation can be encoded).
        model_config: the architecture, as its own configuration writes it.
        adapter_config: the PEFT configuration of its adapter, for adapters that are kept apart from their base.
    """

    name: str
    model: str | None = None
    model_revision: str | None = None
    model_fingerprint: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_fingerprint: str | None = None
    template: str | None = None
    model_config: Mapping[str, Any] | None = None
    adapter_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.name in RESERVED_NAMES:
            raise UltrafuserError(f"specialist name {self.name!r} means a row of the loss tables. Rename it.")
        if not _NAME.fullmatch(self.name):
            raise UltrafuserError(
                f"specialist name {self.name!r} must be letters, digits, '_' and '-', starting with a letter: "
                "it prefixes tensor names. Rename it."
            )

    def architecture(self) -> PretrainedConfig:
        """The model configuration as the object its architecture uses.

        Raises:
            UltrafuserError: the architecture is missing, unknown to transformers, or asks for remote code.
        """
        if self.model_config is None:
            raise UltrafuserError(f"specialist {self.name}: model_config is missing from the configuration.")
        settings = dict(self.model_config)
        model_type = settings.get("model_type")
        if "auto_map" in settings or model_type not in CONFIG_MAPPING:
            raise UltrafuserError(
                f"specialist {self.name}: architecture {model_type!r} is not one that transformers ships. Remote "
                "code is never run; use a model of a built-in architecture."
            )
        return CONFIG_MAPPING[model_type].from_dict(settings)


class UltraFuserConfig(PretrainedConfig):
    """Configuration of `UltraFuserForCausalLM`.

    Args:
        specialists: N specialists, in order, as `SpecialistConfig` or as dictionaries of its fields.
        bank: "whole" (N models side by side) or "adapters" (N LoRA adapters over one base).
        gate_form: see `ultrafuser.fusion.gate.Gate`.
        gate_size: width of the gate's hidden layer (paper: 512).
        gate_only: this checkpoint holds the gate alone and names where the specialists are.
        end_token_id: the token that ends every response, agreed among the specialists; also `eos_token_id`.
        **kwargs: settings of `PretrainedConfig`.

    Raises:
        UltrafuserError: an unknown bank, no specialist for a non-empty configuration, or a name given twice.
    """

    model_type = "ultrafuser"
    has_no_defaults_at_init = True

    def __init__(
        self,
        specialists: Sequence[SpecialistConfig | Mapping[str, Any]] = (),
        bank: BankKind = "whole",
        gate_form: GateForm = "shared",
        gate_size: int = 512,
        gate_only: bool = False,
        end_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if bank not in BANK_KINDS:
            raise UltrafuserError(f"bank must be one of {', '.join(BANK_KINDS)}, got {bank!r}.")
        # Hugging Face reads these attributes of every configuration but gives them no default.
        for setting in ("pad_token_id", "bos_token_id"):
            kwargs.setdefault(setting, None)
        kwargs.setdefault("eos_token_id", end_token_id)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        members = [s if isinstance(s, SpecialistConfig) else _member(s) for s in specialists]
        names = [member.name for member in members]
        if len(set(names)) != len(names):
            raise UltrafuserError(f"specialists: each name may stand once, got {names}. Rename one.")
        self.specialists = [asdict(member) for member in members]
        self.bank = bank
        self.gate_form = gate_form
        self.gate_size = gate_size
        self.gate_only = gate_only
        self.end_token_id = end_token_id

    @property
    def members(self) -> list[SpecialistConfig]:
        """The specialists, in order."""
        return [SpecialistConfig(**specialist) for specialist in self.specialists]

    @property
    def specialist_names(self) -> list[str]:
        """Names of the specialists, in order."""
        return [specialist["name"] for specialist in self.specialists]

    @property
    def num_specialists(self) -> int:
        """N."""
        return len(self.specialists)


def shared_template(config: UltraFuserConfig) -> str | None:
    """The one chat template that all specialists read; None when theirs are not known.

    Raises:
        UltrafuserError: they read different ones.
    """
    templates = {member.template for member in config.members}
    if len(templates) > 1:
        raise UltrafuserError(
            f"the specialists ({', '.join(config.specialist_names)}) read {len(templates)} different chat templates, "
            "but here all read one prompt. Give them one (`ultrafuser export MODEL -o DIR --template NAME`, better "
            "followed by stage 2), or use `ultrafuser serve --engine native`."
        )
    return next(iter(templates), None)


def without_sources(config: UltraFuserConfig) -> UltraFuserConfig:
    """The configuration of a model whose specialists were trained further: no longer what their sources hold."""
    nowhere = dict.fromkeys(
        ("model", "model_revision", "model_fingerprint", "adapter", "adapter_revision", "adapter_fingerprint")
    )
    members = [specialist | nowhere for specialist in config.specialists]
    return UltraFuserConfig.from_dict(config.to_dict() | {"specialists": members})


def _member(settings: Mapping[str, Any]) -> SpecialistConfig:
    known = {field.name for field in fields(SpecialistConfig)}
    if "name" not in settings or not settings.keys() <= known:
        raise UltrafuserError(
            f"specialists: each needs a name and may have {', '.join(sorted(known - {'name'}))}, "
            f"got {', '.join(settings)}."
        )
    return SpecialistConfig(**settings)
