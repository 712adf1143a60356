"""What tests of broken stages share."""

from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings


@pytest.fixture(scope="module")
def without_shrinking() -> Iterator[None]:
    """Failures are wanted, not the smallest example of each; and the same ones each time."""
    before = settings.get_current_profile_name()
    how = {"phases": [Phase.generate], "report_multiple_bugs": False, "derandomize": True, "database": None}
    settings.register_profile("unshrunk", settings.get_profile(before), **how)
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(before)
