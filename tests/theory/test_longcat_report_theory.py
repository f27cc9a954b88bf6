"""The report's theory table comes out of our ops and engine, and published overlap figures within their limits."""

import pytest

from longcat_sim.studies.validate import h800_trace, training_overlap
from longcat_sim.studies.validate.longcat_report import theory_rows


def test_the_theory_table_within_one_percent():
    rows = theory_rows()
    assert len(rows) == 18
    assert [row.quantity for row in rows if not row.passed] == []


def test_training_overlap_within_two_points():
    section = training_overlap.run()
    assert section.passed
    assert section.rows[0].predicted > 3 * section.rows[1].predicted


def test_the_h800_trace():
    section = h800_trace.run()
    if section.skipped:
        pytest.skip(section.skipped)
    assert section.passed
    assert section.to_json()["rows"][2]["quantity"] == "span"
