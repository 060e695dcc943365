"""A writer that answers at once with what a function says, in place of a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_scope_lens.writers import Request
from qwen_scope_lens.writers.generator import Book, Completion


class Scripted:
    """Keeps the requests that it was asked."""

    def __init__(self, say: Callable[[Request], str], name: str = "scripted") -> None:
        self.say, self.name, self.requests = say, name, list[Request]()

    def generate(self, requests: Sequence[Request], book: Book) -> None:
        for number, request in enumerate(requests):
            if not book.start(number):
                return
            self.requests.append(request)
            book.finish(number, Completion(self.say(request), "stop", 10, 5))
