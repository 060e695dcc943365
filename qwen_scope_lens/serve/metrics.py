"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections import Counter

from qwen_scope_lens.serve.lens import Lens
from qwen_scope_lens.serve.recorder import Recorder

__all__ = ["Metrics"]

COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Of these, tokens that the prefix cache had.",
    "new_tokens": "Tokens chosen.",
    "steps": "Steps of decoding; each reads one token of every row.",
    "finished": "Replies that were finished.",
    "failed": "Replies that failed.",
    "cancelled": "Replies whose client went away.",
}
GAUGES = {
    "rows": "Replies that are being decoded.",
    "waiting": "Replies that wait.",
    "prefix_tokens": "Tokens in the prefix cache.",
}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    def __init__(self, lens: Lens, recorder: Recorder | None) -> None:
        self._lens, self._recorder = lens, recorder
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()
        self._began = time.time()

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request. `path` is a route, never what a client wrote."""
        with self._lock:
            self._requests[path, status] += 1
            place = next((i for i, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))
            self._seconds[place] += 1
            self._sum += seconds

    def text(self) -> str:
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: list[tuple[str, float]]) -> None:
            lines.append(f"# HELP qsl_{name} {about}")
            lines.append(f"# TYPE qsl_{name} {kind}")
            lines.extend(f"qsl_{name}{labels} {value:.15g}" for labels, value in values)

        engine = self._lens.engine
        for name, about in COUNTERS.items():
            add(f"{name}_total", "counter", about, [("", engine.counts[name])])
        for name, about in GAUGES.items():
            add(name, "gauge", about, [("", engine.gauges[name])])
        add("start_time_seconds", "gauge", "When the server began.", [("", self._began)])
        if self._recorder is not None:
            for name in ("recorded", "dropped"):
                about = f"Replies that the recorder has {name}."
                add(f"{name}_total", "counter", about, [("", getattr(self._recorder, name))])
        with self._lock:
            requests, seconds, total = dict(self._requests), list(self._seconds), self._sum
        rows = [
            (f'{{path="{path}",status="{status}"}}', float(count))
            for (path, status), count in sorted(requests.items())
        ]
        add("requests_total", "counter", "Requests by route and status.", rows)
        name = "qsl_request_seconds"
        lines += [f"# HELP {name} How long requests took.", f"# TYPE {name} histogram"]
        for i, most in enumerate(BUCKETS):
            lines.append(f'{name}_bucket{{le="{most:g}"}} {sum(seconds[: i + 1])}')
        lines += [f'{name}_bucket{{le="+Inf"}} {sum(seconds)}', f"{name}_sum {total:g}"]
        return "\n".join([*lines, f"{name}_count {sum(seconds)}"]) + "\n"
