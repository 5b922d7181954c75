"""What the engine knows of one request: its settings, how far its specialists have read, and what it may say next."""

from dataclasses import dataclass, field

from torch import Tensor

from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.decoding.speculation import Acceptance, Lookup
from ultrafuser.decoding.text import StoppedText


@dataclass(eq=False)
class Conversation:
    """One request, waiting or in a slot.

    Attributes:
        request_id: under which its tokens are reported.
        prompts: token ids for each specialist.
        sampler: chooses its tokens.
        text: of its response so far.
        only: index of the specialist that answers alone, or None.
        lookup: drafts from its context.
        read: positions in the caches, by specialist.
        read_by_drafter: positions in the cache of a draft model that is no specialist.
        response: tokens so far.
        favourite: index of the specialist with the largest weight for the last token.
        acceptance: of drafts, by their kind (see `Draft.kind`).
    """

    request_id: int
    prompts: list[list[int]]
    sampler: Sampler
    text: StoppedText
    only: int | None
    lookup: Lookup
    read: list[int] = field(default_factory=list)
    read_by_drafter: int = 0
    response: list[int] = field(default_factory=list)
    favourite: int = 0
    acceptance: dict[int, Acceptance] = field(default_factory=dict)

    @property
    def params(self) -> SamplingParams:
        """How the response is made."""
        return self.sampler.params

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be said."""
        return self.params.max_new_tokens - len(self.response)

    def acceptance_of(self, kind: int) -> Acceptance:
        """The record of one kind of drafts; see `Draft.kind`."""
        # A look-up is right about as often as not, a specialist that the gate favours nearly always.
        return self.acceptance.setdefault(kind, Acceptance(0.5 if kind else 0.9))


@dataclass
class Draft:
    """Tokens that one conversation may say next.

    Attributes:
        tokens: K of them; none for a conversation that only takes part.
        kind: whose acceptance it is: length of the look-up's match, or 0 for a model's draft.
        distributions: that they were drawn from, float32, (V,) each; none where they were certain.
        confidence: probability that the drafting model gives the last of them.
        states: the drafting model's hidden states that predict the tokens, (k, H) each, K in all; none of a look-up.
    """

    tokens: list[int] = field(default_factory=list)
    kind: int = 0
    distributions: list[Tensor] = field(default_factory=list)
    confidence: float = 1.0
    states: list[Tensor] = field(default_factory=list)


@dataclass
class DecodingStats:
    """What a decoder has done.

    Attributes:
        steps: that read a token or a draft of every conversation in a slot.
        tokens: that were said, prompts' first ones included.
        passes: of one model over its slots, the reading of prompts left out: a step of whole specialists makes several.
        draft_passes: of a model that drafts.
        drafted: tokens that were drafted.
        accepted: of them.
        drafts: drafts of one conversation in one step.
    """

    steps: int = 0
    tokens: int = 0
    passes: int = 0
    draft_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    drafts: int = 0
