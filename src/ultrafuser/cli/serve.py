"""`ultrafuser serve`: a fused model behind OpenAI's endpoints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultrafuser.cli.opening import DeviceOption, DtypeOption, ModelArgument, open_decoder, open_model
from ultrafuser.errors import UltrafuserError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="serve")(serve)


def serve(
    model: ModelArgument,
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
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests decoded together.")] = 8,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait; more are refused (429).")
    ] = 64,
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
    """Serve a fused model to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Every choice carries one field more, `fusion`: the specialists, and for each token its text and how much each
    specialist counted. A request may name one `specialist` that answers alone. Ctrl-C finishes what runs.

    Example: ultrafuser serve fused
    """
    try:
        import uvicorn

        from ultrafuser.serving.app import ServerSettings, create_app
    except ImportError as error:
        raise UltrafuserError(
            f"serve needs the package {error.name!r}: pip install 'ultrafuser[serve]'."
        ) from error
    fused = open_model(model, dtype, device)
    settings = ServerSettings(
        name=Path(model).name if name is None else name,
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        api_key=api_key,
        cors_origins=() if cors_origin is None else tuple(cors_origin),
    )
    app = create_app(fused, open_decoder(fused, max_batch, speculate), settings)
    place = f"http://{host}:{port}/v1"
    Console(stderr=True).print(f"{settings.name} at {place}", markup=False, highlight=False, soft_wrap=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
