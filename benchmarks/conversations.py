"""The demo's held-out conversations, which benchmarks ask about."""

import json
from importlib.resources import files
from typing import Any

DOMAINS = ("text", "code", "math")


def heldout(domain: str) -> list[list[dict[str, Any]]]:
    """Conversations of one domain, as messages."""
    path = files("ultrafuser") / "demo" / "conversations" / f"{domain}.heldout.jsonl"
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def first_questions() -> list[str]:
    """What people ask first in all of them, the domains in turns."""
    groups = zip(*(heldout(domain) for domain in DOMAINS), strict=True)
    return [messages[0]["content"] for group in groups for messages in group]
