"""From the body of a completion request to what the engine is asked for."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadText, ScopeError
from qwen_scope_lens.models.tokenize import encode, render_chat
from qwen_scope_lens.serve.engines.abilities import WAY_OUT
from qwen_scope_lens.serve.faults import Fault, fault_of
from qwen_scope_lens.serve.fields import Fields, checked, flag, listed, number, text, whole
from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.plans import Plans
from qwen_scope_lens.serve.rows import Wanted
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.where import shown

__all__ = ["MOST", "Asked", "Watching", "chat_text", "completion", "messages_of", "watching"]

MOST = {"edits": 64, "monitor": 64, "n": 16, "top": 50, "prompts": 256, "layers": 16}

IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
"""Fields that do not change what is written."""
DEFAULT_TOKENS = {False: 16, True: 512}  # chat: is it one?


@dataclass(frozen=True)
class Watching:
    """Which activations come back with the tokens."""

    monitor: tuple[FeatureRef, ...] = ()
    explain: tuple[int, ...] = ()  # layers
    top: int = 5

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({*self.explain, *(ref.layer for ref in self.monitor)}))


@dataclass(frozen=True)
class Asked:
    """A completion request. Choice i of prompt p is number `p * n + i` of `wanted`."""

    chat: bool
    model: str
    wanted: tuple[Wanted, ...]
    prompts: tuple[str | None, ...]  # as text, where they were given so
    plan: Plan | None
    plan_name: str | None
    watching: Watching
    echo: bool
    stream: bool
    include_usage: bool
    tools: tuple[Mapping[str, Any], ...]


def completion(content: Any, lens: Lens, plans: Plans, chat: bool) -> Asked:
    """Check a request wholly. Raises `Fault`."""
    fields = Fields(content)
    fields.ignore(*IGNORED)
    model = fields.take("model", text, lens.name)
    named = lens.plan_in(model)
    if named is None or (named and named not in plans):
        raise Fault(
            f"there is no model {shown(model)}: see /v1/models", "model_not_found", "model", 404
        )
    _only_obeyed(fields)
    plan, plan_name = _plan(fields, lens, plans, named or None)
    seen = watching(fields, lens)
    n = fields.take("n", whole(1, MOST["n"]), 1)
    stop = fields.take("stop", listed(_stop, 4), [])
    temperature = fields.take("temperature", number(0, 1e6), 1.0)
    top_p = fields.take("top_p", number(0, 1, above=True), 1.0)
    seed = fields.take("seed", whole(0, 2**63), None)
    seed = secrets.randbelow(2**31) if seed is None else seed
    stream = fields.take("stream", flag, False)
    options = Fields(fields.take("stream_options", dict, {}))
    include_usage = options.take("include_usage", flag, False)
    options.done()
    tools: tuple[Mapping[str, Any], ...] = ()
    echo, top_logprobs = False, None
    if chat:
        prompt, tools = _chat(fields, lens)
        prompts: list[Any] = [prompt]
        if fields.take("logprobs", flag, False):
            top_logprobs = fields.take("top_logprobs", whole(0, 20), 0)
        fields.only("top_logprobs", why="it needs `logprobs: true`")
    else:
        prompts = _prompts(fields.need("prompt", lambda value: value))
        top_logprobs = fields.take("logprobs", whole(0, 20), None)
        echo = fields.take("echo", flag, False)
    abilities = lens.engine.abilities
    if top_logprobs is not None and not abilities.logprobs:
        raise Fault(
            f"the engine {abilities.engine} tells no log probabilities of every token: leave"
            f" `logprobs` out, or {WAY_OUT}",
            "unsupported",
            "logprobs",
        )
    ids = _tokens(prompts, lens)
    most = fields.take("max_completion_tokens", whole(1, 2**31)) if chat else None
    limit = fields.take("max_tokens", whole(0 if echo else 1, 2**31), None)
    fields.done()
    limit = limit if most is None else most
    wanted = []
    for prompt_ids in ids:
        room = lens.engine.context - len(prompt_ids)
        if room < (limit or 1):
            raise Fault(
                f"the prompt has {len(prompt_ids)} tokens and {limit or 1} are to follow; the"
                f" context of {lens.name} is {lens.engine.context}",
                "context_length_exceeded",
                "messages" if chat else "prompt",
            )
        wanted += [
            Wanted(
                prompt_ids,
                min(DEFAULT_TOKENS[chat], room) if limit is None else limit,
                temperature,
                top_p,
                (seed + i) % 2**63,
                tuple(stop),
                plan,
                seen.layers,
                top_logprobs,
                echo and top_logprobs is not None,
                stream,
            )
            for i in range(n)
        ]
    texts = tuple(one if isinstance(one, str) else None for one in prompts)
    return Asked(
        chat,
        model,
        tuple(wanted),
        texts,
        plan,
        plan_name,
        seen,
        echo,
        stream,
        include_usage,
        tools,
    )


def watching(fields: Fields, lens: Lens) -> Watching:
    """`monitor` and `explain`."""
    monitor = fields.take("monitor", listed(lens.ref, MOST["monitor"]), [])
    asked = fields.take("explain", _explain, None)
    if monitor or asked:
        _ = lens.reader  # refused where there is no model
    if not asked:
        return Watching(tuple(monitor))
    inner = Fields(asked)
    top = inner.take("top", whole(1, MOST["top"]), 5)
    layers = inner.take("layers", listed(lens.layer, MOST["layers"], 1), list(lens.layers))
    inner.done()
    return Watching(tuple(monitor), tuple(dict.fromkeys(layers)), top)


def _explain(value: Any) -> Any:
    if isinstance(value, bool):
        return {"top": 5} if value else {}
    if not isinstance(value, Mapping):
        raise ValueError('expected true or {"top": 5, "layers": [4]}')
    return value or {"top": 5}


def _only_obeyed(fields: Fields) -> None:
    cannot = "this server cannot do that, and leaving it out would change the reply"
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, 0, why=cannot)
    fields.only("logit_bias", {}, why=cannot)
    fields.only("response_format", {"type": "text"}, why=cannot)
    fields.only("best_of", 1, why=cannot)
    fields.only("suffix", "", why=cannot)
    fields.only("functions", [], why="use `tools`")


def _plan(
    fields: Fields, lens: Lens, plans: Plans, of_model: str | None
) -> tuple[Plan | None, str | None]:
    if not fields.given("plan"):
        name = of_model or plans.default
        return (None, None) if name is None else (plans[name], name)
    if of_model is not None:
        raise Fault(f"the model's name has the plan {of_model}: leave `plan` out", param="plan")
    return fields.take("plan", lambda value: plans.of(value, lens), (None, None))


def _stop(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > 1000:
        raise ValueError("expected a text of 1 to 1,000 characters, or up to 4 of them")
    return value


def _prompts(value: Any) -> list[Any]:
    """A text, token ids, or a list of either."""
    many = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts = value if many else [value]
    if len(prompts) > MOST["prompts"]:
        raise Fault(f"{len(prompts)} prompts: at most {MOST['prompts']}", param="prompt")
    return list(prompts)


def _tokens(prompts: Sequence[Any], lens: Lens) -> list[tuple[int, ...]]:
    for prompt in prompts:
        if isinstance(prompt, list):
            _check_ids(prompt, lens)
        elif not isinstance(prompt, str):
            raise Fault(
                f"a prompt is {shown(prompt)}: expected a text or token ids", param="prompt"
            )
    try:
        found = encode(prompts, lens.tokenizer, limit=lens.engine.context, truncate=False)
    except BadText as error:
        code = "context_length_exceeded" if "the limit is" in str(error) else "bad_text"
        raise Fault(str(error), code, "prompt") from error
    return [one.ids for one in found]


def _check_ids(ids: list[Any], lens: Lens) -> None:
    known = len(lens.vocabulary)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < known:
            raise Fault(f"token {shown(token)}: expected ids from 0 to {known - 1}", param="prompt")


def _chat(fields: Fields, lens: Lens) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    messages = messages_of(fields.need("messages", list))
    tools = fields.take("tools", listed(_tool, 128), None)
    choice = fields.take("tool_choice", text, "auto")
    if choice not in ("auto", "none"):
        raise Fault(
            f"`tool_choice` is {shown(choice)}: expected auto or none", "unsupported", "tool_choice"
        )
    tools = None if choice == "none" else tools
    inner = Fields(fields.take("chat_template_kwargs", dict, {}))
    thinking = inner.take("enable_thinking", flag, None)
    inner.done()
    thinking = fields.take("enable_thinking", flag, True if thinking is None else thinking)
    return chat_text(messages, lens, thinking, tools), tuple(tools or ())


def chat_text(
    messages: Sequence[Mapping[str, Any]], lens: Lens, thinking: bool, tools: Any = None
) -> str:
    """The text that the chat template makes, up to where the reply begins."""
    try:
        return render_chat(messages, lens.tokenizer, thinking, True, "the request", tools)
    except ScopeError as error:
        raise fault_of(error, "messages") from error


def messages_of(messages: Any) -> list[dict[str, Any]]:
    """OpenAI's messages as templates want them: content is text, arguments of calls are objects."""
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Fault(
                f"{shown(message)} is not a message: expected role and content", param="messages"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(checked("messages", part, _part) for part in content)
        if content is not None and not isinstance(content, str):
            raise Fault(f"content {shown(content)}: expected a text", param="messages")
        calls = [checked("messages", call, _call) for call in message.get("tool_calls") or ()]
        kept = {
            key: value for key, value in message.items() if key not in ("content", "tool_calls")
        }
        found.append({**kept, "content": content or "", **({"tool_calls": calls} if calls else {})})
    return found


def _part(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise ValueError("expected text: this server reads no pictures and no sound")
    return text(part.get("text"))


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError("expected a tool call with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # then the template shows it as it is
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        raise ValueError("expected tools of the type function")
    return dict(tool)
