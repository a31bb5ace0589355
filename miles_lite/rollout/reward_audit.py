r"""Before any training: can this reward be won, and by right answers only?

A reward that looks for an answer behind </think> scores everything 0 when the template itself
closes the think block: no signal, no error. So right, wrong, cut, unmarked and hostile answers are
written in the model's own format, and graded. A right answer must score more than saying nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from miles_lite.rollout.probes import (
    CLOSE,
    FORMS,
    MARKS,
    Kind,
    Probe,
    Thinking,
    how_it_thinks,
    probes,
)
from miles_lite.rollout.rewards import RewardWorkers
from miles_lite.types import Prompt, Verdict

PROMPTS_PER_SOURCE = 16
_TAIL_LEN = 60  # characters of a prompt shown in messages


@dataclass(frozen=True, slots=True)
class Graded:
    """Probes for one prompt with their verdicts."""

    prompt: Prompt
    probes: Sequence[Probe]
    verdicts: Sequence[Verdict]
    floor: float  # reward of an empty answer

    @property
    def best(self) -> float:
        """The highest reward of a right answer that the model can write."""
        rights = (
            verdict.reward
            for probe, verdict in zip(self.probes, self.verdicts, strict=True)
            if probe.kind is Kind.right and probe.possible and verdict.valid
        )
        return max(rights, default=self.floor)

    @property
    def can_win(self) -> bool:
        return self.best > self.floor

    def outcomes(self) -> Iterator[tuple[Probe, str]]:
        """Each probe: "won" is to score as a right answer; if none can, more than an empty one."""
        for probe, verdict in zip(self.probes, self.verdicts, strict=True):
            enough = verdict.reward >= self.best if self.can_win else verdict.reward > self.floor
            yield probe, "no verdict" if not verdict.valid else "won" if enough else "lost"


@dataclass(frozen=True, slots=True)
class Section:
    """Prompts of one source, with one reward and one way of thinking."""

    source: str
    reward: str  # name of the function
    thinking: Thinking
    graded: Sequence[Graded]

    def counts(self, *kinds: Kind) -> dict[tuple[str, bool], Counter[str]]:
        """(form, behind a marker) -> how many such probes were "won", "lost", had "no verdict"."""
        found: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
        for graded in self.graded:
            for probe, outcome in graded.outcomes():
                if probe.kind in kinds and probe.possible:
                    found[probe.form, probe.thinks][outcome] += 1
        return found

    def winning(self, kind: Kind) -> list[str]:
        """The forms of `kind` that won for some prompt."""
        return list(dict.fromkeys(form for (form, _), c in self.counts(kind).items() if c["won"]))

    @property
    def false_negatives(self) -> float:
        """Share of right answers that did not win, of the forms that this reward knows."""
        return 1 - _share_won([c for c in self.counts(Kind.right).values() if c["won"]])

    @property
    def false_positives(self) -> float:
        """Share of wrong, cut and hostile answers that won."""
        return _share_won(list(self.counts(Kind.wrong, Kind.cut, Kind.hostile).values()))

    @property
    def reasons(self) -> Counter[str]:
        """Why there was no verdict."""
        return Counter(v.reason for g in self.graded for v in g.verdicts if not v.valid)

    @property
    def hopeless(self) -> bool:
        """No right answer that the model can write wins, for any prompt."""
        return not any(graded.can_win for graded in self.graded)

    @property
    def failure(self) -> str:
        """What is wrong, and the way out. "" if right answers can win everywhere and no wrong."""
        stuck = [graded.prompt for graded in self.graded if not graded.can_win]
        if self.hopeless:
            return f"{self.source}: {self._why_hopeless(stuck[0])}"
        if stuck:
            return (
                f"{self.source}: reward {self.reward} can never be won for {len(stuck)} of "
                f"{len(self.graded)} prompts, as for {stuck[0].uid}, whose label "
                f"{stuck[0].label!r} it does not recognise even when given as the answer: take "
                "another reward, or mend the labels (label_key, label_pattern)"
            )
        if wrong := self.winning(Kind.wrong):
            return (
                f"{self.source}: reward {self.reward} pays for wrong answers ({', '.join(wrong)}) "
                "as for right ones"
            )
        return ""

    def _why_hopeless(self, prompt: Prompt) -> str:
        where = f"with this chat template (a prompt ends in {prompt.text[-_TAIL_LEN:]!r})"
        elsewhere = [
            probe
            for graded in self.graded
            for probe, outcome in graded.outcomes()
            if probe.kind is Kind.right and outcome == "won"
        ]
        if elsewhere:
            behind = elsewhere[0].thinks
            closed = "which the prompt itself has already closed"
            never = "which the model never writes: neither its tokenizer nor its template has it"
            why = (
                f"it looks for the answer behind {CLOSE}, "
                + (closed if self.thinking is Thinking.closed else never)
                if behind
                else "it does not find an answer that stands behind thinking"
            )
            return (
                f"reward {self.reward} can never be won {where}: {why}. Use function math of "
                f"rewards/math.py, or a template with thinking {'on' if behind else 'off'} "
                "(data.template_kwargs)"
            )
        tried = ", ".join(form.format(label=prompt.label) for form in FORMS.values())
        why = f" (no verdict: {', '.join(sorted(self.reasons))})" if self.reasons else ""
        return (
            f"reward {self.reward} gives a right answer no more than an empty one{why} {where}: "
            f"tried {tried}. Check the labels of the data set (label_key, label_pattern) and the "
            "reward file"
        )

    @property
    def warnings(self) -> list[str]:
        """What can work and often does not, or can be won by no work at all."""
        found = []
        paid = [key for key, count in self.counts(Kind.right).items() if count["won"]]
        if paid and self.thinking is Thinking.left and all(thinks for _, thinks in paid):
            found.append(
                f"reward {self.reward} wants {CLOSE} before the answer, but the chat template "
                "opens no think block: it stays 0 unless the model writes the markers on its own"
            )
        asked = [form for form, mark in MARKS.items() if mark in self.graded[0].prompt.text]
        forms = self.winning(Kind.right)
        if forms and asked and not set(asked) & set(forms):
            found.append(
                f"the prompts ask for {' or '.join(asked)}, but reward {self.reward} pays for "
                f"{' or '.join(forms)} only: take a reward that looks where the prompt says, or "
                "ask for what it looks for (prompt_template)"
            )
        for kind in (Kind.cut, Kind.hostile):
            if won := self.winning(kind):
                found.append(
                    f"reward {self.reward} pays for {kind.value} answers: {', '.join(won)}"
                )
        return [f"{self.source}: {warning}" for warning in found]

    def lines(self) -> Iterator[str]:
        """The matrix of verdicts, for a terminal."""
        floors = sorted({graded.floor for graded in self.graded})
        yield (
            f"{self.source}: {len(self.graded)} prompts, reward {self.reward}, the template "
            f"{self.thinking.value}; an empty answer scores {', '.join(f'{f:g}' for f in floors)}"
        )
        yield f"  {'answer':<40}{'won':>6}{'lost':>6}{'no verdict':>12}"
        for kind in Kind:
            for (form, thinks), count in self.counts(kind).items():
                behind = f", after {CLOSE}" if thinks and len(self.thinking.ways) > 1 else ""
                title = f"{kind.value:<10}{form}{behind}"
                yield f"  {title:<40}{count['won']:>6}{count['lost']:>6}{count['no verdict']:>12}"
        for reason, number in self.reasons.most_common():
            yield f"  no verdict, {number} times: {reason}"
        yield (
            f"  false negatives {self.false_negatives:.1%} of right answers as "
            f"{' or '.join(self.winning(Kind.right)) or '-'}, false positives "
            f"{self.false_positives:.1%} of wrong, cut and hostile ones"
        )


def _share_won(counts: Sequence[Counter[str]]) -> float:
    total = sum(count.total() for count in counts)
    return sum(count["won"] for count in counts) / total if total else float("nan")


async def audit(
    prompts: Sequence[Prompt],
    workers: RewardWorkers,
    knows_thinking: bool,
    kinds: Collection[Kind] = tuple(Kind),
) -> list[Section]:
    """Grade probes of `kinds` for each prompt, hostile ones for the first of each source.

    knows_thinking: as in `how_it_thinks`.
    """
    sections: dict[tuple[str, str, Thinking], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        thinking = how_it_thinks(prompt.text, knows_thinking)
        sections[prompt.uid.rpartition(":")[0], prompt.reward, thinking].append(prompt)
    mild = [kind for kind in kinds if kind is not Kind.hostile]
    return [
        Section(
            source,
            workers.function(reward),
            thinking,
            await asyncio.gather(
                *(_grade(p, workers, thinking, mild if i else kinds) for i, p in enumerate(found))
            ),
        )
        for (source, reward, thinking), found in sections.items()
    ]


async def _grade(
    prompt: Prompt, workers: RewardWorkers, thinking: Thinking, kinds: Collection[Kind]
) -> Graded:
    wanted = [probe for probe in probes(prompt, thinking) if probe.kind in kinds]
    honest = [probe for probe in wanted if probe.kind is not Kind.hostile]
    hostile = [probe for probe in wanted if probe.kind is Kind.hostile]
    # apart, as a hostile answer may cost the others of its group their verdicts
    floor, *verdicts = await workers.grade_group(prompt, ["", *(p.response for p in honest)])
    if hostile:
        verdicts += await workers.grade_group(prompt, [p.response for p in hostile])
    return Graded(prompt, honest + hostile, verdicts, floor.reward)
