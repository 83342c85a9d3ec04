"""The fixtures for the tests of the page."""

import pytest

pytest.register_assert_rewrite("page_browser")
from page_browser import browser, page, serve, server  # noqa: E402, F401
