"""Run under trl 1.12: the reward that PPO reads for each golden sequence of the folder on the command line, as JSON.

Prompts are padded on the left and answers on the right, as PPO pads them; what stands behind the padding is not read.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.utils import get_reward

assert trl.__version__ == "1.12.0", trl.__version__
folder = Path(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
pad = AutoTokenizer.from_pretrained(folder).pad_token_id
sequences = [
    ids
    for item in json.loads((folder / "rm_manifest.json").read_text(encoding="utf-8"))["golden"]
    for ids in item["token_ids"]
]
context = max(map(len, sequences)) // 2
rows = []
for ids in sequences:
    split = min(context, len(ids) // 2)
    rows.append([pad] * (context - split) + ids)
width = max(map(len, rows)) + 3
batch = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
with torch.no_grad():
    scores = get_reward(model, batch, pad, context)[1]
print(json.dumps(scores.tolist()))
