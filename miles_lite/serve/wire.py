"""What a client may ask, in OpenAI's words, and errors in OpenAI's form.

A parameter that is unknown, or known and not served, is refused with its name. What OpenAI has and
we have not may be sent with the value that means "off".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from miles_lite.log import printable

MAX_CHOICES = 128
MAX_ANSWERS = 1024  # of one request, to all of its prompts
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions

# parameters that are not served -> values that ask for nothing; null always asks for nothing
_OFF: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
# for OpenAI's books only
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


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
    param = ".".join(printable(str(part)) for part in fault["loc"][1:])
    if "param" in fault.get("ctx", {}):
        param = fault["ctx"]["param"]
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param!r}", param, "unknown_parameter")
    code = fault["type"] if fault["type"].startswith("unsupported") else "invalid_value"
    return ApiError(400, f"{param or 'body'}: {fault['msg']}", param or None, code)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {name: value for name, value in raw.items() if value is not None}


class StreamOptions(_Strict):
    include_usage: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    name: str
    arguments: str


class PastCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str = ""
    reasoning_content: str = ""
    tool_calls: list[PastCall] = []
    tool_call_id: str = ""


class Function(_Strict):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class _Ask(_Strict):
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
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=16)  # or one string
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _served(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        for name, off in _OFF.items():
            if raw.get(name) is not None and raw[name] not in off:
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "not served here; leave it out or send {off}",
                    {"param": name, "off": repr(off[0])},
                )
        kept = {n: value for n, value in raw.items() if n not in _OFF and n not in _IGNORED}
        if isinstance(kept.get("stop"), str):
            kept["stop"] = [kept["stop"]]
        return kept


class ChatAsk(_Ask):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    # as SGLang has them
    chat_template_kwargs: dict[str, Any] = {}
    separate_reasoning: bool = True
    # ours: thinking tokens, after which thinking is ended for the model
    thinking_budget: int | None = Field(None, ge=0)


class CompletionAsk(_Ask):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
