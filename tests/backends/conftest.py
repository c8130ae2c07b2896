from __future__ import annotations

import pytest

# The asserts of the contract explain themselves as those of a test module do.
pytest.register_assert_rewrite("dispatcher.testing")
