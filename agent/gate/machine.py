"""The gate's order of things. ``next`` says what to run and what is decided; ``told`` takes what came of a run."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

from agent import evidence
from agent.gate import design
from agent.gate.batch import Batch
from agent.gate.beliefs import Candidate
from agent.gate.book import Book
from agent.gate.proof import Numbers, Pair, Proof
from agent.gate.words import Ask, Draw, Failed, Gear, Outcome, Pause, Ruling, Settings, Stage

INFRA_TRIES = 3
"""Starts of a run that the machine may fail before the campaign pauses."""
UNCLEAR = 0.4
"""Logarithm of the ratio between a share of paired noise and the one where the gear changes, below which more
candidates are sounded."""
TOP_UP = {"weighing": 3, "paired": 4}
"""Runs of the incumbent that there must be after the tip moved."""


class Gate:
    """One campaign. Not thread-safe.

    The host calls ``next`` whenever a slot is free or a result came, starts every Ask, answers each with ``told``,
    admits a candidate for each Draw it can serve, and after an accepted Ruling says ``moved`` or ``refused``. Results
    told between two calls of ``next`` are taken in the order of their asks, whatever order they came in.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.merges = self.hypotheses = 0
        self._book = Book(settings)
        self._candidates = self._book.candidates
        self._known: set[str] = set()
        self._seed = settings.first_seed
        first = [self._fresh() for _ in range(settings.calibrate)]
        self._due: list[tuple[Stage, int]] = [("calibrate", seed) for seed in [*first, first[0]]]
        self._calibrated = False
        self._count = self._sounded = self._screened = self._failures = 0
        self._running: dict[int, Ask] = {}
        self._arrived: dict[int, Outcome] = {}
        self._again: list[Ask] = []
        self._infra: dict[tuple[tuple[str, ...], int, int], int] = {}
        self._batch: Batch | None = None
        self._proof: Proof | None = None
        self._accepted: Proof | None = None
        self._rulings: list[Ruling | Failed] = []
        self._pause = ""

    # -------------------------------------------------------------------------------------------------- the host's side

    def admit(self, name: str, clashes: Collection[str] = ()) -> None:
        """A new candidate, and those live ones that it does not merge with. Raises ValueError for a known name."""
        if name in self._known:
            raise ValueError(f"candidate {name} was admitted before")
        self._known.add(name)
        self._candidates[name] = Candidate(name, set(clashes) & set(self._candidates))
        for other in self._candidates[name].clashes:
            self._candidates[other].clashes.add(name)

    @property
    def gear(self) -> Gear | None:
        """None until it was chosen."""
        return self._book.gear

    @property
    def tip(self) -> int:
        """Times the tip moved."""
        return self._book.tip

    @property
    def live(self) -> tuple[str, ...]:
        """Candidates without a ruling."""
        return tuple(self._candidates)

    @property
    def proof(self) -> Proof | None:
        """The certification under way; to be read, not written."""
        return self._proof

    def next(self, slots: int, may_draw: bool = True, left: int | None = None
             ) -> list[Ask | Draw | Ruling | Failed | Pause]:
        """Rulings reached since the last call, then at most ``slots`` runs or draws.

        ``left`` is the number of runs that may still be started; ``may_draw`` says whether there are proposals. Nothing
        at all with nothing running means that there is nothing left to do: ``close``.
        """
        self._settle()
        said: list[Ask | Draw | Ruling | Failed | Pause] = list(self._rulings)
        self._rulings = []
        if self._pause:
            said.append(Pause(self._pause))
        if self._pause or self._accepted:
            return said
        if self.gear is None and self._calibrated and not may_draw and not self._unsounded():
            self._choose_gear(final=True)
        room = math.inf if left is None else left
        while slots > 0 and room > 0:
            step = self._step(may_draw, room)
            if step is None:
                break
            slots, room = slots - 1, room - 1
            said.append(step)
            if isinstance(step, Draw):
                said += [step] * int(min(slots, room))
                break
        return said + self._rulings_since()

    def told(self, ask: int, outcome: Outcome) -> None:
        """What came of a run. Raises KeyError for a run that is not under way."""
        if ask not in self._running or ask in self._arrived:
            raise KeyError(ask)
        self._arrived[ask] = outcome

    def moved(self, applies: Collection[str]) -> None:
        """The tip moved: by the merge that was accepted, or else by somebody else, which voids a certification.

        ``applies`` names the live candidates that still merge with it; the others end here.
        """
        tip = self._book.move()
        if self._accepted:
            self.merges += 1
            for pair in self._accepted.pairs:
                if pair.arm and not pair.arm.fault:
                    self._book.incumbent_ran(pair.arm.loss, pair.seed)
            self._accepted = None
        else:
            self._void("the tip moved while it was certified")
        for name, candidate in list(self._candidates.items()):
            candidate.fade()
            if name not in applies:
                self._rule("inconclusive", (name,), "no longer merges with the tip")
        self._restage()
        self._again = [ask for ask in self._again if ask.stage in ("screen", "weigh")]
        missing = TOP_UP[self.gear or "paired"] - len(tip.by_seed) - len(self._due)
        self._due += [("calibrate", self._fresh()) for _ in range(missing)]

    def refused(self) -> None:
        """The host did not merge an accepted unit, for reasons of its own; the tip stays."""
        self._accepted = None

    def withdraw(self, name: str) -> None:
        """The host takes a candidate out, whatever is known of it: no ruling follows, and its runs no longer count.

        Raises KeyError for one that is not live.
        """
        if self._proof and name in self._proof.unit:
            self._void(f"{name} was taken out while it was certified")
        del self._candidates[name]

    def resume(self) -> None:
        """After a Pause: what it was for is mended."""
        self._pause, self._failures = "", 0
        self._infra.clear()

    def close(self, reason: str = "the campaign ended") -> list[Ruling | Failed]:
        """The end: every live candidate is inconclusive. Runs under way no longer count."""
        for name in list(self._candidates):
            self._rule("inconclusive", (name,), reason)
        self._running.clear()
        self._arrived.clear()
        self._batch = self._proof = None
        return self._rulings_since()

    # ------------------------------------------------------------------------------------------------- what to run next

    def _step(self, may_draw: bool, room: float) -> Ask | Draw | None:
        if self._again:
            old = self._again.pop(0)
            return self._ask(old.stage, old.arm, old.seed, old.tip)
        if self._due:
            stage, seed = self._due.pop(0)
            return self._ask(stage, (), seed)
        if not self._calibrated or self._short():
            return None
        ending = not may_draw or room <= self.settings.ending
        return self._certify(ending, room) or self._weigh(ending, room) or self._screen(ending) or (
            self._draw(ending) if may_draw else None)

    def _short(self) -> bool:
        """Whether runs of a new tip are awaited, without which nothing can be compared."""
        return not self._book.incumbent.weight

    def _draw(self, ending: bool) -> Draw | None:
        """None while what is known is brought to an end."""
        return None if ending and self._running else Draw()

    def _certify(self, ending: bool, room: float) -> Ask | None:
        if self._proof is None and not self._start_proof(ending, room):
            return None
        proof = self._proof
        if proof is None:
            return None
        half = next((pair for pair in proof.pairs if not self._asked(pair)), None)
        if half:
            second = proof.unit if self._base_first(proof, half) else ()
            return self._ask("certify", second, half.seed, proof.tip)
        if not proof.wants():
            return None
        pair = Pair(self._fresh())
        proof.pairs.append(pair)
        return self._ask("certify", () if self._base_first(proof, pair) else proof.unit, pair.seed, proof.tip)

    def _asked(self, pair: Pair) -> bool:
        """Whether both runs of a pair have been started."""
        under_way = sum(ask.stage == "certify" and ask.seed == pair.seed for ask in self._running.values())
        return under_way + (pair.base is not None) + (pair.arm is not None) >= 2

    @staticmethod
    def _base_first(proof: Proof, pair: Pair) -> bool:
        """ABBA: the order alternates, so that a trend in time cancels."""
        return next(number for number, one in enumerate(proof.pairs) if one is pair) % 2 == 0

    def _start_proof(self, ending: bool, room: float) -> bool:
        if self.gear is None:
            return False
        staged = [c for c in self._candidates.values() if c.place == "staged" and self._book.belief(c).mean > 0]
        if not staged:
            return False
        unit = self._book.clique(staged, self.settings.most if self.settings.bundles else 1)
        if not self._book.ripe(unit, ending):
            return False
        return self._open_proof(unit, room, half=False)

    def _open_proof(self, unit: Sequence[Candidate], room: float, half: bool) -> bool:
        """Start a certification, with as many of its looks as there are runs for; False if there are for none."""
        book, settings = self._book, self.settings
        level = evidence.level(settings.alpha, self.hypotheses + 1, self.merges)
        looks = tuple(look for look in book.looks(unit, level) if 2 * look <= room)
        if not looks:
            return False
        self.hypotheses += 1
        self._proof = Proof(tuple(c.name for c in unit), self.tip, self.gear or "paired", looks, self.hypotheses,
                            self.merges, level, book.expected(unit), book.sd, book.pool.degrees, book.floor,
                            settings.futile, half)
        book.place(self._proof.unit, "certifying")
        return True

    def _weigh(self, ending: bool, room: float) -> Ask | None:
        if self._batch is None and self.gear == "weighing":
            self._start_batch(ending, room)
        if self._batch is None or not self._batch.todo:
            return None
        row = self._batch.todo.pop(0)
        return self._ask("weigh", self._batch.arm(row), self._batch.seeds[row], self._batch.tip)

    def _start_batch(self, ending: bool, room: float) -> None:
        waiting = [c for c in self._candidates.values() if c.place == "survivor"]
        full = self.settings.rows - 1
        if len(waiting) < (3 if ending else full):
            return
        chosen = self._book.clique(waiting, full)
        if len(chosen) < full and not ending and len(waiting) < 2 * full:
            return
        rows = design.rows_for(len(chosen), self.settings.rows)
        if room < rows + 2 * self.settings.pairs[0]:
            return
        rng = random.Random(f"{self.settings.seed} {self._count}")
        on = design.design(len(chosen), rows, rng)
        self._batch = Batch([c.name for c in chosen], on, [self._fresh() for _ in range(rows)], self.tip)
        self._book.place(self._batch.names, "weighing")

    def _screen(self, ending: bool) -> Ask | None:
        if self.gear == "weighing" and self._screened >= self.settings.canary:
            self._screened = 0
            return self._ask("canary", (), self._fresh())
        idle = [c for c in self._candidates.values() if not c.running and c.place in ("waiting", "screening")]
        for candidate in sorted(idle, key=lambda c: c.place == "waiting"):
            if self.gear is None and len(candidate.paired) >= 2:
                continue  # waits for the choice of the gear
            if candidate.place == "waiting" and ending and self.gear == "weighing" and self._batch:
                continue
            seed = self._fresh() if self.gear == "weighing" else self._banked(candidate)
            if seed is None:  # the incumbent has run no seed that is new to it
                if any(ask.stage == "calibrate" and ask.tip == self.tip for ask in self._running.values()):
                    continue
                return self._ask("calibrate", (), self._fresh())
            if candidate.place == "waiting":
                candidate.place = "screening"
                candidate.sounding = self.gear is None or (
                    self.gear == "paired" and self._sounded < self.settings.soundings[0])
            candidate.used.add(seed)
            candidate.running += 1
            self._screened += 1
            return self._ask("screen", (candidate.name,), seed)
        return None

    def _banked(self, candidate: Candidate) -> int | None:
        """A seed of the incumbent's that the candidate has not run; candidates take them in turn."""
        seeds = sorted(set(self._book.incumbent.by_seed) - candidate.used)
        return seeds[self._screened % len(seeds)] if seeds else None

    def _ask(self, stage: Stage, arm: tuple[str, ...], seed: int, tip: int | None = None) -> Ask:
        self._count += 1
        ask = Ask(self._count, stage, arm, seed, self.tip if tip is None else tip)
        self._running[ask.id] = ask
        return ask

    def _fresh(self) -> int:
        self._seed += 1
        return self._seed - 1

    # -------------------------------------------------------------------------------------------------- what came back

    def _settle(self) -> None:
        for number in sorted(self._arrived):
            ask, outcome = self._running.pop(number), self._arrived[number]
            if outcome.fault == "infra":
                self._machine_failed(ask)
            elif ask.stage in ("calibrate", "canary"):
                self._incumbent_ran(ask, outcome)
            elif ask.stage == "screen":
                self._screen_ran(ask, outcome)
            elif ask.stage == "weigh":
                self._row_ran(ask, outcome)
            else:
                self._pair_ran(ask, outcome)
        self._arrived.clear()
        if not self._calibrated and not self._due and not self._running and not self._again:
            self._calibrated = True
            self._book.calibrated()
        if self._batch and self._batch.done:
            self._end_batch(self._batch)
        if self._proof and all(pair.complete for pair in self._proof.pairs):
            self._judge(self._proof)

    def _machine_failed(self, ask: Ask) -> None:
        key = (ask.arm, ask.seed, ask.tip)
        self._infra[key] = self._infra.get(key, 0) + 1
        self._again.append(ask)
        if self._infra[key] >= INFRA_TRIES:
            self._pause = f"the machine failed {INFRA_TRIES} times"

    def _incumbent_failed(self, fault: str | None) -> None:
        self._failures += 1
        if self._failures >= 2:
            self._pause = f"the incumbent failed twice in a row ({fault})"

    def _incumbent_ran(self, ask: Ask, outcome: Outcome) -> None:
        if ask.tip != self.tip:
            return
        if outcome.fault:
            self._incumbent_failed(outcome.fault)
            self._due.append(("calibrate", self._fresh()))
            return
        self._failures = 0
        tip = self._book.incumbent
        if ask.seed in tip.by_seed:  # the same run twice: what is left is no effect of anything
            self._book.floor = max(self._book.floor, abs(outcome.loss - tip.by_seed[ask.seed]) / 2)
        elif ask.stage == "canary" and abs(outcome.loss - tip.mean) > 3 * self._book.sd * math.sqrt(1 + 1 / tip.weight):
            self._book.forget()
            self._book.incumbent_ran(outcome.loss, ask.seed)
            self._due += [("calibrate", self._fresh()) for _ in range(TOP_UP["weighing"] - 1)]
        else:
            self._book.incumbent_ran(outcome.loss, ask.seed)

    def _screen_ran(self, ask: Ask, outcome: Outcome) -> None:
        candidate = self._candidates.get(ask.arm[0])
        if candidate is None:
            return
        candidate.running -= 1
        if outcome.fault:
            self._rule("rejected", ask.arm, f"its run on seed {ask.seed} failed: {outcome.fault}",
                       {"fault": outcome.fault})
            return
        tip, fresh = self._book.incumbents[ask.tip], 1.0 if ask.tip == self.tip else 0.5
        candidate.read(tip.mean - outcome.loss, fresh / (1 + 1 / tip.weight))
        if ask.seed in tip.by_seed:
            candidate.losses.append(outcome.loss)
            candidate.paired.append((tip.by_seed[ask.seed] - outcome.loss, fresh))
            n = len(candidate.paired)
            if self._book.pairing and n >= (2 if candidate.sounding else 3):  # the first was selected by what it showed
                self._book.pairing.read((candidate.paired[-1][0] - candidate.paired[-2][0]) / math.sqrt(2))
        if candidate.sounding and len(candidate.paired) < 2:
            return
        if candidate.sounding and len(candidate.paired) == 2 and self._book.apart:
            self._sounded += 1
            self._book.apart.read((candidate.losses[1] - candidate.losses[0]) / math.sqrt(2))
        if self.gear is not None:
            self._assess(candidate)
        elif self._sounded >= self.settings.soundings[0]:
            self._choose_gear()

    def _unsounded(self) -> bool:
        """Whether there are candidates left to learn from how well patches pair."""
        return any(len(candidate.paired) < 2 for candidate in self._candidates.values())

    def _choose_gear(self, final: bool = False) -> None:
        """Candidates have run on two seeds, whatever they showed; more of them do where the answer is not clear and
        more will come (not ``final``)."""
        if self._book.pairing is None or self._book.apart is None:
            return
        share = self._book.pairing.typical / self._book.apart.typical
        clear = self._sounded >= self.settings.soundings[1] or abs(math.log(share / self.settings.pairing)) >= UNCLEAR
        if not clear and not final:
            return
        self._book.gear = "paired" if share < self.settings.pairing else "weighing"
        for candidate in list(self._candidates.values()):
            if candidate.place == "screening" and len(candidate.paired) >= 2:
                self._assess(candidate)

    def _assess(self, candidate: Candidate) -> None:
        """Where a screened candidate goes."""
        belief, settings = self._book.belief(candidate), self.settings
        told: Numbers = {"chance": belief.chance, "expected": -belief.mean}
        if self.gear == "weighing":
            if candidate.information and candidate.total / candidate.information < settings.drop * self._book.sd:
                self._rule("rejected", (candidate.name,), "no better than the incumbent in its screen", told)
            else:
                candidate.place = "staged" if belief.chance >= settings.fast else "survivor"
        elif belief.chance >= settings.sure and len(candidate.paired) >= 2:
            candidate.place = "staged"
        elif belief.chance < settings.keep or len(candidate.paired) >= settings.seeds:
            self._rule("rejected", (candidate.name,),
                       f"not likely better than the incumbent after {len(candidate.paired)} seeds", told)
        else:
            candidate.place = "screening"

    def _row_ran(self, ask: Ask, outcome: Outcome) -> None:
        if self._batch and ask.seed in self._batch.seeds:
            self._batch.ran(ask.seed, outcome)

    def _end_batch(self, batch: Batch) -> None:
        self._batch = None
        guilty = batch.guilty()
        for name, fault in guilty.items():
            if name in self._candidates:
                self._rule("rejected", (name,), "every run with it failed, and no run without it", {"fault": fault})
        names = [name for name in batch.names if name not in guilty]
        found, current = batch.solve(names), batch.tip == self.tip
        if found and found.degrees >= 3:
            self._book.fitted(found.squares, found.degrees)
        if found and current and not guilty:
            self._book.incumbent.read(found.off, self.settings.cap, found.off_weight)
        for number, name in enumerate(names):
            candidate = self._candidates.get(name)
            if candidate is None:
                continue
            candidate.rounds += 1
            if found:
                candidate.read(found.gains[number], found.information[number] * (1.0 if current else 0.5))
                self._after_weighing(candidate)
            elif candidate.rounds < self.settings.rounds:
                candidate.place = "survivor"
            else:
                self._rule("inconclusive", (candidate.name,), "too many runs of its weighings failed")

    def _after_weighing(self, candidate: Candidate) -> None:
        belief = self._book.belief(candidate)
        if belief.chance >= self.settings.stage:
            candidate.place = "staged"
        elif belief.chance >= self.settings.retry and candidate.rounds < self.settings.rounds:
            candidate.place = "survivor"
        else:
            self._rule("rejected", (candidate.name,), f"not likely better after {candidate.rounds} weighings",
                       {"chance": belief.chance, "expected": -belief.mean})

    def _pair_ran(self, ask: Ask, outcome: Outcome) -> None:
        proof = self._proof
        pair = next((p for p in proof.pairs if p.seed == ask.seed), None) if proof else None
        if proof is None or pair is None:
            return
        if ask.arm:
            pair.arm = outcome
        else:
            pair.base = outcome
            if outcome.fault:
                self._incumbent_failed(outcome.fault)
            else:
                self._failures = 0
        if pair.complete and pair.base and pair.base.fault:
            proof.pairs.remove(pair)

    def _judge(self, proof: Proof) -> None:
        fault = proof.fault()
        passed, why = (False, f"its certification run failed: {fault}") if fault else proof.verdict()
        if passed is None or not proof.pairs:
            return
        self._proof = None
        for pair in proof.pairs:
            if pair.base and not pair.base.fault:
                self._book.incumbent_ran(pair.base.loss, pair.seed)
        if passed:
            self._accepted = proof
            self._rule("accepted", proof.unit, why, proof.numbers())
            return
        self._book.repeated([p.arm.loss for p in proof.pairs if p.arm and not p.arm.fault])
        if len(proof.unit) > 1:
            self._rulings.append(Failed(proof.unit, why, proof.numbers()))
        members = self._book.best_first(self._candidates[name] for name in proof.unit if name in self._candidates)
        kept = members[:(len(members) + 1) // 2] if len(members) > 1 and not proof.half else []
        for candidate in members[len(kept):]:
            self._rule("rejected", (candidate.name,), why, proof.numbers())
        if kept:
            self._open_proof(kept, math.inf, half=True)

    # ----------------------------------------------------------------------------------------------------- bookkeeping

    def _restage(self) -> None:
        """Staged candidates of whom too little is known since the tip moved go back a step."""
        for candidate in self._candidates.values():
            if candidate.place == "staged":
                chance = self._book.belief(candidate).chance
                if self.gear == "weighing" and chance < self.settings.stage:
                    candidate.place = "survivor"
                elif self.gear == "paired" and chance < self.settings.sure:
                    candidate.place = "screening"

    def _void(self, why: str) -> None:
        """Give up the certification under way: its members are staged again."""
        if self._proof:
            if len(self._proof.unit) > 1:
                self._rulings.append(Failed(self._proof.unit, why))
            self._book.place(self._proof.unit, "staged")
            self._proof = None

    def _rule(self, outcome: str, unit: tuple[str, ...], reason: str, told: Numbers | None = None) -> None:
        for name in unit:
            self._candidates.pop(name)
        if outcome == "accepted":
            self._rulings.append(Ruling("accepted", unit, reason, told or {}))
        else:
            self._rulings.append(Ruling("rejected" if outcome == "rejected" else "inconclusive", unit, reason,
                                        told or {}))

    def _rulings_since(self) -> list[Ruling | Failed]:
        said, self._rulings = self._rulings, []
        return said
