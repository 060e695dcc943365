"""The pipeline: missing features in, kept examples out, with a reason for everything else.

In waves: prompts are written, some rewritten, replies given, texts filtered, read again by the
model and kept if the feature fires. Section 6 of the Qwen-Scope report and FAC Synthesis are two
recipes (`recipe.py`) of this one way. A wave is a pure function of the answers so far, so a run
that was killed repeats itself from the ledger at no cost and goes on. Files are `output.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadPlan, TooLittleData
from qwen_scope_lens.models.tokens import Document
from qwen_scope_lens.synthesis.candidate import KEPT, Candidate, Stage
from qwen_scope_lens.synthesis.duplicates import Duplicates
from qwen_scope_lens.synthesis.filters import check_reply, check_text, clean
from qwen_scope_lens.synthesis.generator import Generator, Messages, Request
from qwen_scope_lens.synthesis.ledger import Ledger
from qwen_scope_lens.synthesis.reader import Reader
from qwen_scope_lens.synthesis.recipe import Recipe
from qwen_scope_lens.synthesis.targets import Target, TargetSet
from qwen_scope_lens.synthesis.templates import Template, Templates

__all__ = ["Synthesis"]

VANILLA = "vanilla"


@dataclass
class Progress:
    """What has been done for one feature."""

    target: Target
    place: int  # among the wanted ones
    attempts: int = 0
    kept: int = 0
    pair: tuple[str, str] | None = None  # x+ and x-


@dataclass
class Synthesis:
    """One run. `run(budget)` does it; `candidates` are all of them, in order."""

    targets: TargetSet
    recipe: Recipe
    writer: Generator
    reader: Reader
    ledger: Ledger
    templates: Templates
    replier: Generator | None = None  # writes the replies; None: the writer
    judge: Generator | None = None  # checks rewrites
    caution: Mapping[FeatureRef, float] = field(default_factory=dict)
    # features that no text may activate above a value, unless its prompt is a harmful one
    known: Sequence[str] = ()  # texts that nothing may repeat: seed data, benchmarks
    wave: int = 64
    candidates: list[Candidate] = field(default_factory=list)
    stopped: str = ""  # why it ended

    def __post_init__(self) -> None:
        self._progress = {
            target.ref: Progress(target, i) for i, target in enumerate(self.targets.wanted)
        }
        if not self._progress:
            raise TooLittleData(
                "the seed data activates every target feature: nothing is missing. Raise"
                " --weak-below to strengthen weakly covered ones, or widen the targets"
            )
        if self.recipe.check_rewrites and self.judge is None:
            raise BadPlan("check_rewrites needs a judge: give one, or turn it off")
        for kind in self.recipe.kinds:  # a template that is not there is named before any call
            for stage in ("pair", "again") if self.recipe.pairs else ("one",):
                self._template(kind, stage)
            if self.recipe.replies:
                self.templates[f"reply_{kind}"]
        self._seen = Duplicates(self.recipe.near_duplicates)
        for i, text in enumerate(self.known):
            self._seen.add(f"known text {i}", text)

    @property
    def chat(self) -> bool:
        """Whether examples are prompts with replies, and not texts."""
        return not self._template(self.recipe.kinds[0], "one").raw

    @property
    def kept(self) -> list[Candidate]:
        return [one for one in self.candidates if one.outcome == KEPT]

    def run(self, budget: int, after_wave: Callable[[Synthesis], None] | None = None) -> Synthesis:
        """Write at most `budget` candidates; `after_wave` sees each finished wave."""
        while not self.stopped:
            wave = self._plan(budget - len(self.candidates))
            if not wave:
                open_ones = any(self._wants(one) for one in self._progress.values())
                self.stopped = (
                    f"the budget of {budget} candidates is used" if open_ones
                    else "every target feature has its examples or used up its attempts"
                )  # fmt: skip
                break
            self._write(wave)
            self._rewrite([one for one in wave if one.style != VANILLA])
            self._filter_prompts(wave)
            if self.recipe.read == "prompt":
                self._measure(wave)
            self._reply(wave)
            if self.recipe.read != "prompt":
                self._measure(wave)
            self._decide(wave)
            asked = [one for one in wave if one.outcome != NOT_ASKED]
            if len(asked) < len(wave):  # what the ledger has is taken also above the limit
                self.stopped = self.ledger.limit_reached
            self.candidates += asked
            if after_wave is not None:
                after_wave(self)
        return self

    # Who is next.

    def _wants(self, one: Progress) -> bool:
        recipe = self.recipe
        return one.kept < recipe.per_feature and one.attempts < recipe.attempts

    def _plan(self, left: int) -> list[Candidate]:
        """The next wave: features with the fewest attempts first, then in the order wanted."""
        waiting = [one for one in self._progress.values() if self._wants(one)]
        waiting.sort(key=lambda one: (one.attempts, one.place))
        wave: list[Candidate] = []
        size = min(self.wave, left)
        for one in waiting:
            if len(wave) + self.recipe.candidates > size and (
                wave or left < self.recipe.candidates
            ):
                break
            start = len(self.candidates) + len(wave)
            wave += [self._candidate(one, start + i, i) for i in range(self.recipe.candidates)]
            one.attempts += 1
        return wave

    def _candidate(self, one: Progress, number: int, sample: int) -> Candidate:
        turn = one.place + one.attempts
        kind, rewritten = self.recipe.types[turn % len(self.recipe.types)]
        styles = list(self.templates.styles)
        style = styles[turn // len(self.recipe.types) % len(styles)] if rewritten else VANILLA
        stage: Stage = "one" if not self.recipe.pairs else "again" if one.pair else "pair"
        seed = _seed(self.recipe.seed, one.target.ref, one.attempts, sample)
        template = self._template(kind, stage).name
        return Candidate(
            number, one.target.ref, kind, style, stage, one.attempts, sample, seed, template
        )

    def _template(self, kind: str, stage: Stage) -> Template:
        base = self.recipe.template
        if stage == "again":
            return self.templates[f"{base}_pair"]
        special = f"{base}_{kind}"
        return self.templates[special if special in self.templates else base]

    # Writing.

    def _write(self, wave: list[Candidate]) -> None:
        requests = []
        for one in wave:
            template = self.templates[one.template]
            messages = template.fill(**self._values(one))
            requests.append(self._request(messages, "prompt", one, raw=template.raw, steered=True))
        for one, text in zip(wave, self._ask(self.writer, requests, wave), strict=True):
            one.prompt = text

    def _values(self, one: Candidate) -> dict[str, str]:
        progress = self._progress[one.ref]
        target, openings = progress.target, self.targets.openings
        shown = target.examples[: self.recipe.examples_shown]
        stronger, weaker = progress.pair or ("", "")
        raw = self.templates[one.template].raw
        return {
            "task": self.targets.task or "general use",
            "language": self.recipe.language or "the language of the passages",
            "description": target.description or "(no description; see the passages)",
            "examples": "\n\n".join(map(unmarked, shown)) if raw
            else "\n".join(f"- {text}" for text in shown) or "(none)",
            "opening": openings[one.seed % len(openings)] if openings else "",
            "positive": stronger,
            "negative": weaker,
        }  # fmt: skip

    def _rewrite(self, wave: list[Candidate]) -> None:
        wave = [one for one in wave if one.open]
        before = [one.prompt for one in wave]
        requests = [
            self._request(
                self.templates["adversarial"].fill(
                    prompt=one.prompt, style=self.templates.styles[one.style]
                ),
                "rewrite",
                one,
            )
            for one in wave
        ]
        for one, text in zip(wave, self._ask(self.writer, requests, wave), strict=True):
            one.prompt = text
        if not self.recipe.check_rewrites or self.judge is None:
            return
        still = [(one, old) for one, old in zip(wave, before, strict=True) if one.open]
        requests = [
            self._request(
                self.templates["judge_rewrite"].fill(prompt=old, rewrite=one.prompt), "judge", one
            )
            for one, old in still
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

    def _reply(self, wave: list[Candidate]) -> None:
        """Replies, where the recipe wants them; demonstrations go without if prompts are read."""
        if not self.recipe.replies or not self.chat:
            return
        skip = "pair" if self.recipe.read == "prompt" else None
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
        """The texts; a candidate whose call failed or was not allowed is closed."""
        texts = []
        for one, completion in zip(wave, self.ledger.ask(generator, requests), strict=True):
            if completion is None:
                one.outcome = NOT_ASKED
            elif completion.error:
                one.outcome = f"no answer: {completion.error}"
            texts.append(clean(completion.text) if completion else "")
        return texts

    # Reading and deciding.

    def _text(self, one: Candidate) -> str:
        """The words that have to activate the feature."""
        parts = {"prompt": [one.prompt], "reply": [one.reply], "example": [one.prompt, one.reply]}
        return "\n\n".join(part for part in parts[self.recipe.read] if part)

    def _document(self, one: Candidate) -> Document:
        """What the reader gets: the words, or the chat that they stand in."""
        if not self.recipe.as_chat or not self.chat:
            return self._text(one)
        messages = one.messages(chat=True)
        return messages[:1] if self.recipe.read == "prompt" else messages

    def _measure(self, wave: list[Candidate]) -> None:
        wave = [one for one in wave if one.open]
        salt = f"{self.reader.identity} {self.targets.digest} {sorted(map(str, self.caution))}"
        keys = {}
        for one in wave:
            text = f"{salt} {self.recipe.as_chat} {self._text(one)}"
            keys[one.number] = hashlib.sha256(text.encode()).hexdigest()[:32]
        new = {keys[one.number]: one for one in wave}
        new = {key: one for key, one in new.items() if self.ledger.measured(key) is None}
        refs = sorted({*self.targets.refs, *self.caution})
        found = self.reader.read_features([self._document(one) for one in new.values()], refs)
        self.ledger.measure(
            {
                key: {str(ref): value for ref, value in fires.items()}
                for key, fires in zip(new, found, strict=True)
            }
        )
        known = set(self.targets.refs)
        for one in wave:
            measured = self.ledger.measured(keys[one.number]) or {}
            values = {FeatureRef.parse(ref): value for ref, value in sorted(measured.items())}
            one.activation = values.get(one.ref, 0.0)
            threshold = self.recipe.threshold
            one.fires = {ref: v for ref, v in values.items() if v > threshold and ref in known}
            if one.ref not in one.fires:
                one.outcome = "the feature does not fire"
            elif one.kind != "harmful":
                feared = [ref for ref, most in self.caution.items() if values.get(ref, 0.0) > most]
                one.outcome = f"caution: {feared[0]} fires" if feared else ""

    def _decide(self, wave: list[Candidate]) -> None:
        """Strongest first within a feature: pairs become demonstrations, the rest is kept."""
        self._find_pairs([one for one in wave if one.stage == "pair"])
        order = sorted((one for one in wave if one.open), key=lambda one: -(one.activation or 0))
        for one in sorted(order, key=lambda one: self._progress[one.ref].place):
            progress = self._progress[one.ref]
            text = "\n\n".join(filter(None, (one.prompt, one.reply)))
            if twin := self._seen.find(text):
                one.outcome = f"repeats {twin[0]} (similarity {twin[1]:.2f})"
            elif progress.kept >= self.recipe.per_feature:
                one.outcome = "more than needed for its feature"
            else:
                one.outcome = KEPT
                for ref in one.fires if self.recipe.count_others else (one.ref,):
                    if ref in self._progress:
                        self._progress[ref].kept += 1
                self._seen.add(f"candidate {one.number}", text)

    def _find_pairs(self, wave: list[Candidate]) -> None:
        """Both of a round have to fire; the stronger is x+, the weaker x-."""
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


def _seed(seed: int, ref: FeatureRef, attempt: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed} {ref} {attempt} {sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
