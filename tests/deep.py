"""Whether this is `make test-deep`, which draws new examples and includes what takes too long for `make test`."""

import os

import pytest

SEED = int(os.environ.get("QLORA_RM_DEEP") or 0)
"""Seed of this deep run; 0 in `make test`."""

only_deep = pytest.mark.skipif(not SEED, reason="takes minutes: make test-deep runs it")
