"""Serve the explorer's page to this machine alone, to whoever has the token of its address."""

import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from rotate_edit.errors import BadInput

HOST = "127.0.0.1"
COOKIE = "rotate_edit_token"
# Nothing of the page is fetched from elsewhere, whatever is in it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


def without_telemetry() -> None:
    """Keep Gradio from sending anything. It reads this when it is imported.

    Raises:
        BadInput: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "explore needs Gradio; install it with `pip install -c constraints.txt '.[explore]'`."
        ) from error


def guarded(page: Any, token: str) -> Any:
    """The page as an application that answers only to requests with its token.

    The token stands in the address once. It is then kept in a cookie that no other site's request carries.

    Args:
        page: The `gradio.Blocks`.
        token: The secret.

    Returns:
        A FastAPI application.
    """
    import gradio
    from fastapi import FastAPI, Request
    from fastapi.responses import PlainTextResponse, RedirectResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from rotate_edit.cli.explorer.page import CSS

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        told = request.query_params.get("token", "")
        if request.url.path == "/" and secrets.compare_digest(told.encode(), token.encode()):
            answer: Response = RedirectResponse("/", status_code=303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        # Browsers fetch it without cookies, and there is nothing in it.
        if request.url.path == "/manifest.json":
            return await call(request)
        if not secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
            return PlainTextResponse("Open the page by the address that the command printed.", status_code=403)
        answer = await call(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    # A page elsewhere may point a name of its own at this machine.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gradio.mount_gradio_app(
        app, page.queue(default_concurrency_limit=1), path="/", server_name=HOST, theme=theme, css=CSS,
        footer_links=[], enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
    )  # fmt: skip


def free_port(wanted: int | None) -> int:
    """A port of this machine that nothing listens on.

    Args:
        wanted: The port that is asked for. None takes any.

    Raises:
        BadInput: The port is taken.
    """
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise BadInput(
                f"the port {wanted} cannot be had ({error.strerror}); choose another with --port."
            ) from error
        return int(probe.getsockname()[1])


def serve(page: Any, port: int, token: str) -> None:
    """Serve the page until it is interrupted.

    Args:
        page: The `gradio.Blocks`.
        port: The port.
        token: The secret.
    """
    import uvicorn

    uvicorn.run(guarded(page, token), host=HOST, port=port, log_level="warning", access_log=False)
