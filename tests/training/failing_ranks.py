"""Script for torch's launcher: two ranks inside `ending_together`, as in `qlora-rm train`, one or both of which fail.

failing_ranks.py HOW: `same mistake` on both ranks, or `mistake` or `defect` on rank 1 alone. Rank 0 then waits in a
call that no broken connection ends.
"""

import os
import sys
import time

from qlora_rm.errors import UserError
from qlora_rm.training.rank_failures import ending_together

HOW = sys.argv[1]

if __name__ == "__main__":
    with ending_together():
        if HOW == "same mistake":
            raise UserError("All ranks find that the moon is no cheese.")
        if os.environ["RANK"] == "0":
            time.sleep(600)
        if HOW == "mistake":
            raise UserError("Rank 1 alone finds no moon.")
        raise ValueError("rank 1 has a defect")
