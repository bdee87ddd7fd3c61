"""The page of what runs where is what runs."""

import pytest

from tests.models.support import PAGE, page


@pytest.mark.slow
def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.models.support writes it again"
