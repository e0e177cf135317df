"""The consumers of reward models, one row each: what each loads, feeds to the model and needs written, and its checks.

To add a consumer, add a row to `READERS` and its name to `config.READER_NAMES`. `docs/readers.md` is made from this table.
"""

from qlora_rm.exporting.consumer import IN_V4, WITH_BIAS_IN_SGLANG, WITH_SCORE, Reader, classifiers
from qlora_rm.exporting.consumer_inputs import as_rendered, as_text, from_policy, without_bos

ENGINE = "the engine itself: its source was read, it was not run"

READERS: tuple[Reader, ...] = (
    Reader(
        name="transformers",
        versions="transformers 5.23, its text-classification pipeline too",
        loads="AutoModelForSequenceClassification",
        reads_at="rightmost token that is not pad",
        fed="what you tokenize; rendered conversations without adding special tokens, plain text with eos written out",
        proof="run",
        reads_4bit=True,
        limits="any architecture with a sequence classifier",
        snippet="""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("$folder")
model = AutoModelForSequenceClassification.from_pretrained("$folder").eval()
$text
batch = tokenizer(text, return_tensors="pt", add_special_tokens=$special_tokens)
score = model(**batch).logits[0, 0].item()

classify = pipeline("text-classification", model="$folder")
same_score = classify(text, add_special_tokens=$special_tokens)[0]["score"]""",
    ),
    Reader(
        name="trl",
        versions="trl 1.16: GRPO, RLOO, OnlineDPO",
        loads="AutoModelForSequenceClassification, num_labels=1",
        reads_at="rightmost token that is not pad",
        fed="conversations through this model's own template; plain prompt + completion with neither bos nor eos",
        proof="run",
        feed=as_rendered,
        limits="models trained on plain text with bos or eos are refused; tools and template variables are not handed on",
        snippet="""\
from trl import GRPOTrainer

trainer = GRPOTrainer(model=policy, reward_funcs="$folder", args=args, train_dataset=prompts)""",
    ),
    Reader(
        name="trl-ppo",
        versions="trl 1.12, the last with PPO",
        loads="the model object; backbone by base_model_prefix, head by `.score`",
        reads_at="token before the first pad of the response",
        fed="the policy's token ids",
        proof="run",
        architectures=WITH_SCORE | classifiers("GPT2"),
        feed=from_policy,
        shares_vocabulary=True,
        limits="policy and reward model share one vocabulary; the template must end turns with eos and nothing behind it",
        snippet="""\
from transformers import AutoModelForSequenceClassification
from trl.experimental.ppo import PPOTrainer

reward_model = AutoModelForSequenceClassification.from_pretrained("$folder", num_labels=1)
value_model = AutoModelForSequenceClassification.from_pretrained("$folder", num_labels=1)
trainer = PPOTrainer(
    args=args,
    processing_class=tokenizer,
    model=policy,
    ref_model=None,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=prompts,
)""",
    ),
    Reader(
        name="openrlhf",
        versions="openrlhf 0.11.2, reward model in its own processes",
        loads="its own class: backbone, and a bias-free linear head under `value_head_prefix`",
        reads_at="last position of the attention mask",
        fed="the policy's token ids",
        proof="re-enacted",
        architectures=WITH_SCORE,
        writes=("head name",),
        feed=from_policy,
        rounds=True,
        clips=10.0,
        shares_vocabulary=True,
        unchecked=(ENGINE,),
        limits="policy and reward model share one vocabulary; rewards are clipped at 10; its normalization gives garbage "
        "on transformers 5, so mean and std are written on request only (--normalize)",
        snippet="python -m openrlhf.cli.train_ppo_ray --reward.model_name_or_path $folder ...",
    ),
    Reader(
        name="openrlhf-remote",
        versions="openrlhf 0.11.2 with a reward server",
        loads="nothing: it asks a server, which `qlora-rm serve` is",
        reads_at="as the server does",
        fed="the policy's text with its special tokens",
        proof="read",
        clips=10.0,
        unchecked=(
            "that the policy's template writes what this model was trained on: the server is sent finished text",
        ),
        reads_4bit=True,
        limits="the policy's template must be this model's; rewards are clipped at 10",
        snippet="""\
qlora-rm serve $folder
python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:8000/get_reward ...""",
    ),
    Reader(
        name="verl",
        versions="verl 0.9.1, reward model in vLLM",
        loads="as vLLM",
        reads_at="last token",
        fed="the conversation through this model's template, a leading bos taken off, special tokens added",
        proof="re-enacted",
        architectures=WITH_SCORE - classifiers("Gemma3Text"),
        feed=without_bos,
        needs_template=True,
        rounds=True,
        unchecked=(ENGINE,),
        limits="a template that writes bos needs a tokenizer that adds bos; with SGLang as its engine export for sglang",
        snippet="""\
python -m verl.trainer.main_ppo reward.reward_model.enable=True reward.reward_model.model_path=$folder \\
  reward.reward_model.rollout.name=vllm ...""",
    ),
    Reader(
        name="verl-critic",
        versions="verl 0.9.1, the critic started from the reward model",
        loads="AutoModelForTokenClassification, num_labels 1, from the folder value/",
        reads_at="every token",
        fed="the policy's token ids",
        proof="re-enacted",
        architectures=WITH_SCORE - classifiers("Gemma3Text"),
        writes=("value model",),
        feed=from_policy,
        rounds=True,
        shares_vocabulary=True,
        unchecked=(ENGINE,),
        limits="policy and critic share one vocabulary",
        snippet="python -m verl.trainer.main_ppo critic.model.path=$folder/value ...",
    ),
    Reader(
        name="vllm",
        versions="vllm 0.33",
        loads="...ForSequenceClassification as a pooling model",
        reads_at="last token",
        fed="messages through this model's template without added special tokens; text with them",
        proof="read",
        architectures=WITH_SCORE - classifiers("Gemma3Text") | classifiers("GPT2"),
        writes=("pooler config",),
        rounds=True,
        unchecked=(ENGINE,),
        limits="without the vllm.yaml that is written, fp32 weights are run in fp16; send `messages`, or rendered text "
        "with `add_special_tokens: false`; no over-long rule",
        snippet="""\
vllm serve $folder --config $folder/vllm.yaml
curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}'""",
    ),
    Reader(
        name="sglang",
        versions="sglang 0.5.23",
        loads="its own Llama, Qwen2, Qwen3 and Gemma2 ForSequenceClassification",
        reads_at="last token",
        fed="text, special tokens added",
        proof="read",
        architectures=classifiers("Llama", "Gemma2") | WITH_BIAS_IN_SGLANG,
        writes=("head bias",),
        rounds=True,
        unchecked=(ENGINE,),
        limits="four architectures; Qwen2 and Qwen3 get a head bias of zeros, which vLLM refuses; `/classify` only: "
        "`/v1/classify` makes 1.0 of every score",
        snippet="""\
python -m sglang.launch_server --model-path $folder --is-embedding
curl http://127.0.0.1:30000/classify -H 'Content-Type: application/json' -d '{"text": "..."}'""",
    ),
    Reader(
        name="rewardbench",
        versions="rewardbench 0.1.4 on transformers 4.57",
        loads="AutoModelForSequenceClassification of transformers 4",
        reads_at="rightmost token that is not pad",
        fed="the conversation through this model's template, tokenized as text with special tokens, cut at 2,048",
        proof="run",
        architectures=IN_V4,
        feed=as_text,
        needs_template=True,
        reads_v4=True,
        unchecked=("RewardBench itself, which runs on CUDA only; the tests read the folder with transformers 4.57",),
        limits="a template that writes bos needs a tokenizer that adds none; no system turns",
        snippet="rewardbench --model=$load --batch_size=8",
    ),
    Reader(
        name="peft",
        versions="peft 0.21",
        loads="AutoPeftModelForSequenceClassification, num_labels=1, on the base quantized as in training",
        reads_at="rightmost token that is not pad",
        fed="as transformers",
        proof="run",
        takes="adapter",
        unchecked=("that the base lies where adapter_config.json says, on the machine that loads it",),
        limits="the base must be quantized as in training, its head left out; a new pad token needs the merged model; on "
        "CPUs with AVX512-BF16 bitsandbytes 0.50 computes 4-bit layers in bf16",
        snippet="""\
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, BitsAndBytesConfig

tokenizer = AutoTokenizer.from_pretrained("$folder")
model = AutoPeftModelForSequenceClassification.from_pretrained(
    "$folder",
    num_labels=1,
    dtype=torch.$dtype,
    quantization_config=$quantization,
).eval()
model.config.pad_token_id = tokenizer.pad_token_id""",
    ),
)

UNSUPPORTED = {
    "tei": "Text Embeddings Inference 1.9 serves encoder classifiers only: it has no sequence classifier for decoders.",
    "llama.cpp": "llama.cpp has no score head for decoders: its converter drops `score.weight`.",
}
