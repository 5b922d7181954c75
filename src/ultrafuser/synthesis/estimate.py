"""What a run would take, before the first question is asked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ultrafuser.synthesis.budget import cost
from ultrafuser.synthesis.endpoint import BYTES_PER_TOKEN
from ultrafuser.synthesis.pipeline import STAGES
from ultrafuser.synthesis.prompts import Prompts
from ultrafuser.synthesis.recipe import DomainSettings, SynthesisRecipe
from ultrafuser.synthesis.stages import PER_CALL, SHOWN, base_count

_SAID = {
    "meta_topics": 8, "sub_topics": 70, "instructions": 60, "related": 60, "complicated": 100, "responses": 400
}  # fmt: skip
"""Tokens of one thing in an answer (a conversation of the paper's has 400 to 560, table 15)."""
_SAID_BY_PERSON = 50
"""Tokens of one message of a person."""
_NAME, _SENTENCE, _INSTRUCTION = "x" * 25, "x" * 120, "x" * 200


@dataclass(frozen=True, slots=True)
class Estimate:
    """One stage in one domain.

    Attributes:
        stage: of it.
        domain: of it.
        calls: questions.
        input_tokens: read.
        output_tokens: written.
        money: in the currency of the price; None without one.
        seconds: with the allowed concurrency.
    """

    stage: str
    domain: str
    calls: float
    input_tokens: float
    output_tokens: float
    money: float | None
    seconds: float


def estimate(recipe: SynthesisRecipe, tokens_per_s: float, wait_s: float) -> Iterator[Estimate]:
    """Estimates of all stages and domains, if every answer is readable and new.

    Args:
        recipe: what is wanted.
        tokens_per_s: that one answer is written at.
        wait_s: from a question to the first token of its answer.
    """
    prompts = Prompts(recipe)
    for stage in STAGES:
        model = recipe.model_for(stage.name)
        for domain, settings in recipe.domains.items():
            calls = stage.expected_calls(settings)
            made = _things(stage.name, settings)
            said = _SAID[stage.name] * made
            read = calls * len(_prompt(prompts, stage.name, domain).encode()) / BYTES_PER_TOKEN
            if stage.name == "responses":
                said += _asked_further(settings) * _SAID_BY_PERSON
                read += _read_again(settings)
            each_s = wait_s + said / max(calls, 1) / tokens_per_s
            seconds = calls * each_s / min(recipe.endpoint.concurrency, max(calls, 1))
            money = None if model.price is None else cost(model, read, said)
            yield Estimate(stage.name, domain, calls, read, said, money, seconds)


def _things(stage: str, settings: DomainSettings) -> float:
    total = settings.instructions
    return {
        "meta_topics": settings.num_meta_topics if isinstance(settings.meta_topics, int) else 0,
        "sub_topics": settings.sub_topics,
        "instructions": base_count(settings),
        "related": total - base_count(settings),
        "complicated": round(settings.complicated * total),
        "responses": total + _asked_further(settings),
    }[stage]


def _asked_further(settings: DomainSettings) -> float:
    """Messages of people beyond the first ones: in conversations of several turns, which have 2 to `turns`."""
    return settings.several_turns * settings.instructions * settings.turns / 2


def _read_again(settings: DomainSettings) -> float:
    """Tokens of the conversations themselves: whatever is said in one is asked for with all that was said before."""

    def of(turns: float) -> float:
        asked, answered = _SAID_BY_PERSON, _SAID["responses"]
        responses = asked * turns * (turns + 1) / 2 + answered * turns * (turns - 1) / 2
        further = (asked + answered) * turns * (turns - 1) / 2
        return responses + further

    several = settings.several_turns * settings.instructions
    return (settings.instructions - several) * of(1) + several * of((settings.turns + 2) / 2)


def _prompt(prompts: Prompts, stage: str, domain: str) -> str:
    known: dict[str, Any] = {
        "count": PER_CALL.get(stage, 1), "known": [_NAME] * (SHOWN // 2), "meta_topic": _NAME, "name": _NAME,
        "relevance": _SENTENCE, "use_case": _SENTENCE, "example": _INSTRUCTION, "others": [_INSTRUCTION] * 2,
        "strongly": True, "part": 1, "parts": 2, "instruction": _INSTRUCTION, "wants_reference": False,
    }  # fmt: skip
    return prompts.render(stage, domain, **known)
