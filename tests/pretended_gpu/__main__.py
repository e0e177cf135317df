"""See `tests.pretended_gpu`."""

import runpy
import sys

from tests.pretended_gpu import pretend

if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
