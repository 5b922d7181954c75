"""`ultrafuser serve`: a fused model behind OpenAI's endpoints."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultrafuser.cli.opening import DeviceOption, DtypeOption, ModelArgument, open_decoder, open_model
from ultrafuser.errors import UltrafuserError

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Engine(StrEnum):
    """What decodes."""

    NATIVE = "native"
    VLLM = "vllm"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="serve")(serve)


def serve(
    model: ModelArgument,
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM OPTIONS]", help="For `vllm serve`, with --engine vllm."),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            "--engine",
            help="native: a template for each specialist, gate weights in every response, the page. vllm: for load.",
        ),
    ] = Engine.NATIVE,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model.", show_default="the last part of MODEL"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="ULTRAFUSER_API_KEY",
            help="Clients have to bring it as a bearer token.",
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", min=1, help="Requests decoded together.", show_default="8; vllm: its own choice"
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            "--max-waiting", min=0, help="Requests that may wait; more are refused (429).", show_default="64"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Tokens of a response at most.", show_default="the context"
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="A web page's origin that may ask, too.", show_default=False),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="A name under which the server may be asked, too, such as a proxy's.",
            show_default="this machine's own; with another --host, any",
        ),
    ] = None,
    grace_s: Annotated[
        int | None,
        typer.Option(
            "--grace-s", min=0, help="Seconds that what runs has to finish, after Ctrl-C.", show_default="60"
        ),
    ] = None,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate/--no-speculate",
            help="Draft several tokens at once where that is faster; a seed then no longer decides samples.",
        ),
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Serve a fused model: a page to chat at /, and OpenAI's endpoints.

    These are /v1/chat/completions, /v1/completions and /v1/models; /health says whether the server runs, /metrics what
    it counted.

    Every choice carries one field more, `fusion`: the specialists, and for each token its text and how much each
    specialist counted. A request may name one `specialist` that answers alone. Ctrl-C finishes what runs.

    With `--engine vllm` the model is handed to `vllm serve`, which has to be installed; all specialists must read one
    chat template then.

    Examples: ultrafuser serve fused

    ultrafuser serve fused --engine vllm -- --tensor-parallel-size 2
    """
    shown = Path(model).resolve().name if name is None else name
    if api_key is not None and not (api_key and api_key.isascii()):
        raise UltrafuserError(
            "--api-key must be plain ASCII and not empty. Leave it out for a server without a key."
        )
    origins = () if cors_origin is None else tuple(cors_origin)
    if engine is Engine.VLLM:
        foreign = {
            "--max-waiting": max_waiting is not None,
            "--device": device is not None,
            "--speculate": speculate,
            "--allowed-host": allowed_host is not None,
            "--grace-s": grace_s is not None,
        }
        if refused := [option for option, is_given in foreign.items() if is_given]:
            raise UltrafuserError(
                f"{', '.join(refused)} is for --engine native. Leave it out; options of vLLM go after `--`."
            )
        options = ["--host", host, "--port", str(port), "--served-model-name", shown]
        options += [] if max_batch is None else ["--max-num-seqs", str(max_batch)]
        options += [] if dtype is None else ["--dtype", dtype.value]
        options += ["--allowed-origins", json.dumps(origins)]
        if max_new_tokens is not None:
            options += ["--override-generation-config", json.dumps({"max_new_tokens": max_new_tokens})]
        _become_vllm(model, [*options, *([] if vllm_options is None else vllm_options)], api_key)
    if vllm_options is not None:
        raise UltrafuserError(f"{' '.join(vllm_options)}: further options are for --engine vllm.")
    try:
        import uvicorn

        from ultrafuser.analysis.palette import specialist_colours
        from ultrafuser.serving.app import ServerSettings, create_app
    except ImportError as error:
        raise UltrafuserError(
            f"serve needs the package {error.name!r}: pip install 'ultrafuser[serve]'."
        ) from error
    listening = _bind(host, port, ServerSettings.write_timeout_s)  # before the model, which may take minutes
    fused = open_model(model, dtype, device)
    settings = ServerSettings(
        name=shown,
        max_waiting=64 if max_waiting is None else max_waiting,
        max_new_tokens=max_new_tokens,
        api_key=api_key,
        cors_origins=origins,
        hosts=_hosts(host, allowed_host),
        colours=tuple(specialist_colours(fused.model.num_specialists)),
    )
    decoder = open_decoder(fused, 8 if max_batch is None else max_batch, speculate)
    app = create_app(fused, decoder, settings)
    place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    Console(stderr=True).print(
        f"{settings.name} at {place}/v1, a page at {place}/", markup=False, highlight=False, soft_wrap=True
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has finished what ran
        uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=60 if grace_s is None else grace_s
            )
        ).run(sockets=[listening])


def _hosts(host: str, allowed: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names under which the server may be asked; None for any, where it listens to other machines."""
    if host not in _LOOPBACK and allowed is None:
        return None
    return tuple(name.lower() for name in (*_LOOPBACK, host, *([] if allowed is None else allowed)))


def _bind(host: str, port: int, write_timeout_s: float) -> socket.socket:
    """A socket that has the port; who connects waits until the model is there.

    Args:
        host: to listen on.
        port: 0 for any that is free.
        write_timeout_s: a connection whose other end takes nothing for so long is cut, where the system can do that;
            a server that wants to end would have to wait for it.

    Raises:
        UltrafuserError: the port cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have it from the socket that takes them
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * write_timeout_s))
    try:
        bound.bind((host, port))
        bound.listen(2048)  # or another could still take it
    except OSError as error:
        bound.close()
        raise UltrafuserError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another --host or --port."
        ) from error
    return bound


def _become_vllm(model: str, options: Sequence[str], api_key: str | None) -> None:
    """Run `vllm serve` in the place of this process.

    Raises:
        UltrafuserError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise UltrafuserError(
            "--engine vllm needs vLLM: pip install 'ultrafuser[vllm]' on a machine with a GPU, or `make vllm` in a "
            "clone for CPUs."
        )
    environment = dict(os.environ)
    if api_key is not None:
        environment["VLLM_API_KEY"] = (
            api_key  # not among the arguments, which everybody on the machine can read
        )
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
    os.execve(sys.executable, command, environment)
