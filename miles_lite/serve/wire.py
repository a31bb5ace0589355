"""What a client may ask, in OpenAI's words, and errors in OpenAI's form.

A parameter that is unknown, or known and not served, is refused with its name. What OpenAI has and
we have not may be sent with the value that means "off".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from miles_lite.log import printable

MAX_CHOICES = 128
MAX_ANSWERS = 1024  # of one request, to all of its prompts
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error"}
        ours = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, ours),
                "param": self.param,
                "code": self.code or None,
            }
        }


def error_of(faults: list[Any]) -> ApiError:
    """The first of pydantic's errors of a request body."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="json_invalid")
    named = [fault["ctx"]["param"]] if "param" in fault.get("ctx", {}) else []
    param = ".".join(printable(str(part)) for part in [*fault["loc"][1:], *named])
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param!r}", param, "unknown_parameter")
    code = fault["type"] if fault["type"].startswith("unsupported") else "invalid_value"
    return ApiError(400, f"{param or 'body'}: {fault['msg']}", param or None, code)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    # parameters that are not served -> values that ask for nothing; null always asks for nothing
    off: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # what asks nothing of us, whatever it is
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _served(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept = {n: v for n, v in raw.items() if v is not None and n not in cls.ignored}
        for name, values in cls.off.items():
            if name in kept and kept.pop(name) not in values:
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "not served here; leave it out or send {off}",
                    {"param": name, "off": json.dumps(values[0])},
                )
        return kept


class StreamOptions(_Strict):
    off = {"include_obfuscation": (False,)}

    include_usage: bool = False


def _one(make: Callable[[str], Any]) -> BeforeValidator:
    """A text may stand for a list of one."""
    return BeforeValidator(lambda raw: [make(raw)] if isinstance(raw, str) else raw)


class TextPart(_Strict):
    ignored = ("prompt_cache_breakpoint",)

    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    ignored = ("parsed_arguments",)  # the client's own

    name: str
    arguments: str


class PastCall(_Strict):
    ignored = ("index",)  # of a stream

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    ignored = ("annotations",)  # of a reply that is sent back

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], _one(lambda text: {"type": "text", "text": text})] = []
    name: str = ""
    reasoning_content: str = ""
    tool_calls: list[PastCall] = []
    tool_call_id: str = ""


class Function(_Strict):
    ignored = ("strict",)  # nothing is promised of the arguments

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class _Ask(_Strict):
    off = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "response_format": ({"type": "text"},),
        "functions": ([],),
        "function_call": ("auto", "none"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "echo": (False,),
        "best_of": (1,),
        "suffix": ("",),
        # SGLang's and vLLM's
        "min_p": (0,),
        "min_tokens": (0,),
        "repetition_penalty": (1,),
        "stop_token_ids": ([],),
    }
    # for OpenAI's books only
    ignored = (
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention",
    )  # fmt: skip

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    # SGLang's and vLLM's; 0 and -1 keep all
    top_k: int = Field(0, ge=-1)
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], _one(str)] = Field([], max_length=16)
    max_tokens: int | None = Field(None, ge=1)


class ChatAsk(_Ask):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    # as SGLang has them
    chat_template_kwargs: dict[str, Any] = {}
    separate_reasoning: bool = True
    # ours: thinking tokens, after which thinking is ended for the model
    thinking_budget: int | None = Field(None, ge=0)


class CompletionAsk(_Ask):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
