"""accelerate launch -m qlora_rm.train --config recipes/demo.yaml   (the same code as `qlora-rm train`)"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # When launched by path (without -P), Python puts this file's folder first on sys.path, where `training` or `report`
    # would shadow installed packages of that name. Replace it by the package's parent folder, unless that is
    # site-packages, which is already on the path and must stay behind the standard library.
    if not sys.flags.safe_path:
        del sys.path[0]
    root = Path(__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        sys.path.insert(0, str(root))

from qlora_rm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
