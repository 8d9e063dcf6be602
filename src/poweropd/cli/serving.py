"""The verb for another machine: serve-teacher."""

import signal
from typing import Annotated, Literal

import typer

from poweropd.cli.measuring import Precision
from poweropd.cli.shared import Debug, app, console, plain_errors

Quantization = Literal["none", "8bit", "4bit"]


@app.command("serve-teacher")
def serve_teacher(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or `quickstart:teacher`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8100,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the token that requests must bear."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    precision: Annotated[Precision, typer.Option(help="Of its weights.")] = "auto",
    quantization: Annotated[Quantization, typer.Option(help="Weights in 8 or 4 bits, on a GPU.")] = "none",
    offload: Annotated[bool, typer.Option(help="Keep its layers in main memory.")] = False,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 16384,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")] = None,
    debug: Debug = False,
) -> None:
    """Score for trainers on other machines: recipes with `teacher: {model: ..., engine: served, url: http://HOST:PORT}`.

    Without a token it is for this machine alone. It does not encrypt: between machines that do not trust the network, put a
    TLS proxy before it and give its https URL. Ctrl-C ends it.

    Example: `poweropd serve-teacher Qwen/Qwen3-8B --host 0.0.0.0 --token-env POWEROPD_TOKEN`
    """
    with plain_errors(debug):
        from poweropd import cpu
        from poweropd.models import default_device, load_model, load_tokenizer, resolve_precision
        from poweropd.teacher.http import token_from
        from poweropd.teacher.server import TeacherServer
        from poweropd.teacher.service import TeacherService

        with TeacherServer(host, port, token_from(token_env, "--token-env")) as server:
            cpu.settle(threads)
            device = default_device()
            loaded = load_model(
                model, dtype=resolve_precision(precision, device), device=device, revision=revision,
                quantization=quantization, offload=offload,
            )  # fmt: skip
            service = TeacherService(
                loaded, load_tokenizer(model, revision), name=model, tokens_per_batch=tokens_per_batch
            )
            info = service.info
            console.print(
                f"{model} ({info.dtype}, {info.vocab_size} tokens, weights {info.weights}) at {server.url}",
                markup=False,
            )
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # whoever runs it: a user, a container, a script's background
                signal.signal(number, signal.default_int_handler)
            try:
                server.serve(service)
            except KeyboardInterrupt:
                console.print(f"ended after {service.tokens} tokens", markup=False)
