"""Whether this is `make test-deep`: examples that are drawn anew, and everything that takes too long for the gate."""

import os

import pytest

SEED = int(os.environ.get("QLORA_RM_DEEP") or 0)
"""Of this deep run; 0 in the gate."""

only_deep = pytest.mark.skipif(not SEED, reason="takes minutes: make test-deep runs it")
