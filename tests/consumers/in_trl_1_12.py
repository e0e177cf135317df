"""Run under trl 1.12: print, as JSON, PPO's reward for each golden sequence of the folders on the command line.

Prompts are padded on the left and answers on the right, as in PPO. The reward is read before the padding on the right.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.utils import get_reward

assert trl.__version__ == "1.12.0", trl.__version__


def rewards(folder: Path) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    golden = json.loads((folder / "rm_manifest.json").read_text(encoding="utf-8"))["golden"]
    sequences = [ids for item in golden for ids in item["token_ids"]]
    context = max(map(len, sequences)) // 2
    rows = [[pad] * (context - min(context, len(ids) // 2)) + ids for ids in sequences]
    width = max(map(len, rows)) + 3
    batch = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return get_reward(model, batch, pad, context)[1].tolist()


print(json.dumps({folder: rewards(Path(folder)) for folder in sys.argv[1:]}))
