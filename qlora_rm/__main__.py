"""python -m qlora_rm COMMAND ...   (the same as `qlora-rm`)"""

import sys

from qlora_rm.cli import main

if __name__ == "__main__":
    sys.exit(main())
