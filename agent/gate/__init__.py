"""The gate: which run comes next, and which candidates are merged. A pure state machine over a whole campaign.

It has no clock, disk, net or chance of its own: columns of designs follow from ``Settings.seed``, so the same answers
in the same order give the same decisions. Two gears behind one interface, chosen once by how well the first candidates
pair with the incumbent on equal seeds:

* **weighing**, where runs on one seed share little (a budget in seconds). Screen each candidate once, weigh up to 15
  survivors in 16 runs with a random half of them on, bundle what is probably better, certify the bundle.
* **paired**, where they share nearly everything (charged steps, one data order a seed). Screen each candidate on a
  seed that the incumbent has run, on more of them while it looks better, bundle and certify.

    words.py    what gate and host say to each other       design.py   weighing designs; batch.py: one under way
    beliefs.py  what selects                               book.py     candidates, the incumbent's runs, spreads
    proof.py    what merges: fresh pairs, a level set beforehand
    machine.py  the order of it all

What is guaranteed: the false discovery rate of merged units, and the chance of any merge without a true effect, stay
below ``alpha``. Patches inside a bundle were selected by their own runs but are not certified alone.

Live campaigns drive it through bundles.py, ``bench policy`` in simulated ones. Short campaigns, which would end before
its first bundle is full, certify one candidate at a time by judge.py, on the same evidence.
"""

from agent.gate.machine import Gate
from agent.gate.proof import Proof
from agent.gate.words import Ask, Draw, Failed, Gear, Outcome, Pause, Ruling, Settings, Stage

__all__ = ["Ask", "Draw", "Failed", "Gate", "Gear", "Outcome", "Pause", "Proof", "Ruling", "Settings", "Stage"]
