"""The pipeline: missing features in, kept examples out, and a reason for every other candidate.

It works in waves. Prompts are written, rewritten adversarially, filtered, read by the model and
answered; a candidate is kept if its feature fires in the prompt (or where the recipe says). Section
6 of the Qwen-Scope report and FAC Synthesis are two recipes (`recipe.py`) of this one pipeline, and
`rounds.py` decides which feature is next. A wave is a pure function of the answers so far, so a run
that was killed repeats itself from the ledger at no cost and continues. `run.py` writes the files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, TooLittleData
from qwen_scope_lens.models.tokenize import Content
from qwen_scope_lens.synth.filters import Duplicates, check_reply, check_text
from qwen_scope_lens.synth.reader import KEPT, VANILLA, Candidate, Reader, Stage
from qwen_scope_lens.synth.recipe import Read, Recipe
from qwen_scope_lens.synth.rounds import Progress, Rounds, strongest_first
from qwen_scope_lens.synth.targets import TargetSet
from qwen_scope_lens.writers.generator import Generator, Messages, Request, clean
from qwen_scope_lens.writers.ledger import Ledger
from qwen_scope_lens.writers.templates import Templates

__all__ = ["Counts", "Synthesis"]

Counts = Literal["written", "kept"]

PROMPT_ALONE: tuple[Read, ...] = ("prompt", "none")
"""With these only the prompt is read, so that no reply is paid for where the prompt failed."""


@dataclass
class Synthesis:
    """One run. `run(budget)` carries it out; `candidates` has all candidates in order."""

    targets: TargetSet
    recipe: Recipe
    writer: Generator
    reader: Reader
    ledger: Ledger
    templates: Templates
    replier: Generator | None = None  # writes the replies; None: the writer
    judge: Generator | None = None  # checks rewrites
    caution: Mapping[FeatureRef, float] = field(default_factory=dict)
    # the highest activation of these features in any text whose prompt is not harmful
    known: Sequence[str] = ()  # texts that no candidate may repeat: seed data, benchmarks
    wave: int = 64
    candidates: list[Candidate] = field(default_factory=list)
    stopped: str = ""  # why it ended

    def __post_init__(self) -> None:
        if not self.targets.wanted:
            raise TooLittleData(
                "the seed data activates every target feature, so nothing is missing. Raise"
                " --weak-below to add weakly covered features, or widen the targets"
            )
        for ref, most in self.caution.items():
            if not math.isfinite(most):
                raise BadPlan(f"{ref} asks for caution above {most!r}: expected a finite number")
        if self.recipe.check_rewrites and self.judge is None:
            raise BadPlan("check_rewrites needs a judge: give one, or turn it off")
        self._rounds = Rounds(self.targets, self.recipe, self.templates)
        stages: tuple[Stage, ...] = ("pair", "again") if self.recipe.pairs else ("one",)
        for kind in self.recipe.kinds:  # a template that is not there is named before any call
            for stage in stages:
                self._rounds.template(kind, stage)
            if self.recipe.replies:
                self.templates[f"reply_{kind}"]
        self._seen = Duplicates(self.recipe.near_duplicates)
        for i, text in enumerate(self.known):
            self._seen.add(f"known text {i}", text)

    @property
    def chat(self) -> bool:
        """Whether examples are prompts with replies instead of texts."""
        return not self._rounds.template(self.recipe.kinds[0], "one").raw

    @property
    def kept(self) -> list[Candidate]:
        return [one for one in self.candidates if one.outcome == KEPT]

    @property
    def _progress(self) -> Mapping[FeatureRef, Progress]:
        return self._rounds.progress

    def run(
        self,
        budget: int,
        after_wave: Callable[[Synthesis], None] | None = None,
        counts: Counts = "written",
    ) -> Synthesis:
        """Write at most `budget` candidates, or with `counts="kept"` until so many are kept.

        `after_wave` sees each finished wave. Each rewrite is a candidate of its own.
        """
        if counts not in get_args(Counts):
            raise BadPlan(f"the budget counts {counts!r}: expected {' or '.join(get_args(Counts))}")
        while not self.stopped:
            used = len(self.candidates) if counts == "written" else len(self.kept)
            left = budget - used
            wave = self._rounds.plan(
                len(self.candidates), min(self.wave, left), left if counts == "written" else None
            )
            if not wave:
                what = "candidates" if counts == "written" else "kept examples"
                self.stopped = (
                    f"the budget of {budget} {what} is used"
                    if self._rounds.open
                    else "every target feature has its examples or used up its attempts"
                )
                break
            self._write([one for one in wave if one.style == VANILLA])
            self._filter_prompts([one for one in wave if one.style == VANILLA])
            rewrites = [one for one in wave if one.style != VANILLA]
            self._rewrite(rewrites)
            self._filter_prompts(rewrites)
            if self.recipe.read in PROMPT_ALONE:
                self._verify(wave)
            self._reply(wave)
            if self.recipe.read not in PROMPT_ALONE:
                self._verify(wave)
            self._fear(wave)
            self._decide(wave, left if counts == "kept" else len(wave))
            asked = [one for one in wave if one.outcome != NOT_ASKED]
            if len(asked) < len(wave):  # what the ledger has is taken also above the limit
                self.stopped = self.ledger.limit_reached
            self.candidates += asked
            if after_wave is not None:
                after_wave(self)
        return self

    # Writing.

    def _write(self, wave: list[Candidate]) -> None:
        requests = []
        for one in wave:
            template = self.templates[one.template]
            messages = template.fill(**self._words(one))
            requests.append(self._request(messages, "prompt", one, raw=template.raw, steered=True))
        for one, text in zip(wave, self._ask(self.writer, requests, wave), strict=True):
            one.prompt = text

    def _words(self, one: Candidate) -> dict[str, str]:
        progress = self._progress[one.ref]
        target, openings = progress.target, self.targets.openings
        shown = target.examples[: self.recipe.examples_shown]
        stronger, weaker = progress.pair or ("", "")
        raw = self.templates[one.template].raw
        return {
            "task": self.targets.task or "general use",
            "language": self.recipe.language or "the language of the passages",
            "description": target.description or "(no description; see the passages)",
            "examples": "\n\n".join(map(unmarked, shown))
            if raw
            else "\n".join(f"- {text}" for text in shown) or "(none)",
            "opening": openings[one.seed % len(openings)] if openings else "",
            "positive": stronger,
            "negative": weaker,
        }

    def _rewrite(self, wave: list[Candidate]) -> None:
        """Rewrite vanilla prompts, whether or not they fire: each candidate is verified alone."""
        bases = [one.base for one in wave if one.base is not None]
        for one, base in zip(wave, bases, strict=True):
            if base.unusable:
                unanswered = base.outcome.startswith(("not asked", "no answer"))
                one.outcome = base.outcome if unanswered else "its vanilla prompt is not usable"
        some = [(one, base) for one, base in zip(wave, bases, strict=True) if one.open]
        requests = [
            self._request(
                self.templates["adversarial"].fill(
                    prompt=base.prompt, style=self.templates.styles[one.style]
                ),
                "rewrite",
                one,
            )
            for one, base in some
        ]
        open_ones = [one for one, _ in some]
        for one, text in zip(open_ones, self._ask(self.writer, requests, open_ones), strict=True):
            one.prompt = text
        if not self.recipe.check_rewrites or self.judge is None:
            return
        still = [(one, base) for one, base in some if one.open]
        requests = [
            self._request(
                self.templates["judge_rewrite"].fill(prompt=base.prompt, rewrite=one.prompt),
                "judge",
                one,
            )
            for one, base in still
        ]
        judged = [one for one, _ in still]
        for one, text in zip(judged, self._ask(self.judge, requests, judged), strict=True):
            if one.open and not text.casefold().startswith("yes"):
                one.outcome = "the rewrite means something else, says the judge"

    def _filter_prompts(self, wave: list[Candidate]) -> None:
        for one in wave:
            if one.open:
                caution = one.kind != "harmful"
                one.outcome = check_text(one.prompt, self.recipe, caution)
                one.unusable = bool(one.outcome)
            else:
                one.unusable = True

    def _reply(self, wave: list[Candidate]) -> None:
        """Write replies where the recipe asks. Demonstrations get none if prompts are read."""
        if not self.recipe.replies or not self.chat:
            return
        skip = "pair" if self.recipe.read in PROMPT_ALONE else None
        wave = [one for one in wave if one.open and one.stage != skip]
        requests = [
            self._request(
                self.templates[f"reply_{one.kind}"].fill(
                    prompt=one.prompt, task=self.targets.task or "general use"
                ),
                "reply",
                one,
            )
            for one in wave
        ]
        writer = self.replier or self.writer
        for one, text in zip(wave, self._ask(writer, requests, wave), strict=True):
            one.reply = text
            if one.open:
                one.outcome = check_text(text, self.recipe, caution=True) or check_reply(
                    text, one.kind, self.templates.refusals
                )

    def _request(
        self,
        messages: Messages,
        purpose: str,
        one: Candidate,
        raw: bool = False,
        steered: bool = False,
    ) -> Request:
        sampling = self.recipe.sampling(reply=purpose == "reply")
        target = one.ref if steered else None
        return Request(messages, purpose, one.seed, sampling, raw, target)

    def _ask(
        self, generator: Generator, requests: Sequence[Request], wave: Sequence[Candidate]
    ) -> list[str]:
        """The answers. A candidate whose call failed or was forbidden has that as its outcome."""
        texts = []
        for one, completion in zip(wave, self.ledger.ask(generator, requests), strict=True):
            if completion is None:
                one.outcome = NOT_ASKED
            elif completion.error:
                one.outcome = f"no answer: {completion.error}"
            texts.append(clean(completion.text) if completion else "")
        return texts

    # Reading and deciding.

    def _text(self, one: Candidate, read: Read | None = None) -> str:
        """The words in which the feature has to fire."""
        read = read or self.recipe.read
        if read in PROMPT_ALONE:
            return one.prompt
        parts = [one.reply] if read == "reply" else [one.prompt, one.reply]
        return "\n\n".join(part for part in parts if part)

    def _document(self, one: Candidate, read: Read) -> Content:
        """What the reader gets: the words themselves, or a chat that holds them."""
        if not self.recipe.as_chat or not self.chat:
            return self._text(one, read)
        messages = one.messages(chat=True)
        return messages[:1] if read in PROMPT_ALONE else messages

    def _values(self, wave: list[Candidate], read: Read) -> list[dict[FeatureRef, float]]:
        """The activations of target and caution features, one mapping per candidate."""
        salt = f"{self.reader.identity} {self.targets.digest} {sorted(map(str, self.caution))}"
        keys = [
            hashlib.sha256(
                f"{salt} {self.recipe.as_chat} {self._text(one, read)}".encode()
            ).hexdigest()[:32]
            for one in wave
        ]
        new = dict(zip(keys, wave, strict=True))
        new = {key: one for key, one in new.items() if self.ledger.measured(key) is None}
        refs = sorted({*self.targets.refs, *self.caution})
        found = self.reader.read_features([self._document(one, read) for one in new.values()], refs)
        self.ledger.measure(
            {
                key: {str(ref): value for ref, value in fires.items()}
                for key, fires in zip(new, found, strict=True)
            }
        )
        measured: list[dict[str, Any]] = [self.ledger.measured(key) or {} for key in keys]
        return [{FeatureRef.parse(ref): v for ref, v in sorted(row.items())} for row in measured]

    def _verify(self, wave: list[Candidate]) -> None:
        wave = [one for one in wave if one.open]
        known, threshold = set(self.targets.refs), self.recipe.threshold
        for one, values in zip(wave, self._values(wave, self.recipe.read), strict=True):
            one.activation = values.get(one.ref, 0.0)
            one.fires = {ref: v for ref, v in values.items() if v > threshold and ref in known}
            if self.recipe.read != "none" and one.ref not in one.fires:
                one.outcome = "the feature does not fire"

    def _fear(self, wave: list[Candidate]) -> None:
        """Reject harmless examples that activate a caution feature in the prompt or the reply."""
        if not self.caution:
            return
        wave = [one for one in wave if one.open and one.kind != "harmful"]
        for one, values in zip(wave, self._values(wave, "either"), strict=True):
            feared = [ref for ref, most in self.caution.items() if values.get(ref, 0.0) > most]
            one.outcome = f"caution: {feared[0]} fires" if feared else ""

    def _decide(self, wave: list[Candidate], most: int) -> None:
        """Turn pairs into demonstrations and keep at most `most` of the other candidates, the
        strongest of each feature first."""
        self._find_pairs([one for one in wave if one.stage == "pair"])
        for one in strongest_first([one for one in wave if one.open], self._rounds):
            progress, rewrite = self._progress[one.ref], one.style != VANILLA
            text = "\n\n".join(filter(None, (one.prompt, one.reply)))
            if twin := self._seen.find(text):
                one.outcome = f"repeats {twin[0]} (similarity {twin[1]:.2f})"
            elif not self._rounds.wanted(progress, rewrite):
                one.outcome = "more than needed for its feature"
            elif most < 1:
                one.outcome = "more than the budget"
            else:
                one.outcome, most = KEPT, most - 1
                for ref in one.fires if self.recipe.count_others else (one.ref,):
                    if ref in self._progress:
                        self._progress[ref].kept[rewrite] += 1
                if not rewrite and progress.base is None:
                    progress.base = one
                self._seen.add(f"candidate {one.number}", text)

    def _find_pairs(self, wave: list[Candidate]) -> None:
        """Where both candidates of a round fire, the stronger is x+ and the weaker x-."""
        rounds: dict[FeatureRef, list[Candidate]] = {}
        for one in wave:
            if one.open:
                rounds.setdefault(one.ref, []).append(one)
        for ref, found in rounds.items():
            found.sort(key=lambda one: -(one.activation or 0))
            different = len({one.prompt for one in found}) > 1
            if different:
                self._progress[ref].pair = (self._text(found[0]), self._text(found[-1]))
            for one in found:
                one.outcome = "a demonstration" if different else "no second example beside it"
                self._seen.add(f"candidate {one.number}", one.prompt)


NOT_ASKED = "not asked: the spending limit is reached"


def unmarked(passage: str) -> str:
    return passage.replace("<<", "").replace(">>", "")
