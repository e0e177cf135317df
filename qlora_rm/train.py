"""accelerate launch qlora_rm/train.py --config recipes/demo.yaml   (the same door as `qlora-rm train`)"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Launched by path, Python puts this file's folder first on the path, where `training` or `report` would shadow
    # installed packages of that name; the repository root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from qlora_rm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
