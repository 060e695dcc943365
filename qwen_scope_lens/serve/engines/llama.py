"""llama.cpp's server as the engine: `llama-server`, running already or started here.

Token ids go in and come out, so chat templates, stop texts and characters are handled as for our
own engine, and the tokenizer is that of --model. A plan becomes a control vector, which the program
takes at its start: each plan has a process of its own, on the same file of weights, of which the
system keeps one copy in memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import httpx2

from qwen_scope_lens.errors import BadPlan, EngineFailed, WrongModel, WrongTokenizer
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.serve.engine import QueueFull
from qwen_scope_lens.serve.engines.abilities import LLAMA, WAY_OUT
from qwen_scope_lens.serve.engines.bytes_to_tokens import Speller
from qwen_scope_lens.serve.engines.outside import Outside
from qwen_scope_lens.serve.engines.programs import Address, Program, Programs
from qwen_scope_lens.serve.rows import Reason, Wanted
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.runtimes.control_vectors import check_gguf, to_gguf

__all__ = ["LlamaCpp", "Talk", "check_server"]

MOST_LINE, MOST_ANSWER = 1 << 20, 1 << 26
"""Bytes of one event and of one answer. A program that says more is not llama-server."""
PATIENCE = 30
"""Seconds for questions that are answered at once."""
SEEDS = 2**32 - 1  # the largest one means a random seed
PROBE = "The kernel reads 12 files.\n\n\tdef main(): 内核读取文件。 Él está aquí, naïve — 😀"
"""Both tokenizers have to make the same tokens of it."""
REASONS: dict[str, Reason] = {"eos": "stop", "word": "stop", "limit": "length"}


class Talk:
    """HTTP with one program. What it answers is checked, whatever it is."""

    def __init__(self, address: Address) -> None:
        headers = {"Accept-Encoding": "identity"}
        if address.key is not None:
            headers["Authorization"] = f"Bearer {address.key}"
        timeout = httpx2.Timeout(None, connect=10.0)
        self._client = httpx2.AsyncClient(
            base_url=address.url, headers=headers, timeout=timeout, follow_redirects=False
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, path: str, content: Any = None) -> Any:
        """The JSON that a path answers."""
        method = "GET" if content is None else "POST"
        body = bytearray()
        try:
            async with self._client.stream(method, path, json=content) as answer:
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > MOST_ANSWER:
                        raise EngineFailed(f"llama-server answers {path} without an end")
        except httpx2.HTTPError as error:
            raise EngineFailed(f"llama-server does not answer ({type(error).__name__})") from error
        found = _parsed(bytes(body), path)
        if answer.status_code != 200:
            raise _refusal(found, answer.status_code)
        return found

    async def events(self, path: str, content: Any) -> AsyncIterator[dict[str, Any]]:
        """The server-sent events of a path."""
        rest = b""
        try:
            async with self._client.stream("POST", path, json=content) as answer:
                async for part in answer.aiter_bytes():
                    rest += part
                    if answer.status_code != 200:
                        continue
                    *lines, rest = rest.split(b"\n")
                    if len(rest) > MOST_LINE:
                        raise EngineFailed("llama-server sends an event without an end")
                    for line in lines:
                        name, _, value = line.strip().partition(b":")
                        if name == b"error":
                            raise _refusal({"error": _parsed(value, path)}, 500)
                        if name == b"data" and value.strip() != b"[DONE]":
                            yield _event(_parsed(value, path))
        except httpx2.HTTPError as error:
            raise EngineFailed(f"llama-server went away ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise _refusal(_parsed(rest, path), answer.status_code)


def _parsed(content: bytes, path: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EngineFailed(
            f"what answers {path} is not JSON: expected llama.cpp's `llama-server` there"
        ) from error


def _event(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise EngineFailed("llama-server sends an event that is not an object")
    if "error" in found:
        raise _refusal(found, 500)
    return found


def _refusal(found: Any, status: int) -> EngineFailed:
    error = found.get("error") if isinstance(found, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    return EngineFailed(f"llama-server refused ({status}): {str(said)[:300]}")


def _number(found: Any, *names: str) -> int:
    """A whole number inside an answer."""
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, bool) or not isinstance(found, int):
        raise EngineFailed(f"llama-server does not say {'.'.join(names)}: found {found!r:.40}")
    return found


class LlamaCpp(Outside):
    """Replies from llama.cpp. `programs` starts one for each plan; `Address` is one that runs."""

    abilities = LLAMA

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        d_model: int,
        source: Programs | Address,
        sae_of: Callable[[str], LayerSAE],
        **limits: Any,
    ) -> None:
        super().__init__(tokenizer, ends, 0, **limits)
        self._source, self._sae_of = source, sae_of
        self._speller = Speller(self.vocabulary)
        self._talks: dict[str, Talk] = {}
        self._opening = asyncio.Lock()
        try:
            self.context = self.waited(self._look(tokenizer, d_model))
        except BaseException:
            self.close()
            raise

    async def _look(self, tokenizer: Tokenizer, d_model: int) -> int:
        talk = await self._talk(None)
        try:
            async with asyncio.timeout(PATIENCE):
                return await check_server(talk, tokenizer, d_model)
        except TimeoutError:
            raise EngineFailed(f"llama-server did not answer within {PATIENCE} s") from None

    def check_places(self, plan: Plan) -> None:
        if isinstance(self._source, Address):
            raise BadPlan(
                "this llama-server runs already, and takes a control vector only at its start:"
                " let `qsl serve` start it (--engine llama.cpp=PROGRAM --gguf FILE), or"
                f" {WAY_OUT}"
            )
        check_gguf(plan)

    async def shut(self) -> None:
        for talk in self._talks.values():
            await talk.close()
        if isinstance(self._source, Programs):
            await asyncio.to_thread(self._source.close)

    async def _talk(self, plan: Plan | None) -> Talk:
        """The connection to the program that runs under this plan, which is started if need be."""
        if isinstance(self._source, Address):
            address, key = self._source, ""
            return self._talks.setdefault(key, Talk(address))
        found = self._source.running(plan)
        if found is not None and found.address.url in self._talks:  # nobody waits for another plan
            return self._talks[found.address.url]
        async with self._opening:
            found = self._source.running(plan)
            if found is None:
                if not self._source.room():
                    raise QueueFull(
                        f"{self._source.most} llama-servers with other plans are busy: ask again"
                        " later, or start `qsl serve` with more --engine-processes"
                    )
                found = await asyncio.to_thread(self._source.start, plan, self._vector)
                for url in set(self._talks) - self._source.urls:
                    await self._talks.pop(url).close()
            if found.address.url not in self._talks:  # whoever began to wait for it may have gone
                await self._ready(found)
                self._talks[found.address.url] = Talk(found.address)
            return self._talks[found.address.url]

    def _vector(self, plan: Plan, path: Path) -> Path:
        saes = {str(ref.sae): self._sae_of(str(ref.sae)) for ref in plan.refs}
        return to_gguf(plan, path, saes)

    async def _ready(self, program: Program) -> None:
        talk, until = Talk(program.address), time.monotonic() + self.seconds
        try:
            while True:
                program.check()
                if time.monotonic() > until:
                    await asyncio.to_thread(program.end)
                    raise EngineFailed(f"llama-server was not ready within {self.seconds:g} s")
                try:
                    async with asyncio.timeout(PATIENCE):
                        await talk.ask("/health")
                        return
                except (EngineFailed, TimeoutError):  # it does not listen yet, or loads the model
                    await asyncio.sleep(0.1)
        finally:
            await talk.close()

    async def tokens(self, wanted: Wanted) -> AsyncGenerator[int | Reason, None]:
        plan = wanted.plan
        talk = await self._talk(plan)
        with self._busy(plan):
            answers = self._streamed if wanted.streams else self._whole
            async for token in answers(talk, wanted):
                yield token

    def _busy(self, plan: Plan | None) -> AbstractContextManager[None]:
        return self._source.busy(plan) if isinstance(self._source, Programs) else nullcontext()

    async def _whole(self, talk: Talk, wanted: Wanted) -> AsyncIterator[int | Reason]:
        found = await talk.ask("/completion", _body(wanted))
        tokens = found.get("tokens") if isinstance(found, dict) else None
        reason = REASONS.get(str(found.get("stop_type"))) if isinstance(found, dict) else None
        if not isinstance(tokens, list) or reason is None:
            raise EngineFailed("llama-server answered without `tokens` and `stop_type`")
        if found["stop_type"] == "eos":
            tokens = tokens[:-1]
        for token in tokens:
            yield _token(token)
        yield reason

    async def _streamed(self, talk: Talk, wanted: Wanted) -> AsyncIterator[int | Reason]:
        seen = 0
        held: list[int] = []  # a special token may be the end, which is not a part of the reply
        async for event in talk.events("/completion", _body(wanted)):
            if event.get("stop"):
                reason = REASONS.get(str(event.get("stop_type")))
                if reason is None:
                    break
                if event["stop_type"] != "eos":
                    for token in held:
                        yield token
                yield reason
                return
            count, tokens, text = (
                event.get(key) for key in ("tokens_predicted", "tokens", "content")
            )
            if not tokens:
                continue  # the beginning, before there is a token
            if not isinstance(tokens, list) or not isinstance(text, str):
                raise EngineFailed("llama-server sends an event without `tokens` and `content`")
            last, hidden = _token(tokens[-1]), _number({"n": count}, "n") - seen - 1
            seen += hidden + 1
            known = [*held, *(self._spelled(text, last, hidden) if hidden else ())]
            held = [last] if last in self.special else []
            for token in known if held else [*known, last]:
                yield token
        raise EngineFailed("llama-server ended a stream without a reason")

    def _spelled(self, text: str, last: int, hidden: int) -> list[int]:
        """The tokens that the stream has left out before the last one."""
        ours, spelled = self.vocabulary.bytes_of(last) or b"", text.encode("utf-8", "replace")
        found = None
        if spelled.endswith(ours):
            found = self._speller.tokens(spelled[: len(spelled) - len(ours)], hidden)
        if found is None:
            raise EngineFailed(
                f"llama-server wrote {text!r:.40} with {hidden + 1} tokens that the tokenizer of"
                " --model does not have: it runs another model"
            )
        return found


def _body(wanted: Wanted) -> dict[str, Any]:
    """A request, with every sampler off that would change the reply without being asked for."""
    greedy = wanted.temperature == 0
    samplers = {"samplers": ["top_k"], "top_k": 1}
    if not greedy:
        samplers = {
            "samplers": ["temperature", "top_p"],
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": 0,
        }
    return {
        "prompt": list(wanted.prompt),
        "n_predict": wanted.new_tokens,
        "seed": wanted.seed % SEEDS,
        "stop": [] if wanted.streams else list(wanted.stop),
        "stream": wanted.streams,
        "return_tokens": True,
        **samplers,
    }


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EngineFailed(f"llama-server wrote {value!r:.40} in place of a token")
    return value


async def check_server(talk: Talk, tokenizer: Tokenizer, d_model: int) -> int:
    """Refuse a program that runs another model. Its context, in tokens per request."""
    models = await talk.ask("/v1/models")
    data = models.get("data") if isinstance(models, dict) else None
    if not isinstance(data, list) or len(data) != 1:
        raise EngineFailed("llama-server serves no model or several: expected one")
    width = _number(data[0], "meta", "n_embd")
    if width != d_model:
        raise WrongModel(
            f"llama-server runs a model of width {width}; --model has {d_model}: expected the same"
            " model"
        )
    if _number(data[0], "meta", "n_vocab") < len(tokenizer):
        raise WrongTokenizer(
            f"llama-server knows {data[0]['meta']['n_vocab']} tokens; the tokenizer of --model has"
            f" {len(tokenizer)}: expected a GGUF file of the same model"
        )
    theirs = await talk.ask("/tokenize", {"content": PROBE})
    ours = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if not isinstance(theirs, dict) or theirs.get("tokens") != list(ours):
        raise WrongTokenizer(
            "llama-server makes other tokens of a text than the tokenizer of --model: expected a"
            " GGUF file of the same model"
        )
    props = await talk.ask("/props")
    return _number(props, "default_generation_settings", "n_ctx")
