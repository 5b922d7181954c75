"""`ultrafuser chat`: a conversation in the terminal, each token in the colours of its specialists."""

import contextlib
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ultrafuser.cli.generate import (
    MaxNewTokensOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from ultrafuser.cli.opening import (
    DeviceOption,
    DraftModelOption,
    DtypeOption,
    ModelArgument,
    SpeculateOption,
    open_decoder,
    open_model,
    whether_to_speculate,
)
from ultrafuser.errors import ConversationTooLongError, UltrafuserError

if TYPE_CHECKING:
    from ultrafuser.decoding.engine import FusedDecoder, TokenStep
    from ultrafuser.decoding.sampling import SamplingParams
    from ultrafuser.modeling.assembly import FusedModel

_HELP = """\
/only NAME  ask one specialist alone; /only asks all again
/weights    how the specialists weighed in on the last answer
/reset      forget the conversation
/quit       leave (or Ctrl-D); Ctrl-C stops an answer"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="chat")(chat)


def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    speculate: SpeculateOption = None,
    draft_model: DraftModelOption = None,
    system: SystemOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk to a fused model; every token stands on a mix of the colours of the specialists that chose it.

    In the chat, /help lists the commands.
    """
    from ultrafuser.decoding.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    speculates = whether_to_speculate(speculate, draft_model, temperature)
    fused = open_model(model, dtype, device)
    Chat(fused, params, system, decoder=open_decoder(fused, 1, speculates, draft_model)).run()


class Chat:
    """A conversation with a fused model in the terminal.

    Args:
        fused: model and tokenizer.
        params: how tokens are chosen. The seed goes up by one with every answer.
        system: system message.
        console: where to write.
        decoder: answers one conversation at a time; a speculating one of its own when None.
    """

    def __init__(
        self,
        fused: "FusedModel",
        params: "SamplingParams | None" = None,
        system: str | None = None,
        console: Console | None = None,
        decoder: "FusedDecoder | None" = None,
    ) -> None:
        from ultrafuser.analysis.palette import specialist_colours
        from ultrafuser.decoding.sampling import SamplingParams

        self._tokenizer = fused.tokenizer
        self._decoder = open_decoder(fused, 1, speculate=True) if decoder is None else decoder
        self._encoder = fused.model.conversation_encoder(fused.tokenizer)
        self._names = list(fused.model.specialist_names)
        self._colours = specialist_colours(len(self._names))
        self._params = SamplingParams() if params is None else params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._console = Console(highlight=False) if console is None else console
        self._only: str | None = None
        self._messages = list(self._opening)
        self._last: list[TokenStep] = []
        self._num_answers = 0

    def run(self) -> None:
        """Read questions and commands until /quit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and a line to edit
        self._console.print(self._legend(), "/help lists the commands.")
        while True:
            try:
                line = input("> " if self._only is None else f"{self._only}> ").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("\n[dim]/quit or Ctrl-D leaves.[/dim]")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(*line[1:].split())
            elif line:
                self._answer(line)

    def _command(self, name: str = "", *arguments: str) -> None:
        if name == "reset":
            self._messages, self._last = list(self._opening), []
            self._console.print("[dim]The conversation begins anew.[/dim]")
        elif name == "weights":
            self._console.print(self._weights_table() if self._last else "[dim]No answer yet.[/dim]")
        elif name == "only":
            self._ask_only(*arguments)
        elif name == "help":
            self._console.print(_HELP, markup=False)
            self._console.print(self._legend())
        else:
            self._console.print(f"There is no command /{name}.\n{_HELP}", markup=False)

    def _ask_only(self, *names: str) -> None:
        if len(names) > 1 or (names and names[0] not in self._names):
            known = ", ".join(self._names)
            self._console.print(f"There is no specialist {' '.join(names)}; there are {known}.", markup=False)
            return
        self._only = names[0] if names else None
        who = "All specialists answer" if self._only is None else f"{self._only} answers alone"
        self._console.print(f"[dim]{who} from here on.[/dim]")

    def _answer(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        try:
            prompt = self._encoder.prompt(messages)
        except ConversationTooLongError:
            self._console.print("The conversation no longer fits into the context. /reset begins anew.")
            return
        except UltrafuserError as error:
            self._console.print(str(error), markup=False)
            return
        room = self._room(prompt)
        started = time.perf_counter()
        steps, interrupted = self._stream(prompt, min(room, self._params.max_new_tokens))
        seconds = time.perf_counter() - started
        if not steps:
            self._console.print("[dim](no answer)[/dim]")
            return
        self._last = steps
        self._num_answers += 1
        text = self._encoder.decode([step.token_id for step in steps])
        self._messages = [*messages, {"role": "assistant", "content": text}]
        ended = steps[-1].token_id == self._encoder.end_token_id
        why = (
            "" if ended else "stopped" if interrupted else "context full" if len(steps) == room else "cut off"
        )
        self._console.print(self._footer(seconds, why))

    def _stream(self, prompt: list[list[int]], limit: int) -> "tuple[list[TokenStep], bool]":
        """Show an answer as it comes; return its tokens and whether it was interrupted."""
        steps: list[TokenStep] = []
        interrupted = False
        params = replace(self._params, max_new_tokens=limit, seed=self._params.seed + self._num_answers)
        try:
            for step in self._decoder.stream(prompt, params, only=self._only):
                steps.append(step)
                self._show(step.text, step.gate_weights)
        except KeyboardInterrupt:
            interrupted = True
        if steps:
            self._console.print()
        return steps, interrupted

    def _room(self, prompt: list[list[int]]) -> int:
        """Tokens that every specialist can still read."""
        limits = self._encoder.max_length
        return min(limits[name] - len(ids) for name, ids in zip(self._names, prompt, strict=True))

    def _show(self, text: str, weights: Sequence[float]) -> None:
        style = self._style(weights)
        for index, line in enumerate(_printable(text).split("\n")):
            if index:
                self._console.print()
            if line:
                self._console.out(line, style=style, end="", highlight=False)

    def _style(self, weights: Sequence[float]) -> Style:
        from ultrafuser.analysis.palette import mix_colours, tint

        # Black on a light ground, as on the page of `inspect`: readable whatever colours the terminal has.
        colour, opacity = tint(self._colours, weights)
        return Style(color="#000000", bgcolor=mix_colours([colour, "#ffffff"], [opacity, 1 - opacity]))

    def _legend(self) -> Text:
        parts = [self._swatch(index) for index in range(len(self._names))]
        return Text("  ").join(parts)

    def _swatch(self, index: int) -> Text:
        alone = [float(index == other) for other in range(len(self._names))]
        return Text(f" {self._names[index]} ", style=self._style(alone))

    def _footer(self, seconds: float, why: str) -> Text:
        means = _means(self._last)
        weights = "  ".join(f"{name} {mean:.2f}" for name, mean in zip(self._names, means, strict=True))
        speed = f"{len(self._last)} tokens, {len(self._last) / seconds:.1f}/s"
        return Text(" · ".join([weights, speed, *([why] if why else [])]), style="dim")

    def _weights_table(self) -> Table:
        from ultrafuser.decoding.text import token_texts

        texts = token_texts(self._tokenizer, [step.token_id for step in self._last])
        leaders = [max(range(len(self._names)), key=step.gate_weights.__getitem__) for step in self._last]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("specialist", no_wrap=True)
        table.add_column("mean weight", justify="right")
        table.add_column("led tokens", justify="right")
        table.add_column("its strongest tokens", overflow="fold")
        for index, mean in enumerate(_means(self._last)):
            order = sorted(range(len(texts)), key=lambda t: -self._last[t].gate_weights[index])
            strongest = Text("  ").join(
                Text(f"{_quoted(texts[t])} {self._last[t].gate_weights[index]:.2f}") for t in order[:5]
            )
            table.add_row(self._swatch(index), f"{mean:.3f}", str(leaders.count(index)), strongest)
        return table


def _means(steps: "Sequence[TokenStep]") -> list[float]:
    columns = zip(*(step.gate_weights for step in steps), strict=True)
    return [sum(column) / len(steps) for column in columns]


def _printable(text: str) -> str:
    """Without control codes: what a model writes must not move the cursor or set colours."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _quoted(token: str) -> str:
    return "‘" + _printable(token).replace("\n", "↵") + "’"
