"""Run under transformers 4: load each folder of the command line as RewardBench would.

Prints the ids and scores of its golden texts as JSON, by folder.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
found = {}
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, scores = [], []
    for item in json.loads((folder / "rm_manifest.json").read_text(encoding="utf-8"))["golden"]:
        texts = [tokenizer.apply_chat_template([*item["prompt"], *r], tokenize=False) for r in item["responses"]]
        ids.append(tokenizer(texts, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores.append([model.eval()(torch.tensor([one])).logits[0, 0].item() for one in item["token_ids"]])
    found[str(folder)] = {"missing": info["missing_keys"], "pad": tokenizer.pad_token_id, "ids": ids, "scores": scores}
print(json.dumps(found))
