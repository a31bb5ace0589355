"""The HTTP application: /v1/chat/completions, /v1/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as RouteError

from miles_lite.data.tokenizer import ChatTokenizer
from miles_lite.protocols import EngineError
from miles_lite.rollout.manager import derive_seed
from miles_lite.rollout.probes import CLOSE, Thinking, how_it_thinks
from miles_lite.serve.choice import Choice, Delta, Wish
from miles_lite.serve.form import Form
from miles_lite.serve.limits import BodyLimit, max_body_bytes
from miles_lite.serve.live import Inbox, LiveEngine
from miles_lite.serve.wire import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_ANSWERS,
    ApiError,
    ChatAsk,
    CompletionAsk,
    Message,
    error_of,
)
from miles_lite.types import Sampling
from miles_lite.untrusted import parse_json, short

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What the application stands on."""

    name: str  # of the model, which clients ask for
    tokenizer: ChatTokenizer
    engine: LiveEngine
    api_key: str = field(repr=False)  # "" asks for none


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


def application(served: Served) -> FastAPI:
    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        served.engine.open()
        yield
        served.engine.close()

    app = FastAPI(title="miles-lite", lifespan=life, openapi_url=None)
    started = int(time.time())
    card = {"id": served.name, "object": "model", "created": started, "owned_by": "miles-lite"}
    guarded = [Depends(_guard(served.api_key))]

    @app.get("/health")
    async def health() -> Response:
        if served.engine.failure:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok", "running": served.engine.num_running})

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return card

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(ask: ChatAsk, request: Request) -> Response:
        _check_model(served, ask.model)
        return await _respond(served, request, ask, [chat_wish(served, ask)])

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(ask: CompletionAsk, request: Request) -> Response:
        _check_model(served, ask.model)
        return await _respond(served, request, ask, completion_wishes(served, ask))

    _handle_errors(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes(served.engine.options.max_seq_len))
    return app


def _handle_errors(app: FastAPI) -> None:
    def tell(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> Response:
        return tell(error)

    @app.exception_handler(RequestValidationError)
    async def of_body(_: Request, error: RequestValidationError) -> Response:
        return tell(error_of(list(error.errors())))

    @app.exception_handler(RouteError)
    async def of_route(request: Request, error: HTTPException) -> Response:
        return tell(
            ApiError(
                error.status_code, f"{request.method} {short(request.url.path)}: {error.detail}"
            )
        )

    @app.exception_handler(EngineError)
    async def of_engine(_: Request, error: EngineError) -> Response:
        log.error("%s", error)
        return tell(_engine_error())

    @app.exception_handler(Exception)
    async def of_a_bug(_: Request, error: Exception) -> Response:
        return tell(ApiError(500, "the server made a mistake; its log says more"))

    @app.exception_handler(ClientGone)
    async def of_nobody(_: Request, error: ClientGone) -> Response:
        return Response(status_code=499)


def _engine_error() -> ApiError:
    return ApiError(500, "the engine has stopped; the server's log says why", code="engine_failed")


def _guard(api_key: str) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if api_key and not (kind.lower() == "bearer" and right):
            told = "incorrect API key" if given else "no API key: send Authorization: Bearer KEY"
            raise ApiError(401, told, code="invalid_api_key")

    return check


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise ApiError(
            404, f"model {short(name)} is not served here, but {served.name!r} is", "model",
            "model_not_found",
        )  # fmt: skip


# ------------------------------------------------------------------ what is asked


def chat_wish(served: Served, ask: ChatAsk) -> Wish:
    for name in ask.chat_template_kwargs:
        # what is no setting would be an argument of the renderer: a template of one's own, say
        if name in _NO_SETTINGS or not served.tokenizer.takes(name):
            raise ApiError(
                400, f"the chat template of this model has no setting {name!r}",
                f"chat_template_kwargs.{name}", "unknown_parameter",
            )  # fmt: skip
    offered = ask.tools if ask.tool_choice == "auto" else []
    tools = [tool.model_dump(exclude_unset=True) for tool in offered]
    messages = [_for_template(message) for message in ask.messages]
    text = _render(served, messages, ask.chat_template_kwargs, tools)
    if tools and text == _render(served, messages, ask.chat_template_kwargs, []):
        raise ApiError(
            400, "the chat template of this model shows it no tools", "tools",
            "unsupported_parameter",
        )  # fmt: skip
    limits = {ask.max_tokens, ask.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            400, "max_tokens and max_completion_tokens are the same: send one", "max_tokens"
        )
    if ask.top_logprobs and not ask.logprobs:
        raise ApiError(400, "top_logprobs wants logprobs = true", "top_logprobs")
    thinking = how_it_thinks(text, served.tokenizer.knows(CLOSE))
    wish = Wish(
        tokens=_tokens(served, text, "messages"),
        sampling=_sampling(served, ask, ask.max_tokens or ask.max_completion_tokens or 0),
        stops=ask.stop,
        wants_logprobs=ask.logprobs,
        is_chat=True,
        parts_reasoning=ask.separate_reasoning,
        thinks=thinking is Thinking.opened,
        thinking_budget=ask.thinking_budget,
        one_call=not ask.parallel_tool_calls,
        tools={tool.function.name: tool.function.parameters for tool in offered},
    )
    wish = replace(wish, sampling=replace(wish.sampling, top_logprobs=ask.top_logprobs))
    return _fitted(served, wish, "messages")


def completion_wishes(served: Served, ask: CompletionAsk) -> list[Wish]:
    prompts: list[Any] = ask.prompt if isinstance(ask.prompt, list) else [ask.prompt]
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    if len(prompts) * ask.n > MAX_ANSWERS:
        raise ApiError(
            400, f"{len(prompts)} prompts, n = {ask.n}: at most {MAX_ANSWERS} answers", "prompt"
        )
    sampling = replace(
        _sampling(served, ask, ask.max_tokens or DEFAULT_COMPLETION_TOKENS),
        top_logprobs=ask.logprobs or 0,
    )
    wishes = []
    for prompt in prompts:
        is_text = isinstance(prompt, str)
        tokens = _tokens(served, prompt, "prompt") if is_text else tuple(prompt)
        vocab = served.engine.model.vocab_size
        if not tokens or not all(0 <= token < vocab for token in tokens):
            raise ApiError(400, f"prompt is empty, or has tokens beyond 0 .. {vocab - 1}", "prompt")
        wish = Wish(tokens, sampling, ask.stop, wants_logprobs=ask.logprobs is not None)
        wishes.append(_fitted(served, wish, "prompt"))
    if not wishes:
        raise ApiError(400, "prompt is an empty list", "prompt")
    return wishes


_NO_SETTINGS = ("messages", "tools", "documents", "add_generation_prompt", "chat_template")


def _for_template(message: Message) -> dict[str, Any]:
    """As chat templates want it: content as text, arguments as an object."""
    plain = {name: value for name, value in message.model_dump().items() if value}
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = "".join(part.text for part in message.content)
    for call in plain.get("tool_calls", []):
        function, given = call["function"], call["function"]["arguments"]
        with contextlib.suppress(ValueError):  # else as text
            function["arguments"] = parse_json(given or "{}", "arguments")
    return plain


def _render(served: Served, messages: Any, settings: dict[str, Any], tools: list[Any]) -> str:
    try:
        return served.tokenizer.render(messages, settings, tools)
    except Exception as error:  # a template is a program: it raises what it likes
        raise ApiError(400, f"the chat template refuses this: {error}", "messages") from None


def _sampling(served: Served, ask: ChatAsk | CompletionAsk, max_tokens: int) -> Sampling:
    return Sampling(
        seed=secrets.randbits(63) if ask.seed is None else ask.seed,
        max_new_tokens=max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=min(max(0, ask.top_k), served.engine.model.vocab_size),
        stop_token_ids=() if ask.ignore_eos else served.engine.model.eos_token_ids,
    )


def _tokens(served: Served, text: str, param: str) -> tuple[int, ...]:
    """Of a prompt; a hopeless one is not even looked at, which can take minutes."""
    room, least = served.engine.options.max_seq_len, served.tokenizer.least_tokens(text)
    if least > room:
        raise ApiError(
            400,
            f"this model's maximum context length is {room} tokens; the prompt alone has {least} "
            "or more",
            param,
            "context_length_exceeded",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, f"{param} holds half of a surrogate pair, no character", param
        ) from None
    return served.tokenizer.encode(text)


def _fitted(served: Served, wish: Wish, param: str) -> Wish:
    """With room for the answer: all that is left if no limit was given. 400 if there is none."""
    room = served.engine.options.max_seq_len
    forced = 0 if wish.thinking_budget is None else len(served.tokenizer.encode(CLOSE))
    needed = len(wish.tokens) + forced
    wanted = wish.sampling.max_new_tokens or max(1, room - needed)
    if needed + wanted > room:
        raise ApiError(
            400,
            f"this model's maximum context length is {room} tokens; you asked for "
            f"{needed + wanted}: {needed} of the prompt and {wanted} of the answer",
            param,
            "context_length_exceeded",
        )
    return replace(wish, sampling=replace(wish.sampling, max_new_tokens=wanted))


# ------------------------------------------------------------------ what is answered


async def _respond(
    served: Served, request: Request, ask: ChatAsk | CompletionAsk, wishes: Sequence[Wish]
) -> Response:
    form = Form.of(served.name, served.tokenizer, isinstance(ask, ChatAsk), ask.n)
    asked = [_seeded(wish, number) for wish in wishes for number in range(ask.n)]
    choices = [Choice(index, wish, served.tokenizer) for index, wish in enumerate(asked)]
    pieces = _draw(served.engine, choices, request)
    if ask.stream:
        usage = ask.stream_options.include_usage
        lines = _stream(form, choices, pieces, usage)
        return StreamingResponse(lines, media_type="text/event-stream")
    told: list[list[Delta]] = [[] for _ in choices]
    async for choice, delta in pieces:
        told[choice.index].append(delta)
    return JSONResponse(form.whole(choices, told))


def _seeded(wish: Wish, number: int) -> Wish:
    """The first of n answers is the one that n = 1 would bring."""
    if number == 0:
        return wish
    seed = derive_seed(wish.sampling.seed, number)
    return replace(wish, sampling=replace(wish.sampling, seed=seed))


async def _draw(
    engine: LiveEngine, choices: Sequence[Choice], request: Request
) -> AsyncGenerator[tuple[Choice, Delta]]:
    """What the tokens of each moment add to which answer, until all are over: one by one, or more
    at once when the client is slower than the engine. Leaves nothing in the engine, however it
    ends. Raises ClientGone, EngineError."""
    inbox: Inbox = asyncio.Queue()
    watch = asyncio.create_task(_tell_when_gone(request, inbox))
    waiting = {engine.next_uid(): choice for choice in choices}
    try:
        engine.start([choice.request(uid) for uid, choice in waiting.items()], inbox)
        while waiting:
            deltas: dict[int, Delta] = {}
            for drawn in [await inbox.get(), *(inbox.get_nowait() for _ in range(inbox.qsize()))]:
                if drawn is None:
                    raise ClientGone
                if isinstance(drawn, EngineError):
                    raise drawn
                choice = waiting.get(drawn.uid)
                if choice is None:  # drawn before the engine heard that a stop string had come
                    continue
                choice.take(drawn, deltas.setdefault(choice.index, Delta()))
                if choice.finish or drawn.finish:
                    del waiting[drawn.uid]
                    engine.cancel([drawn.uid])
                if drawn.finish and not choice.finish:
                    uid = engine.next_uid()
                    waiting[uid] = choice
                    engine.start([choice.request(uid)], inbox)
            for index, delta in deltas.items():
                yield choices[index], delta
    finally:
        watch.cancel()
        engine.cancel(waiting)


async def _tell_when_gone(request: Request, inbox: Inbox) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    inbox.put_nowait(None)


async def _stream(
    form: Form,
    choices: Sequence[Choice],
    pieces: AsyncGenerator[tuple[Choice, Delta]],
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events. The status is long sent, so what goes wrong is an event too."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    nothing = {"usage": None} if wants_usage else {}
    try:
        for choice in choices:
            if form.is_chat:
                yield event(form.opening(choice) | nothing)
        async with contextlib.aclosing(pieces):
            async for choice, delta in pieces:
                if delta:
                    yield event(form.piece(choice, delta) | nothing)
                if choice.finish:
                    yield event(form.closing(choice) | nothing)
        if wants_usage:
            yield event(form.usage_only(choices))
    except ClientGone:
        return
    except EngineError as error:
        log.error("%s", error)
        yield event(_engine_error().body())
    yield "data: [DONE]\n\n"
