"""The report, the picture and the lines of view.py, on synthetic nights."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from agent import report
from agent.errors import UserError
from agent.records import Estimate, Gain, Verdict
from agent.show import view
from tests.night import START, Night, whole_night


def size(png: bytes) -> tuple[int, int]:
    """(width, height) of a whole PNG."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.uint32)
    packed = np.unique(pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2])
    return {(int(p) >> 16, int(p) >> 8 & 255, int(p) & 255) for p in packed}


def test_the_report_holds_every_attempt_its_reason_and_the_final_number(tmp_path: Path) -> None:
    night = whole_night(tmp_path)
    page = report.write(night.state, night.folder)
    text = page.read_text()
    assert page == night.folder / "report/report.md"
    assert "**2 of 5 attempts were merged**" in text
    assert "-0.1000 [-0.1100, -0.0800]**" in text and "3 fresh paired seeds" in text
    merged = text[text.index("## Merged"):text.index("## Trained and not merged")]
    assert merged.index("Unembedding") < merged.index("Betas")
    assert "-0.0800 [-0.0850, -0.0750] | 2 |" in merged and "QK" not in merged
    assert "| patch | 2 | Rotary base 100k | the text to replace is not there |" in text
    assert "| nan | 4 | Double batch | loss is NaN at step 120 |" in text
    assert f"git --git-dir repo.git log --reverse {START[:12]}..{night.state.tip[:12]}" in text
    assert "ratchet export 2026-03-01 --branch" in text
    assert "level 2" in text and "sealed" in text and "$0.25 for models" in text


def test_the_picture_shows_merged_refused_and_failed_in_their_colours(tmp_path: Path) -> None:
    night = whole_night(tmp_path)
    report.write(night.state, night.folder)
    path = night.folder / "report/progress.png"
    width, height = size(path.read_bytes())
    assert 900 <= width <= 2200 and 500 <= height <= 900
    seen = colours(path)
    for colour in ((0x1A, 0x7F, 0x37), (0x9A, 0xA1, 0xA9), (0xCF, 0x22, 0x2E), (0xBF, 0x87, 0x00)):
        assert colour in seen


@pytest.mark.parametrize("attempts", [0, 1, 20])
def test_any_number_of_attempts_makes_a_report(tmp_path: Path, attempts: int) -> None:
    night = Night(tmp_path, "n")
    for number in range(attempts):
        night.judge(f"Idea {number} of $x$ and a rather long name that goes on and on", 0.5 if number % 7 else -0.01,
                    accept=number % 7 == 0)
    report.write(night.state, night.folder)
    assert size((night.folder / "report/progress.png").read_bytes())[0] > 900
    text = (night.folder / "report/report.md").read_text()
    assert "provisional" in text
    assert ("there is no unbiased number yet" in text) == (attempts > 0)


def test_effects_without_end_or_number_are_drawn(tmp_path: Path) -> None:
    night = Night(tmp_path, "n")
    for effect, width in ((-0.01, math.inf), (math.nan, 0.1), (0.02, math.inf)):
        name = night.propose("One pair")
        night.ledger.append("verdict", Verdict(name, "accepted" if effect < 0 else "inconclusive", "judge", "r", None,
                                               Estimate("val", effect, effect - width, effect + width, 1, 0.002)))
    report.write(night.state, night.folder)
    assert size((night.folder / "report/progress.png").read_bytes())[0] > 900
    assert "-0.0100 [-inf, +inf]" in (night.folder / "report/report.md").read_text()
    night.ledger.append("gain", Gain("val_bpb", "final", -0.01, -math.inf, math.inf))
    assert view.status(night.state, alive=True)["gain"]["low"] is None


def test_an_interval_that_holds_zero_is_not_called_a_gain(tmp_path: Path) -> None:
    night = Night(tmp_path, "n")
    night.judge("Something", -0.01, accept=True)
    night.ledger.append("gain", Gain("val_bpb", "final", -0.002, -0.006, 0.002))
    assert "not shown to differ: the interval includes zero" in report.markdown(night.state)


def test_weak_tiers_and_levels_are_said_in_the_summary(tmp_path: Path) -> None:
    night = Night(tmp_path, "n", tier="reported", level=0, unit="seconds")
    night.refuse("Something")
    summary = report.markdown(night.state).split("![Progress]")[0]
    assert "tier *reported*" in summary and "level 0 only" in summary


def test_a_title_cannot_break_the_table_or_drive_the_terminal(tmp_path: Path) -> None:
    night = Night(tmp_path, "n")
    night.judge("Evil | <img src=x>\n# head \x1b]0;owned\x07`code`", -0.01, accept=True)
    night.refuse("x", "why\x1b[2J | not")
    text = report.markdown(night.state)
    assert "\x1b" not in text and "\x07" not in text and "\n# head" not in text
    assert "Evil \\| \\<img src=x> # head" in text
    printed = "\n".join([*view.status_lines(night.state, alive=True), *map(view.log_line, view.rows(night.state)),
                         *view.show_lines(night.state, view.find(night.state, "1"), "runs/n")])
    assert "\x1b" not in printed and "\x07" not in printed


def test_effects_read_as_an_effect_with_its_interval(tmp_path: Path) -> None:
    assert view.span(-0.0243, -0.0291, -0.0195) == "-0.0243 [-0.0291, -0.0195]"
    assert [view.duration(s) for s in (0.4, 59, 61, 7500)] == ["0 s", "59 s", "1 min 01 s", "2 h 05 min"]


def test_kinds_and_counts(tmp_path: Path) -> None:
    night = whole_night(tmp_path)
    night.propose("Still open")
    assert [row.kind for row in view.rows(night.state)] == [
        "accepted", "untrained", "refused", "failed", "accepted", "open"]
    assert view.merged_sum(night.state) == pytest.approx(-0.11)
    assert view.training_runs(night.state) == 13  # three times four paired runs and the crash; no preflight


def test_a_metric_that_is_maximised_keeps_negative_is_better_in_json_alone(tmp_path: Path) -> None:
    night = Night(tmp_path, "n", direction="max")
    night.ledger.append("gain", Gain("accuracy", "final", 0.03, 0.01, 0.04))
    gain = view.status(night.state, alive=True)["gain"]
    assert (gain["effect"], gain["low"], gain["high"]) == (-0.03, -0.04, -0.01)
    assert "+0.0300 [+0.0100, +0.0400]" in view.gain_line(night.state)
    assert "higher is better; better." in report.markdown(night.state)


def test_find_takes_ids_numbers_commits_and_clear_parts(tmp_path: Path) -> None:
    state = whole_night(tmp_path).state
    commit = state.merges[0].new_tip
    for wanted in ("001-unembedding", "1", "#1", "001", "unembed", commit[:10]):
        assert view.find(state, wanted).number == 1
    with pytest.raises(UserError, match="fits 5 attempts"):
        view.find(state, "-")
    with pytest.raises(UserError, match="There is no attempt 'zz'"):
        view.find(state, "zz")


def test_show_says_everything_on_one_attempt(tmp_path: Path) -> None:
    state = whole_night(tmp_path).state
    text = "\n".join(view.show_lines(state, view.find(state, "1"), "runs/x"))
    for part in ("Because of Unembedding", "accepted at judge", "rule: paired t", "+lr = 0.016", "a dozen steps ran",
                 "runs/x/jobs/001-unembedding-2c/log.txt", state.merges[0].new_tip, "$0.2500", "-0.0790"):
        assert part in text
    crashed = "\n".join(view.show_lines(state, view.find(state, "4"), "runs/x"))
    assert "nan: loss is NaN at step 120" in crashed and "step 119 loss 7.1" in crashed
    unapplied = "\n".join(view.show_lines(state, view.find(state, "2"), "runs/x"))
    assert "- old\n+ new" in unapplied
