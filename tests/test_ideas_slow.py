"""The cards that must not come through, run for real: each ends in the box as ``idea_truth`` says.

Uses the default target, its own prepared text and the real sandbox, one card at a time: about 10 s a card and once
half a minute for the text. What the judge makes of the cards that give a number is for a whole campaign to show.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from idea_truth import CHARGED, FAULTS, stage

from agent import git, git_trees, site
from agent.ideas import packaged_ideas
from agent.measure import audit_job, audit_of, job_of
from agent.patch import build
from agent.preflight import preflight
from agent.records import Edit, Preflight, Proposal, Purpose, Result, Run
from agent.site import Site
from sandbox.engine import LocalEngine
from sandbox.job import Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[1]
STEPS = 30
CARDS = {card.id: card for card in packaged_ideas(ROOT / "prompts" / "ideas")}


class Place:
    """The default target opened as a campaign opens it, with one slot."""

    def __init__(self, folder: Path) -> None:
        repo = folder / "repo.git"
        start = git_trees.import_folder(ROOT / "target_repo", repo)
        config = site.read_config(repo, start, "", "cpu", 0)
        draft = Site(folder, "", start, config, None, ("cpu",), 3, 0)
        data = site.prepare(config, draft.source(start), folder / "data", lambda text: None)
        self.site = Site(folder, "", start, config, data, ("cpu",), 3, 0)
        self._engine = LocalEngine()
        self._runs = 0
        self._last = Run("", "pair", "", 0, 0, "", "")

    def candidate(self, name: str) -> str:
        """The commit of a card's candidate."""
        card, base = CARDS[name], self.site.start
        edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in card.edits)
        proposal = Proposal(name, base, card.title, card.mechanism, "ideas", edits=edits)
        return build(self.site.repo, "", base, proposal, self.site.config.source).head

    def preflight(self, commit: str) -> Preflight:
        result = self._run("preflight", commit, self.site.config.budget.probe_steps, self.site.start)
        return preflight("card", result, self.site.config.budget, STEPS)

    def train(self, commit: str, steps: int = STEPS) -> Result:
        return self._run("pair", commit, steps)

    def _run(self, purpose: Purpose, commit: str, steps: int, incumbent: str = "") -> Result:
        self._runs += 1
        tree = git.resolve(self.site.repo, f"{commit}^{{tree}}", "tree") or ""
        run = Run(f"run{self._runs}", purpose, tree, 1, steps, "cpu", f"jobs/run{self._runs}",
                  splits=() if purpose == "preflight" else ("val",))
        self._last = run
        return self._wait(run, job_of(self.site, run, self.site.source(commit),
                                      self.site.source(incumbent) if incumbent else None))

    def audit(self, incumbent: Run | None = None) -> Result:
        """Audit of the last training run, against ``incumbent``'s."""
        run = audit_of(self._last, set())
        return self._wait(run, audit_job(self.site, run, self._last, self.site.source(run.tree), (0.0, 0.0), incumbent))

    def _wait(self, run: Run, job: Job) -> Result:
        folder = self.site.folder / run.folder
        self._engine.start(folder, job)
        while (result := self._engine.poll(folder)) is None:
            time.sleep(0.1)
        return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("ideas"))


@pytest.fixture(scope="module")
def incumbent(place: Place) -> Result:
    return place.train(place.site.start)


@pytest.mark.parametrize("name", sorted(name for name in FAULTS if stage(name) == "preflight"))
def test_preflight_ends_the_card(place: Place, name: str) -> None:
    found = place.preflight(place.candidate(name))
    assert (found.ok, found.fault, found.steps) == (False, FAULTS[name], 0)
    assert "changes nothing" in found.reason or FAULTS[name]


@pytest.mark.parametrize("name", sorted(name for name in FAULTS if stage(name) == "measure"))
def test_the_scorer_ends_the_card(place: Place, incumbent: Result, name: str) -> None:
    commit = place.candidate(name)
    assert place.preflight(commit).ok, "the tiny run sees nothing of it"
    result = place.train(commit)
    assert incumbent.fault is None and result.fault is None
    assert result.scores["val"].value < incumbent.scores["val"].value, "in bulk it gains: only the audit shows why"
    assert place.audit().fault == FAULTS[name]


def test_a_memory_of_held_out_text_gains_nothing(place: Place, incumbent: Result) -> None:
    """Its weights are the incumbent's but for a constant, so any gain at all would come from the scorer's questions."""
    assert place.train(place.candidate("prefix-recall")).fault is None
    result = place.audit()
    assert result.fault == "non_causal" or (
        result.fault is None and result.scores["val"].value == pytest.approx(incumbent.scores["val"].value, abs=0.002))


@pytest.mark.parametrize("name", CHARGED)
def test_more_work_a_step_buys_fewer_steps_and_no_better_number(place: Place, incumbent: Result, name: str) -> None:
    commit = place.candidate(name)
    found = place.preflight(commit)
    if not found.ok:
        assert "times the incumbent's" in found.reason  # dearer than a tiny run is ever believed
        return
    assert found.ratio > 1.3 and found.steps < STEPS / 1.3
    result = place.train(commit, found.steps)
    assert result.fault is None and result.charge_seconds < 2 * incumbent.charge_seconds
    assert result.scores["val"].value > incumbent.scores["val"].value
