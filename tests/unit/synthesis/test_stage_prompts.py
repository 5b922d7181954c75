"""What prompts look like when all is filled in."""

import itertools
import re

import pytest

from ultrafuser.errors import RecipeError
from ultrafuser.synthesis.prompts import Prompts
from ultrafuser.synthesis.recipe import SynthesisRecipe

DOMAIN = {"meta_topics": 1, "sub_topics": 1, "instructions": 1}
TOPIC = {"meta_topic": "Flow", "name": "Tides", "relevance": "Ships need it.", "use_case": "A sailor asks."}
SAID = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def prompts_of(**domains):
    """Prompts of domains with these descriptions."""
    settings = {name: {**DOMAIN, "description": text} for name, text in domains.items()}
    return Prompts(SynthesisRecipe.model_validate({"model": {"model": "m"}, "domains": settings}))


def rendered(prompts, domain):
    """Every prompt of a domain, with every choice of its options."""
    yield prompts.render("responses", domain)
    yield prompts.render("follow_up", domain, messages=SAID)
    for known, solved, flag in itertools.product(([], ["One.", "Two."]), (False, True), (False, True)):
        yield prompts.render("meta_topics", domain, count=3, known=known)
        yield prompts.render("sub_topics", domain, meta_topic="Flow", count=3, known=known)
        yield prompts.render(
            "instructions", domain, **TOPIC, count=3, known=known, part=1, parts=1 + flag, wants_reference=solved
        )  # fmt: skip
        yield prompts.render(
            "related", domain, **TOPIC, example="Why?", others=known, strongly=flag, count=3, wants_reference=solved
        )  # fmt: skip
        yield prompts.render("complicated", domain, instruction="Why?", wants_reference=solved)


@pytest.mark.parametrize("domain", ["text", "code", "math", "law"])
def test_lines_and_paragraphs_are_whole(domain):
    prompts = prompts_of(**{domain: "law" if domain == "law" else None})
    for text in rendered(prompts, domain):
        prose = re.sub(r"^Answer with JSON only: .*$", "JSON", text, flags=re.MULTILINE)
        assert re.search(r"[.!?:][A-Z]", prose) is None, text
        assert re.search(r"[ \t]$", text, flags=re.MULTILINE) is None, text
        assert "\n\n\n" not in text
        assert text == text.strip()
        if "JSON" in prose:  # in a paragraph of its own, with what is said of the form
            assert re.search(r"\n\n(Give [^\n]*\n)?JSON\Z", prose), text


def test_lists_stand_by_themselves():
    prompts = prompts_of(math=None)
    for stage, known in (("meta_topics", {}), ("sub_topics", {"meta_topic": "Flow"})):
        assert "others:\n- One.\n- Two.\n\nA" in prompts.render(
            stage, "math", count=3, known=["One.", "Two."], **known
        )
    text = prompts.render(
        "related", "math", **TOPIC, example="Why?", others=["One."], strongly=True, count=3, wants_reference=False
    )  # fmt: skip
    assert "\n\nWhy?\n\nOthers of the same topic:\n- One.\n\nWrite 3 new messages" in text


@pytest.mark.parametrize("domain", ["text", "code", "math"])
def test_a_description_in_the_recipe_is_taken_before_ours(domain):
    for stage, known in (("meta_topics", {}), ("sub_topics", {"meta_topic": "Flow"})):
        ours = prompts_of(**{domain: None}).render(stage, domain, count=3, known=[], **known)
        given = prompts_of(**{domain: "ONLY KNOTS"}).render(stage, domain, count=3, known=[], **known)
        assert "None" not in ours
        assert "ONLY KNOTS" in given
        assert re.search("mathematics|programming|society", ours) is not None
        assert re.search("mathematics|programming|society", given) is None


@pytest.mark.parametrize("description", [None, ""])
def test_a_domain_of_its_own_needs_a_description(description):
    with pytest.raises(RecipeError, match="law needs a description"):
        prompts_of(law=description)
