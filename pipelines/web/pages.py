"""The pages under ``/ui``: server-rendered HTML, pieces of which htmx swaps.

A page runs scripts and takes styles of this server alone, and nothing that stands in the page
(Content-Security-Policy).
Who may see and do what is decided from the path, before a page is asked for
(``need_of`` of the HTTP door); pages only leave out what would be refused.
"""

from __future__ import annotations

import asyncio
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson
from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from plinth.engine import Engine, InputError, PlinthError, QueueFull, Refused
from plinth.pipelines.folders.jobs import Job, Jobs
from plinth.pipelines.identity.callers import EVERYTHING, Caller, Role
from plinth.pipelines.oip.service import ModelService
from plinth.pipelines.records import InternalError, explained
from plinth.pipelines.web import engine_view
from plinth.pipelines.web.desk import LEVELS, Desk, queries
from plinth.pipelines.web.form import entries
from plinth.pipelines.web.studies import parts, shown
from plinth.verticals import Vertical

if TYPE_CHECKING:
    from plinth.pipelines.stream.history.follow import Follower

HERE = Path(__file__).parent
WATCHERS = 32
"""Pages that follow the engine at once."""
EVERY = 1.0
"""Seconds between two looks of a page that follows the engine."""
_MAX_FORM = 16 << 10  # bytes
_SAFE = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "private, no-store",
}
_VIEWER = {  # NiiVue decodes in WebAssembly, in a worker of its own
    **_SAFE,
    "content-security-policy": _SAFE["content-security-policy"].replace(
        "script-src 'self'", "script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:"
    ),
}


@dataclass(frozen=True)
class Site:
    """What the pages are about.

    Args:
        engine: that serves.
        verticals: by name.
        reasons: why the server is not ready; a live view.
        jobs: uploads, where a vertical takes folders.
        models: of the store, where clients may have them loaded.
        drain: begins to end the server.
        requests: the collector of ``plinth_http_request_seconds``.
        follower: reads what stream workers decided, if anything does.
    """

    engine: Engine
    verticals: Mapping[str, Vertical[Any, Any]]
    reasons: Mapping[str, str]
    jobs: Jobs | None
    models: ModelService | None
    drain: Callable[[], None]
    requests: Collector
    follower: Follower | None = None


class Pages:
    """The pages of a server.

    Args:
        site: what they are about.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["tojson_text"] = lambda value: json.dumps(value, indent=2)
        self._watchers = 0
        self._fragment = (0.0, "")

    def add_to(self, app: FastAPI) -> None:
        """Put the pages into an app."""
        for path, method, handler in (
            ("/ui", "GET", self.home),
            ("/ui/engine", "GET", self.engine),
            ("/ui/engine/live", "GET", self.live),
            ("/ui/engine/models/{name}/variant", "POST", self.switch),
            ("/ui/engine/models/{name}/back", "POST", self.switch_back),
            ("/ui/engine/models/{name}/load", "POST", self.load),
            ("/ui/engine/models/{name}/unload", "POST", self.unload),
            ("/ui/engine/drain", "POST", self.drain),
            ("/ui/verticals/{name}", "GET", self.vertical),
            ("/ui/desk/{name}", "GET", self.desk),
            ("/ui/desk/{name}/live", "GET", self.tape),
            ("/ui/desk/{name}/alerts/{alert}", "GET", self.case),
            ("/ui/desk/{name}/alerts/{alert}", "POST", self.label),
            ("/ui/desk/{name}/what-if", "GET", self.what_if),
            ("/ui/desk/{name}/models", "GET", self.models),
            ("/ui/studies/{name}", "GET", self.studies),
            ("/ui/studies/{name}/{job}", "GET", self.study),
            ("/ui/studies/{name}/{job}/retry", "POST", self.retry),
            ("/ui/studies/{name}/{job}/items/{item}/verdict", "POST", self.judge),
            ("/ui/static/{file:path}", "GET", self.static),
        ):
            app.add_api_route(
                path, handler, methods=[method], include_in_schema=False, response_model=None
            )

    # -- engine ----------------------------------------------------------------------------------
    async def home(self, request: Request) -> Response:
        """What there is."""
        return self._page(request, "home.html")

    async def engine(self, request: Request) -> Response:
        """The engine's page."""
        return await self._engine(request, "engine.html")

    async def _engine(self, request: Request, template: str, notice: str = "") -> Response:
        told = await asyncio.to_thread(self._about_engine)
        return self._page(request, template, notice=notice, **told)

    def _about_engine(self) -> dict[str, Any]:
        site = self._site
        told = engine_view.view(site.engine, site.reasons)
        others = []
        if site.models is not None:
            others = [
                one for one in site.models.index() if one["name"] not in told["status"]["models"]
            ]
        return {**told, "others": others, "may_load": _may_load(site.models)}

    async def live(self, request: Request) -> Response:
        """The engine as it is now, again each second (server-sent events)."""
        return self._followed(self._events())

    def _followed(self, events: AsyncIterator[str]) -> Response:
        """Server-sent events, of which so many pages may ask together."""
        if self._watchers >= WATCHERS:
            raise QueueFull(f"{WATCHERS} pages follow this server already", retry_after=10.0)

        async def counted() -> AsyncIterator[str]:
            self._watchers += 1
            try:
                async for event in events:
                    yield event
            finally:
                self._watchers -= 1

        return StreamingResponse(
            counted(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _events(self) -> AsyncIterator[str]:
        while "draining" not in self._site.reasons:
            yield _event(await asyncio.to_thread(self._now))
            point = await asyncio.to_thread(engine_view.point, self._site.engine)
            yield f"event: point\ndata: {json.dumps(point)}\n\n"
            await asyncio.sleep(EVERY)
        yield _event(await asyncio.to_thread(self._now))

    def _now(self) -> str:
        at, html = self._fragment
        now = time.monotonic()
        if now - at > EVERY / 2:
            template = self._templates.get_template("_engine.html")
            html = template.render(engine_view.view(self._site.engine, self._site.reasons))
            self._fragment = (now, html)
        return html

    async def switch(self, request: Request) -> Response:
        """Let another variant of a model answer."""
        name, given = request.path_params["name"], (await _form(request)).get("variant", "")
        wanted = None if given == engine_view.REFERENCE else given
        return await self._switched(request, name, lambda variants: wanted)

    async def switch_back(self, request: Request) -> Response:
        """Let the variant answer that did before."""
        await _form(request)
        name = request.path_params["name"]
        return await self._switched(request, name, lambda variants: variants.before)

    async def _switched(
        self, request: Request, name: str, choose: Callable[[Any], str | None]
    ) -> Response:
        def change() -> str:
            variants = self._site.engine.variants(name)
            if variants is None:
                raise InputError(f"{name} has no variants", hint="it does not come from a store")
            wanted = choose(variants)
            before = variants.set_default(wanted)
            words = engine_view.REFERENCE
            return (
                f"{name}: {before or words} → {wanted or words}. It is loaded and checked, and "
                "answers within seconds; what cannot be loaded changes nothing."
            )

        return await self._done(request, change)

    async def load(self, request: Request) -> Response:
        """Load a model of the store."""
        await _form(request)
        name = request.path_params["name"]
        if self._site.models is None:
            raise _off()
        return await self._awaited(request, self._site.models.load(name), f"{name} is loaded.")

    async def unload(self, request: Request) -> Response:
        """Let a model of the store answer no more."""
        await _form(request)
        name = request.path_params["name"]
        if self._site.models is None:
            raise _off()
        return await self._awaited(request, self._site.models.unload(name), f"{name} is gone.")

    async def drain(self, request: Request) -> Response:
        """Begin to end the server."""
        await _form(request)

        def begin() -> str:
            self._site.drain()
            return "Draining: not ready any more; accepted work is answered, then the server ends."

        return await self._done(request, begin)

    async def _done(self, request: Request, change: Callable[[], str]) -> Response:
        return await self._awaited(request, asyncio.to_thread(change), "")

    async def _awaited(self, request: Request, change: Any, notice: str) -> Response:
        """The engine's part of the page after a change, with what became of it."""
        try:
            told = await change
        except PlinthError as error:
            known = error if error.message else explained(error)
            return await self._engine(request, "_models.html", f"Refused: {known}")
        return await self._engine(request, "_models.html", told or notice)

    # -- verticals -------------------------------------------------------------------------------
    async def vertical(self, request: Request) -> Response:
        """A vertical: what it takes, and a form to try it."""
        vertical = self._vertical(request)
        if vertical.request is None:
            return RedirectResponse(f"/ui/studies/{vertical.name}", 303)
        schema, example = await asyncio.to_thread(_record, vertical)
        return self._page(
            request,
            "vertical.html",
            vertical=vertical,
            route=f"/v1/{vertical.name}/{vertical.action}",
            schema=schema,
            example=example,
            entries=entries(schema, example),
            may_score=_role(request) != "read",
        )

    # -- the desk of alerts ----------------------------------------------------------------------
    async def desk(self, request: Request) -> Response:
        """The desk of a vertical's alerts; ``?part=queue``: its queue alone."""
        vertical, desk, given = *self._desk(request), dict(request.query_params)
        told = await desk.queue(given)
        if given.get("part") == "queue":
            return self._page(request, "_queue.html", vertical=vertical, **told)
        first = next((one.id for one in told["queue"].alerts), None)
        case = None if first is None else await desk.case(given.get("alert", first))
        told |= await desk.what_if(given)
        told |= {"case": case, "notice": "", "levels": LEVELS}
        return self._page(request, "desk.html", vertical=vertical, **told)

    async def tape(self, request: Request) -> Response:
        """The last payments as they come (server-sent events)."""
        vertical, desk = self._desk(request)
        template = self._templates.get_template("_tape.html")

        async def events() -> AsyncIterator[str]:
            async for told in desk.tape():
                yield _event(template.render(vertical=vertical, **told))
                if "draining" in self._site.reasons:
                    return

        return self._followed(events())

    async def case(self, request: Request) -> Response:
        """The case file of an alert."""
        vertical, desk = self._desk(request)
        notice, case = "", None
        try:
            case = await desk.case(request.path_params["alert"])
        except InputError as error:
            notice = str(error)
        return self._page(request, "_case.html", vertical=vertical, case=case, notice=notice)

    async def label(self, request: Request) -> Response:
        """Say what became known of an alert; the answer has the next of the queue."""
        vertical, desk = self._desk(request)
        given, alert = await _form(request), request.path_params["alert"]
        try:
            fraud = given.get("fraud", "")
            told = await desk.ask("alerts/{alert}/label", alert=alert, fraud=fraud)
            payment = (await desk.case(alert)).alert.transaction_id
            notice = f"Noted: payment {payment} is {told.label}."
        except (InputError, Refused) as error:
            notice = f"Refused: {error}"
        told = await desk.queue(given)
        left = [one.id for one in told["queue"].alerts if one.id != alert]
        case = await desk.case(left[0]) if left else None
        return self._page(
            request, "_work.html", vertical=vertical, case=case, notice=notice, **told
        )

    async def what_if(self, request: Request) -> Response:
        """What another threshold would have given."""
        vertical, desk = self._desk(request)
        told = await desk.what_if(dict(request.query_params))
        return self._page(request, "_what_if.html", vertical=vertical, **told)

    async def models(self, request: Request) -> Response:
        """Champion, challenger and drift."""
        vertical, desk = self._desk(request)
        models = await desk.ask("models")
        return self._page(request, "_standing.html", vertical=vertical, models=models)

    def _desk(self, request: Request) -> tuple[Vertical[Any, Any], Desk]:
        vertical = self._vertical(request)
        return vertical, Desk(vertical, self._site.requests, self._site.follower)

    # -- studies ---------------------------------------------------------------------------------
    async def studies(self, request: Request) -> Response:
        """The worklist: uploads, how they stand, and why some failed."""
        vertical = self._vertical(request)
        jobs = self._jobs(vertical)
        listed = [job.as_dict(jobs.clock()) for job in jobs.all(vertical.name)]
        template = "_worklist.html" if request.query_params.get("part") else "studies.html"
        return self._page(
            request,
            template,
            vertical=vertical,
            route=f"/v1/{vertical.name}/{vertical.action}",
            jobs=listed,
            busy=any(job["state"] not in ("done", "failed") for job in listed),
        )

    async def study(self, request: Request) -> Response:
        """One upload: its studies with their findings, pictures, volumes and files."""
        vertical = self._vertical(request)
        job = self._job(vertical, request.path_params["job"])
        told = await asyncio.to_thread(_plain, job, self._jobs(vertical))
        items = [shown(item) for item in told["items"]]
        return self._page(request, "study.html", _VIEWER, vertical=vertical, job=told, items=items)

    async def retry(self, request: Request) -> Response:
        """Try again what failed of an upload, and show it."""
        vertical = self._vertical(request)
        await _form(request)
        job = self._job(vertical, request.path_params["job"])
        await asyncio.to_thread(self._jobs(vertical).retry, job)
        return RedirectResponse(f"/ui/studies/{vertical.name}/{job.id}", 303)

    async def judge(self, request: Request) -> Response:
        """Accept or reject a study or a row of what was found in it."""
        vertical, given = self._vertical(request), await _form(request)
        job, item = self._job(vertical, request.path_params["job"]), request.path_params["item"]
        jobs, part = self._jobs(vertical), given.get("part", "")
        told = await asyncio.to_thread(_plain, job, jobs)
        known = {p for one in told["items"] if one["id"] == item for p in parts(shown(one))}
        if part not in known or given.get("accepted") not in ("true", "false"):
            raise InputError("there is no such result to judge", reason="not_found")
        caller = _caller(request)
        by, accepted = "" if caller is None else caller.name, given["accepted"] == "true"
        verdict = await asyncio.to_thread(jobs.judge, job, item, part, accepted, by)
        there = f"/ui/studies/{vertical.name}/{job.id}/items/{item}/verdict"
        return self._page(request, "_verdict.html", verdict=verdict, part=part, there=there)

    def _vertical(self, request: Request) -> Vertical[Any, Any]:
        found = self._site.verticals.get(request.path_params["name"])
        if found is None:
            raise InputError("there is no such page", reason="not_found", hint="see /ui")
        return found

    def _jobs(self, vertical: Vertical[Any, Any]) -> Jobs:
        if self._site.jobs is None or vertical.request is not None:
            raise InputError(
                f"{vertical.name} takes no folders",
                reason="not_found",
                hint=f"see /ui/verticals/{vertical.name}",
            )
        return self._site.jobs

    def _job(self, vertical: Vertical[Any, Any], name: str) -> Job:
        job = self._jobs(vertical).get(vertical.name, name)
        if job is None:
            raise InputError(
                "there is no such upload, or not any more",
                reason="not_found",
                hint=f"see /ui/studies/{vertical.name}",
            )
        return job

    # -- all of them -----------------------------------------------------------------------------
    async def static(self, request: Request) -> Response:
        """A script, a style, a licence."""
        path = _static().get(request.path_params["file"])
        if path is None:
            raise InputError("there is no such file", reason="not_found")
        media = mimetypes.guess_type(path.name)[0] or "text/plain"
        return FileResponse(
            path,
            media_type=media,
            headers={"cache-control": "public, max-age=3600", "x-content-type-options": "nosniff"},
        )

    def _page(
        self, request: Request, template: str, headers: Mapping[str, str] = _SAFE, **given: Any
    ) -> Response:
        caller, role = _caller(request), _role(request)
        reaches = (lambda name: True) if caller is None else caller.reaches
        html = self._templates.get_template(template).render(
            path=request.url.path,
            who="" if caller is None else caller.name,
            role=role,
            is_admin=role == "admin",
            sees_all=reaches(EVERYTHING),
            pages=[
                (name, "studies" if one.request is None else "verticals")
                for name, one in self._site.verticals.items()
                if reaches(name) and (one.request is not None or role != "read")
            ],
            desks=[
                name
                for name, one in self._site.verticals.items()
                if reaches(name) and role != "read" and queries(one)
            ],
            **given,
        )
        return Response(html, media_type="text/html; charset=utf-8", headers=dict(headers))


def _event(html: str) -> str:
    return "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"


def _caller(request: Request) -> Caller | None:
    """Who asks; ``None`` where nobody needs a key."""
    found: Caller | None = request.scope["state"].get("caller")
    return found


def _role(request: Request) -> Role:
    """What the caller may; everything, where nobody needs a key."""
    caller = _caller(request)
    return "admin" if caller is None else caller.role


def _may_load(models: ModelService | None) -> bool:
    return models is not None and models.config.load_models


def _off() -> InputError:
    return InputError(
        "models are not loaded here", reason="not_found", hint="set serve.oip.load_models"
    )


def _plain(job: Job, jobs: Jobs) -> dict[str, Any]:
    """A job as JSON has it, results included."""
    found: dict[str, Any] = orjson.loads(orjson.dumps(job.as_dict(jobs.clock())))
    return found


def _record(vertical: Vertical[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of what a vertical takes, and an example as JSON."""
    request = vertical.request
    assert request is not None
    try:
        example = json.loads(vertical.example().model_dump_json(exclude_none=True))
        return request.model_json_schema(), example
    except Exception as error:
        raise InternalError from error


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small form.

    Raises:
        InputError: it is too large, or of another kind.
    """
    kind = request.headers.get("content-type", "application/x-www-form-urlencoded")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_FORM:
            raise InputError("the form is too large", reason="body_too_large")
    if body and not kind.startswith("application/x-www-form-urlencoded"):
        raise InputError("this takes a form", hint="use the page", reason="unsupported_media_type")
    found = parse_qs(body.decode("utf-8", "replace"), max_num_fields=20)
    return {name: values[-1] for name, values in found.items()}


@lru_cache(maxsize=1)
def _static() -> dict[str, Path]:
    """The files that pages are made of, by name; what is not here is not served."""
    folder = HERE / "static"
    return {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
