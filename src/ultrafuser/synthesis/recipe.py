"""What `ultrafuser synth` reads: domains, how much of what, and who is asked."""

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ultrafuser.errors import RecipeError
from ultrafuser.recipes import RecipeSection, load_recipe

StageName = Literal["meta_topics", "sub_topics", "instructions", "related", "complicated", "responses"]
Check = Literal["none", "code", "math"]
"""What is looked at in responses."""
STAGE_NAMES: tuple[StageName, ...] = (
    "meta_topics",
    "sub_topics",
    "instructions",
    "related",
    "complicated",
    "responses",
)
"""In their order (paper, section 3.2)."""


class Price(RecipeSection):
    """What a model costs, in any currency, by a million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class ModelSettings(RecipeSection):
    """Who is asked, and how."""

    model: str = Field(min_length=1, description="as the endpoint calls it")
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=2048, ge=1, description="of an answer")
    price: Price | None = Field(default=None, description="needed for a budget of money")


class StageOverride(RecipeSection):
    """What is different in one stage; what is not set is as in `model`."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    price: Price | None = None


class EndpointSettings(RecipeSection):
    """An OpenAI-compatible server."""

    base_url: str = Field(default="https://api.openai.com/v1")
    api_key_variable: str | None = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key; null for none"
    )
    concurrency: int = Field(
        default=32, ge=1, description="requests at once, at most; fewer while the server limits their rate"
    )
    timeout_s: float = Field(default=120, gt=0, description="for a whole answer")
    attempts: int = Field(
        default=10,
        ge=1,
        description="at a request that is refused for a while, fails or is cut, before it counts as unanswered",
    )
    structured: Literal["auto", "json_schema", "json_object", "none"] = Field(
        default="auto", description="what the server knows of answers in JSON; auto finds out, in this order"
    )
    seeds: bool = Field(default=True, description="whether requests carry a seed")

    def api_key(self) -> str:
        """The key.

        Raises:
            RecipeError: the variable is not set.
        """
        if self.api_key_variable is None:
            return "none"
        key = os.environ.get(self.api_key_variable)
        if key is None:
            raise RecipeError(
                f"the environment variable {self.api_key_variable} (endpoint.api_key_variable) is not set. Set it to "
                "the server's key, or the setting to null."
            )
        return key


class Budget(RecipeSection):
    """Where a run stops; it can go on when the limit is raised."""

    tokens: int | None = Field(
        default=None,
        ge=1,
        description="read and written, of all answers, also those that could not be read; attempts that fail may cost "
        "more",
    )
    money: float | None = Field(default=None, gt=0, description="in the currency of the prices")


class DomainSettings(RecipeSection):
    """How much of one domain."""

    description: str | None = Field(
        default=None, description="what the domain is about, for prompts; text, code and math have their own"
    )
    meta_topics: int | list[str] = Field(description="how many, or which")
    sub_topics: int = Field(ge=1, description="in all")
    instructions: int = Field(ge=1, description="in all: base, related and complicated ones together")
    strongly_related: float = Field(
        default=0.3, ge=0, lt=1, description="share of instructions made from one before it, close to it"
    )
    weakly_related: float = Field(default=0.3, ge=0, lt=1, description="likewise, farther from it")
    complicated: float = Field(default=0.3, ge=0, le=1, description="share that is rewritten to ask for more")
    several_turns: float = Field(
        default=0.0, ge=0, le=1, description="share of conversations of more than one turn"
    )
    turns: int = Field(default=3, ge=2, description="of those, at most")
    check: Check = Field(
        default="none", description="code: Python in answers has to run; math: final answers have to agree"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.strongly_related + self.weakly_related >= 1:
            raise ValueError(
                "strongly_related and weakly_related together must be below 1: they are made from the rest"
            )
        if isinstance(self.meta_topics, list) and len(set(self.meta_topics)) < max(len(self.meta_topics), 1):
            raise ValueError("meta_topics must be different names, at least one")
        if isinstance(self.meta_topics, int) and self.meta_topics < 1:
            raise ValueError("meta_topics must be at least 1")
        if self.sub_topics < self.num_meta_topics:
            raise ValueError("sub_topics must be at least as many as meta_topics")
        return self

    @property
    def num_meta_topics(self) -> int:
        """How many meta-topics there are to be."""
        return self.meta_topics if isinstance(self.meta_topics, int) else len(self.meta_topics)


class FilterSettings(RecipeSection):
    """What is not taken."""

    near_duplicate: float = Field(
        default=0.7,
        ge=0.4,  # candidates for less would be too many, or too few of them found
        le=1,
        description="instructions whose pairs of words overlap by this much (Jaccard) are one",
    )
    ngram: int = Field(default=13, ge=5, description="words in a row that a benchmark shares (paper: 13)")
    benchmarks: list[str] = Field(
        default=[], description="JSON lines files, gzip or not, that no row may repeat"
    )
    min_words: int = Field(default=3, ge=1, description="of an instruction")
    max_words: int = Field(default=1000, ge=1, description="of an instruction")
    max_response_words: int = Field(default=4000, ge=1)
    languages: list[str] | None = Field(
        default=["en"], description="of instructions and responses; null: all"
    )


class SynthesisRecipe(RecipeSection):
    """All of it."""

    seed: int = Field(default=0, ge=0)
    endpoint: EndpointSettings = EndpointSettings()
    model: ModelSettings
    stages: dict[StageName, StageOverride] = Field(
        default={}, description="what is different in some of them"
    )
    domains: dict[str, DomainSettings] = Field(min_length=1)
    prompts: str | None = Field(
        default=None, description="folder of Jinja files that replace ours of the same name"
    )
    budget: Budget = Budget()
    embedding: str | None = Field(
        default=None,
        description="model folder or hub id: its mean last hidden states place instructions in the figure, its "
        "tokenizer counts tokens for the card; without one, words do",
    )
    filters: FilterSettings = FilterSettings()
    heldout: float = Field(
        default=0.01, ge=0, lt=1, description="share of conversations that no training reads"
    )
    rounds: int = Field(default=20, ge=1, description="of asking for more, when answers repeat themselves")
    readings: int = Field(default=6, ge=1, description="of a request whose answer could not be read")
    unanswered: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the questions of a stage and domain (of a round of responses), rounded up, that may stay "
        "without an answer, refused or failed twice; where more do, or all, the run ends, and the next one asks them "
        "again; with 1 no such question ends it, nor one whose answers cannot be read",
    )

    @model_validator(mode="after")
    def _names_are_parts_of_paths(self) -> Self:
        for name in self.domains:
            if not name.strip(".") or re.search(r"[/\\\0]", name):
                raise ValueError(f"domains: {name!r} is to name files. Give it a name without slashes")
        return self

    @model_validator(mode="after")
    def _prices_are_known(self) -> Self:
        if self.budget.money is not None:
            unpriced = [stage for stage in STAGE_NAMES if self.model_for(stage).price is None]
            if unpriced:
                raise ValueError(
                    f"budget.money needs a price, which the model of {', '.join(unpriced)} has not"
                )
        return self

    def model_for(self, stage: StageName) -> ModelSettings:
        """Who is asked in a stage."""
        changes = self.stages[stage].model_dump(exclude_none=True) if stage in self.stages else {}
        if "model" in changes and "price" not in changes and changes["model"] != self.model.model:
            changes["price"] = None  # of another model
        return ModelSettings.model_validate({**self.model.model_dump(), **changes})


def read_synthesis_recipe(path: str | Path) -> SynthesisRecipe:
    """Read and check a recipe; relative paths in it are relative to its folder.

    Raises:
        RecipeError: the file cannot be read, or a key or value is wrong, or a file that it names is not there.
    """
    recipe = load_recipe(path, SynthesisRecipe)
    folder = Path(path).parent

    def place(name: str) -> str:
        found = (folder / Path(name).expanduser()).resolve()
        if not found.exists():
            raise RecipeError(f"recipe {path}: {name} is not there (looked for {found}).")
        return str(found)

    filters = recipe.filters.model_copy(update={"benchmarks": [place(b) for b in recipe.filters.benchmarks]})
    prompts = None if recipe.prompts is None else place(recipe.prompts)
    return recipe.model_copy(update={"filters": filters, "prompts": prompts})
