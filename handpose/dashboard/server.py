"""The web application of the dashboard.

It is for one person on one machine. What a request reads or changes needs the token in the address that is printed at
the start. The token is in the fragment of the address, which a browser sends to nobody; the page's script sends it in a
header. So a page of another origin cannot give a command: it does not know the token, and a browser lets no page send
that header elsewhere without asking first (Fetch Standard, CORS-preflight). A cookie would not do, because the servers
of all users of a machine share it, whatever their port. Requests for another host name are refused, so that no name
can be made to point to this machine (DNS rebinding).
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from handpose.dashboard.live_sweep import LiveSweep
from handpose.errors import UserError
from handpose.files import to_json
from handpose.sweep.record.interventions import make_intervention

HEADER = "x-handpose-token"
_PAGE = Path(__file__).parent / "page"
_FILES: Mapping[str, tuple[Any, str]] = {
    "live.js": (_PAGE / "live.js", "text/javascript"),
    "live.css": (_PAGE / "live.css", "text/css"),
    "report.css": (Path(__file__).parents[1] / "report" / "page" / "page.css", "text/css"),
    "plotly.js": (resources.files("plotly").joinpath("package_data/plotly.min.js"), "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TRIAL_ACTIONS, _SWEEP_ACTIONS = ("stop", "retry", "keep"), ("pause", "resume")
_MAX_BODY = 10_000
_Answer: TypeAlias = Callable[[Request], Awaitable[Response]]


def make_app(sweeps: Sequence[LiveSweep], *, token: str, hosts: Sequence[str], read_only: bool) -> Starlette:
    """Make the application.

    Args:
        sweeps: the sweeps, in the order of the page.
        token: the secret of the printed address.
        hosts: allowed values of the Host header, such as `127.0.0.1:8000`.
        read_only: whether commands are refused.
    """
    pages = _Pages(sweeps, read_only=read_only)

    def guard(answer: _Answer, *, needs_token: bool = True) -> _Answer:
        async def answer_if_allowed(request: Request) -> Response:
            refusal = _refuse(request, token=token if needs_token else None, hosts=hosts)
            response = await answer(request) if refusal is None else refusal
            response.headers.update(_HEADERS)
            return response

        return answer_if_allowed

    return Starlette(
        routes=[
            Route("/", guard(pages.show, needs_token=False)),
            Route("/static/{name}", guard(pages.send_file, needs_token=False)),
            Route("/sweeps", guard(pages.list_sweeps)),
            Route("/sweeps/{number:int}", guard(pages.read_sweep)),
            Route("/sweeps/{number:int}/commands", guard(pages.give_command), methods=["POST"]),
            Route("/sweeps/{number:int}/commands/{name}", guard(pages.read_answer)),
        ]
    )


def _refuse(request: Request, *, token: str | None, hosts: Sequence[str]) -> Response | None:
    """Return the refusal of a request; None if it is allowed."""
    if request.headers.get("host") not in hosts:
        return PlainTextResponse("unknown host", status_code=421)
    given = request.headers.get(HEADER, "")
    if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
        return PlainTextResponse("open the address that the program has printed; it has the token", status_code=403)
    return None


class _Pages:
    """Answers requests that are allowed."""

    def __init__(self, sweeps: Sequence[LiveSweep], *, read_only: bool) -> None:
        self._sweeps, self._read_only = sweeps, read_only

    async def show(self, request: Request) -> Response:
        """Return the page."""
        text = (_PAGE / "live.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("READ_ONLY", "yes" if self._read_only else "no"))

    async def send_file(self, request: Request) -> Response:
        """Return a script or a style sheet."""
        found = _FILES.get(request.path_params["name"])
        if found is None:
            return PlainTextResponse("there is no such file", status_code=404)
        return FileResponse(str(found[0]), media_type=found[1])

    async def list_sweeps(self, request: Request) -> Response:
        """Return the names of the sweeps."""
        return JSONResponse([sweep.folder.name for sweep in self._sweeps])

    async def read_sweep(self, request: Request) -> Response:
        """Return the status and the charts of a sweep."""
        sweep = self._find_sweep(request)
        if sweep is None:
            return PlainTextResponse("there is no such sweep", status_code=404)
        try:
            return Response(to_json(await run_in_threadpool(sweep.read)), media_type="application/json")
        except (UserError, OSError) as error:
            return JSONResponse({"error": str(error)}, status_code=500)

    async def give_command(self, request: Request) -> Response:
        """Write the command of a button into the folder of the sweep, and return its id."""
        sweep = self._find_sweep(request)
        if sweep is None:
            return PlainTextResponse("there is no such sweep", status_code=404)
        if self._read_only:
            return JSONResponse({"error": "the dashboard was started with --read-only"}, status_code=403)
        try:
            body = await request.body()
            values = None if len(body) > _MAX_BODY else await request.json()
            given = _make_intervention(values)
            await run_in_threadpool(sweep.interventions.write, given)
        except ValueError:
            return JSONResponse({"error": "the command is not JSON"}, status_code=400)
        except (UserError, OSError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"id": given.id}, status_code=202)

    async def read_answer(self, request: Request) -> Response:
        """Return the answer to a command; null if there is none yet."""
        sweep, name = self._find_sweep(request), request.path_params["name"]
        if sweep is None or name not in sweep.interventions.list_ids():
            return PlainTextResponse("there is no such command", status_code=404)
        answer = await run_in_threadpool(sweep.interventions.read_answer, name)
        return JSONResponse(None if answer is None else {"accepted": answer.is_accepted, "sentence": answer.sentence})

    def _find_sweep(self, request: Request) -> LiveSweep | None:
        number = request.path_params["number"]
        return self._sweeps[number] if number < len(self._sweeps) else None


def _make_intervention(values: Any) -> Any:
    if not isinstance(values, dict) or values.get("action") not in (*_TRIAL_ACTIONS, *_SWEEP_ACTIONS):
        raise UserError("the command is none that the page can give")
    trial = values.get("trial")
    return make_intervention(values["action"], trial=trial if values["action"] in _TRIAL_ACTIONS else None)
