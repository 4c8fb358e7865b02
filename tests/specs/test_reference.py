"""docs/spec.md is what the schema says."""

from pathlib import Path

from specs.reference import render_reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "spec.md"


def test_page_is_in_step() -> None:
    assert PAGE.read_text() == render_reference(), "run: python -m specs.reference > docs/spec.md"
