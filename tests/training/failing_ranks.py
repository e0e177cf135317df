"""Two ranks in what the train door wraps them in, one of which fails; started by torch's launcher as a script.

failing_ranks.py HOW: `same mistake` (both ranks), or of rank 1 alone `mistake` or `defect`, while rank 0 waits for something
that no broken connection ends.
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
