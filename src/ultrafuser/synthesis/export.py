"""What a run has made, as files: conversations that `ultrafuser train` reads, and what a person wants to see of them.

data/DOMAIN.train.jsonl, .parquet       conversations; data/DOMAIN.heldout.* those that no training should read
README.md                               data card: how much of what, what was removed, who was asked
topics.md                               tree of topics, with numbers of conversations
review.html                             random conversations of every meta-topic, for a person's eye
removed.jsonl                           what was not taken, and why
instructions.png                        instructions of all domains on a plane (t-SNE), as far as they lie apart
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.progress import ProgressBar
from ultrafuser.synthesis.budget import cost
from ultrafuser.synthesis.embedding import Embedder
from ultrafuser.synthesis.sieve import LEAST_WORDS_OF_MOST, LEAST_WORDS_OF_PART, words_of
from ultrafuser.synthesis.stages import Tools

PER_META_TOPIC = 3
"""Conversations of a meta-topic in the review sheet."""
PLOTTED = 5000
"""Instructions of a domain in the figure, at most (paper, appendix F)."""
COUNTED = 1000
"""Conversations of a domain whose tokens are counted, at most (paper, table 15)."""
MOST_PAIRS = 250_000
"""Different pairs of words of a domain that are counted exactly; beyond, a sample of them is (off by 0.01 at most)."""
_BATCH = 1000
_COLUMNS = ("id", "domain", "meta_topic", "sub_topic", "kind", "complicated", "reference", "messages")


@dataclass(slots=True)
class Summary:
    """One domain in numbers: table 15 of the paper for this run.

    Attributes:
        meta_topics: how many.
        sub_topics: how many.
        wanted: conversations that the recipe asks for.
        conversations: how many there are, by split.
        kinds: instructions by kind.
        complicated: instructions that were rewritten.
        turns: responses in all.
        words: in all messages.
        tokens: mean of a conversation, from 1,000 at random as in the paper; None without a tokenizer.
        distinct: share of two-word sequences in instructions that come once only; the more, the more diverse.
        is_sampled: whether that is about so, as more than 250,000 differ.
    """

    meta_topics: int
    sub_topics: int
    wanted: int
    conversations: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    complicated: int = 0
    turns: int = 0
    words: int = 0
    tokens: float | None = None
    distinct: float = 0.0
    is_sampled: bool = False

    @property
    def total(self) -> int:
        """Conversations."""
        return self.conversations.total()


class PairCount:
    """How many pairs of words come once only, in bounded memory.

    All pairs are counted while few differ; then those of every second hash, of every fourth, and so on. What is left
    out is left out wherever it comes, so as many of those that are counted come once as of all.

    Args:
        most: different pairs that are kept.
    """

    def __init__(self, most: int = MOST_PAIRS) -> None:
        self._most, self._total, self._every = most, 0, 1
        self._counts: Counter[int] = Counter()  # by hash

    def add(self, words: Iterable[str]) -> None:
        """Count the pairs of a text."""
        for pair in itertools.pairwise(words):
            self._total += 1
            digest = hashlib.blake2b(" ".join(pair).encode(), digest_size=8).digest()
            if (number := int.from_bytes(digest)) % self._every == 0:
                self._counts[number] += 1
        while len(self._counts) > self._most:
            self._every *= 2
            kept = {number: count for number, count in self._counts.items() if number % self._every == 0}
            self._counts = Counter(kept)

    @property
    def is_sampled(self) -> bool:
        """Whether some pairs are left out."""
        return self._every > 1

    @property
    def once(self) -> float:
        """Share of all pairs, counted as often as they come, that come once only."""
        single = sum(count == 1 for count in self._counts.values())
        return min(single * self._every / max(self._total, 1), 1.0)


def export(
    tools: Tools, folder: str | Path, *, embedder: Embedder | None = None, figure: bool = True
) -> dict[str, Summary]:
    """Write all files.

    Args:
        tools: of a run that is done.
        folder: for them.
        embedder: places instructions in the figure and counts tokens; None: words do, and nobody counts tokens.
        figure: also the picture, which takes minutes for many instructions.

    Returns:
        Domain -> its numbers.

    Raises:
        UltrafuserError: the run is not done.
    """
    folder = Path(folder)
    total = sum(tools.book.count("responses", domain) for domain in tools.recipe.domains)
    figure = figure and total >= 10  # fewer lie anywhere
    for domain in tools.recipe.domains:
        if tools.book.next_round("responses", domain) is not None:
            raise UltrafuserError(f"the conversations of {domain} are not all made. Finish the run first.")
    summaries = {domain: _write_domain(tools, folder / "data", domain) for domain in tools.recipe.domains}
    if embedder is not None:
        for domain, summary in summaries.items():
            summary.tokens = _mean_tokens(tools, domain, embedder)
    with atomic_write(folder / "removed.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for stage, domain, one in tools.book.removed():
            row = {
                "domain": domain,
                "stage": stage,
                "reason": one.reason,
                "detail": one.detail,
                "text": one.content,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    _write_text(folder / "topics.md", _tree(tools))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    samples = {domain: _samples(tools, domain) for domain in tools.recipe.domains}
    _write_text(folder / "review.html", environment.get_template("review.html").render(domains=samples))
    card = environment.get_template("card.md").render(
        summaries=summaries, recipe=tools.recipe, spent=_spent(tools), removed=_removed(tools),
        given_up=tools.book.given_up(), sources=list(summaries), has_figure=figure,
        least_part=LEAST_WORDS_OF_PART, least_most=LEAST_WORDS_OF_MOST,
    )  # fmt: skip
    _write_text(folder / "README.md", card)
    if figure:
        _plot(tools, folder / "instructions.png", embedder)
    return summaries


def _rows(tools: Tools, domain: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every conversation with its split; those held out are drawn by the seed."""
    total = tools.book.count("responses", domain)
    heldout = tools.chosen(round(tools.recipe.heldout * total), total, "heldout", domain)
    for item in tools.book.items("responses", domain):
        content = {"reference": None, **item.content, "id": f"{domain}-{item.place:06d}", "domain": domain}
        yield "heldout" if item.place in heldout else "train", {name: content[name] for name in _COLUMNS}


def _write_domain(tools: Tools, folder: Path, domain: str) -> Summary:
    import pyarrow
    from pyarrow import parquet

    book = tools.book
    summary = Summary(
        book.count("meta_topics", domain),
        book.count("sub_topics", domain),
        tools.recipe.domains[domain].instructions,
    )
    text = pyarrow.string()
    kinds = dict.fromkeys(_COLUMNS, text) | {"complicated": pyarrow.bool_()}
    kinds["messages"] = pyarrow.list_(pyarrow.struct({"role": text, "content": text}))
    schema = pyarrow.schema(kinds)
    pairs = PairCount()
    for split in ("train", "heldout") if tools.recipe.heldout else ("train",):
        name = f"{domain}.{split}"
        with (
            atomic_write(folder / f"{name}.jsonl") as lines,
            atomic_write(folder / f"{name}.parquet") as table,
            lines.open("w", encoding="utf-8") as file,
            parquet.ParquetWriter(table, schema) as writer,
        ):
            batch = []
            for own, row in _rows(tools, domain):
                if own != split:
                    continue
                file.write(
                    json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n"
                )
                batch.append(row)
                if len(batch) == _BATCH:
                    writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                    batch = []
                _count(summary, pairs, split, row)
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    summary.distinct, summary.is_sampled = pairs.once, pairs.is_sampled
    return summary


def _count(summary: Summary, pairs: PairCount, split: str, row: Mapping[str, Any]) -> None:
    summary.conversations[split] += 1
    summary.kinds[row["kind"]] += 1
    summary.complicated += row["complicated"]
    summary.turns += len(row["messages"]) // 2
    summary.words += sum(len(words_of(message["content"])) for message in row["messages"])
    pairs.add(words_of(row["messages"][0]["content"]))


def _tree(tools: Tools) -> str:
    lines = ["# Topics", ""]
    for domain in tools.recipe.domains:
        counts = Counter((row["meta_topic"], row["sub_topic"]) for _, row in _rows(tools, domain))
        metas = [item.content["name"] for item in tools.book.items("meta_topics", domain)]
        lines.append(f"- **{domain}** ({counts.total():,})")
        subs: dict[int, list[str]] = {}
        for item in tools.book.items("sub_topics", domain):
            subs.setdefault(item.parent or 0, []).append(item.content["name"])
        for place, meta in enumerate(metas):
            names = subs.get(place, [])
            lines.append(f"  - {meta} ({sum(counts[meta, name] for name in names):,})")
            lines += [f"    - {name} ({counts[meta, name]:,})" for name in names]
    return "\n".join(lines) + "\n"


def _samples(tools: Tools, domain: str) -> dict[str, list[dict[str, Any]]]:
    """Meta-topic -> a few of its conversations, at random by seed."""
    chance = random.Random(tools.number("review", domain))
    kept: dict[str, list[dict[str, Any]]] = {}
    seen: Counter[str] = Counter()
    for _, row in _rows(tools, domain):
        topic = row["meta_topic"]
        seen[topic] += 1
        rows = kept.setdefault(topic, [])
        if len(rows) < PER_META_TOPIC:
            rows.append(row)
        elif (place := chance.randrange(seen[topic])) < PER_META_TOPIC:
            rows[place] = row
    return kept


def _spent(tools: Tools) -> list[dict[str, Any]]:
    rows = []
    for one in tools.book.spent():
        model: Any = tools.recipe.model_for(one.stage)  # type: ignore[arg-type]
        is_known = model.price is not None and model.model == one.model  # another one's may have been another
        money = cost(model, one.input_tokens, one.output_tokens) if is_known else None
        rows.append({"spent": one, "money": money})
    return rows


def _removed(tools: Tools) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {domain: Counter() for domain in tools.recipe.domains}
    for _, domain, one in tools.book.removed():
        found[domain][one.reason] += 1
    return found


def _mean_tokens(tools: Tools, domain: str, embedder: Embedder) -> float:
    total = tools.book.count("responses", domain)
    chosen = tools.chosen(min(total, COUNTED), total, "tokens", domain)
    conversations = [item.content for item in tools.book.items("responses", domain) if item.place in chosen]
    texts = [message["content"] for content in conversations for message in content["messages"]]
    return embedder.num_tokens(texts) / max(len(conversations), 1)


def _plot(tools: Tools, path: Path, embedder: Embedder | None) -> None:
    """Instructions of all domains on a plane by t-SNE: as a model sees them, or by their words, the rare ones first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.manifold import TSNE

    texts: list[str] = []
    owners: list[str] = []
    for domain in tools.recipe.domains:
        total = tools.book.count("responses", domain)
        chosen = tools.chosen(min(total, PLOTTED), total, "figure", domain)
        for item in tools.book.items("responses", domain):
            if item.place in chosen:
                texts.append(item.content["instruction"])
                owners.append(domain)
    vectors = None if embedder is None else embedder.embed(texts)
    with ProgressBar("drawing instructions") as bar:
        bar.update(0, 1)
        if vectors is None:
            features = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
            rank = min(50, *(side - 1 for side in features.shape))
            vectors = TruncatedSVD(rank, random_state=0).fit_transform(features)
        plane = TSNE(perplexity=min(30, (len(texts) - 1) / 3), random_state=0, init="pca").fit_transform(
            vectors
        )
        bar.update(1, 1)
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for domain in tools.recipe.domains:
        points = plane[[owner == domain for owner in owners]]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=max(4, min(30, 20_000 / len(texts))),
            alpha=0.5,
            label=domain,
            linewidths=0,
        )
    for handle in axes.legend(frameon=False).legend_handles:
        assert isinstance(handle, PathCollection)
        handle.set_sizes([40])  # whatever the size of the points
    axes.set_axis_off()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def metrics(summaries: Mapping[str, Summary], spent: Sequence[Any]) -> dict[str, float]:
    """Numbers of a run, by name.

    Args:
        summaries: of its domains.
        spent: as `Book.spent` gives.
    """
    found: dict[str, float] = {}
    for domain, one in summaries.items():
        found |= {
            f"meta_topics/{domain}": one.meta_topics,
            f"sub_topics/{domain}": one.sub_topics,
            f"conversations/{domain}": one.total,
            f"wanted/{domain}": one.wanted,
            f"heldout/{domain}": one.conversations["heldout"],
            f"words_per_conversation/{domain}": one.words / max(one.total, 1),
            f"distinct_pairs/{domain}": one.distinct,
        }
        if one.tokens is not None:
            found[f"tokens_per_conversation/{domain}"] = one.tokens
    found["answers"] = sum(one.answers for one in spent)
    found["unread_answers"] = sum(one.unread for one in spent)
    found["input_tokens"] = sum(one.input_tokens for one in spent)
    found["output_tokens"] = sum(one.output_tokens for one in spent)
    return found
