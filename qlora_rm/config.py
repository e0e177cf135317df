"""The user's options: one dataclass per topic, one help text per field, and the checks of the values.

The training loop's own options (learning rate, batch size, steps, ...) are TRL's `RewardConfig`;
`training/arguments.py` holds the defaults that differ. This module imports nothing heavy, so that `--help` is fast.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_rm.errors import UserError

Quantization = Literal["none", "4bit", "8bit"]

MOST_WEIGHT = 1_000_000
"""Largest weight of a data set or row, and largest absolute margin; a larger value is a mistake in the data."""


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with its help text; each instance gets its own copy of a list or dict."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass
class DataConfig:
    """Which rows to read, how to read them, and which prompts to hold out."""

    dataset: list[str] = option(
        [],
        "Preference rows: files (JSONL, JSON, CSV, Parquet, also .gz), globs, folders, a folder written by datasets' "
        "save_to_disk, or a hub id. In YAML an entry may be a mapping with the keys path, config, split, weight and "
        "columns.",
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a hub dataset.")
    dataset_split: str = option(
        "train", "Split of a hub dataset or a saved DatasetDict; slices such as train[:1%%] work."
    )
    dataset_weights: list[float] | None = option(
        None,
        "How often each data set's comparisons occur in the training set: 1 once, 2 twice, 0.25 a seeded quarter. "
        "One number per --dataset entry.",
    )
    columns: list[str] | None = option(
        None, "Rename columns: field=column, for example prompt=question chosen=best. In YAML a mapping."
    )
    hh_turns: bool = option(
        False,
        "Parse raw HH text (\\n\\nHuman: ... \\n\\nAssistant: ...) into turns for the chat template instead of keeping it as text.",
    )
    eval_dataset: list[str] | None = option(None, "Held-out rows, in the same forms as --dataset.")
    eval_split: str | None = option(None, "Held-out split of the --dataset entries (hub id or saved DatasetDict).")
    eval_fraction: float = option(
        0.05,
        "Share of the distinct prompts held out when neither --eval_dataset nor --eval_split is given; 0 holds out none.",
    )
    max_eval_comparisons: int | None = option(
        None, "Keep at most this many held-out comparisons (a fixed, seeded choice)."
    )
    over_long: Literal["truncate_prompt", "drop", "error"] = option(
        "truncate_prompt",
        "What to do with sequences over --max_length: cut the oldest part of the prompt, the same cut for all "
        "responses of a prompt; drop the comparison; or stop.",
    )
    group_by_prompt: bool = option(
        False,
        "Merge training comparisons of one prompt from several rows into one, so that the prompt and identical "
        "responses are computed once. Every pair keeps its weight; a batch counts prompts.",
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "Stop at the first faulty row, or skip faulty rows and count them by kind."
    )
    max_row_bytes: int = option(
        64_000_000,
        "Most bytes of one row, expanded where the file is compressed; a longer row is a faulty row. Raise it for rows of "
        "longer texts: memory grows with it.",
    )

    def __post_init__(self) -> None:
        self.columns = _as_assignments(self.columns)
        if self.dataset_weights is not None:
            require(
                len(self.dataset_weights) == len(self.dataset),
                f"--dataset_weights has {len(self.dataset_weights)} numbers for {len(self.dataset)} --dataset entries; "
                "give one per entry.",
            )
            require(
                all(0 < w <= MOST_WEIGHT for w in self.dataset_weights),
                f"--dataset_weights must be above 0, and at most {MOST_WEIGHT:,}.",
            )
        require(
            0 < self.max_row_bytes < 2**31,
            f"--max_row_bytes {self.max_row_bytes} must be above 0 and below 2 GiB ({2**31:,}).",
        )
        require(0 <= self.eval_fraction < 1, f"--eval_fraction {self.eval_fraction} must be at least 0 and below 1.")
        require(
            not (self.eval_dataset and self.eval_split),
            "Give --eval_dataset or --eval_split, not both: each names the held-out rows.",
        )

    @property
    def renames(self) -> dict[str, str]:
        """Field name -> column name in the user's rows."""
        return dict(item.split("=", 1) for item in self.columns or [])


def _as_assignments(columns: list[str] | dict[str, str] | None) -> list[str] | None:
    """Return `field=column` words from such words (the command line) or from a mapping (YAML)."""
    if columns is None:
        return None
    words = [f"{name}={column}" for name, column in columns.items()] if isinstance(columns, dict) else list(columns)
    for word in words:
        require("=" in word, f"--columns {word!r} is not of the form field=column, for example prompt=question.")
    fields = [word.split("=", 1)[0] for word in words]
    twice = next((name for name in fields if fields.count(name) > 1), None)
    require(twice is None, f"--columns names the field {twice} twice. Give one column for each field.")
    return words


SharePrefix = Literal["auto", "true", "false"]
SHARE_PREFIX_HELP = (
    "Compute the beginning that responses share once. auto: where a probe finds the scores of plain batches, else plain "
    "batches; true: that is an error; false: plain batches."
)


@dataclass
class BackboneConfig:
    """The model that is loaded, how it is quantized, and the score head on top of it."""

    model_name_or_path: str | None = option(
        None, "Backbone: a folder or hub id of a causal LM, an encoder, or a reward model."
    )
    model_revision: str | None = option(None, "Revision (branch, tag or commit) of a hub backbone.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer, where it is not the backbone's own.")
    quantization: Literal["none", "4bit", "8bit"] = option(
        "4bit",
        "4bit is NF4 with double quantization; 8bit is LLM.int8(), not under ZeRO-3; none keeps the weights in the compute dtype. "
        "A checkpoint that is saved in 4 or 8 bit is loaded as it is, and needs the option that names it.",
    )
    max_unquantized: float = option(
        0.1,
        "Largest share of the backbone's linear and expert weights that a quantized load may leave in 16 bit or more; "
        "above it the run stops. 1 allows anything.",
    )
    attn_implementation: str | None = option(
        None,
        "Attention kernel (sdpa, eager, flash_attention_2, ...). Unset: the one in the checkpoint's config.json, else the "
        "library's choice.",
    )
    share_prefix: SharePrefix = option("auto", SHARE_PREFIX_HELP)
    verify_base: Literal["sample", "full"] = option(
        "sample",
        "How a resumed run, `merge` and `verify` identify the base's weights: sample reads parts of every file, which "
        "detects another training; full hashes every byte, once per host and command, which detects any change.",
    )
    head_init_std: float | None = option(
        None,
        "Standard deviation of a new score head; 0 starts every score at 0. Unset: 1/sqrt(hidden_size + 1), as in "
        "Stiennon et al. 2020. A backbone that already is a reward model keeps its head.",
    )

    def __post_init__(self) -> None:
        require(0 <= self.max_unquantized <= 1, f"--max_unquantized {self.max_unquantized} must lie between 0 and 1.")
        require(self.head_init_std is None or self.head_init_std >= 0, "--head_init_std must not be negative.")


@dataclass
class AdapterConfig:
    """The LoRA adapter. The score head is never part of it: all of its weights are trained."""

    use_lora: bool = option(True, "Train a LoRA adapter; --no_use_lora fine-tunes the whole (unquantized) backbone.")
    adapter: str | None = option(None, "Go on training this adapter directory (its own shape and base are used).")
    skip_checks: bool = option(
        False,
        "Train an --adapter on without comparing its files and configuration with the hashes in its manifest. Use it for an "
        "adapter that you changed on purpose.",
    )
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Scale of the adapter: the update is alpha/r (alpha/sqrt(r) with rsLoRA) times B A.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input.")
    lora_target_modules: list[str] | None = option(
        None,
        "Names of the layers that get an adapter, each a full name or its end (q_proj); or one regular expression, matched "
        "with full names (re.fullmatch). Unset or all-linear: all linear layers of the backbone.",
    )
    lora_experts: bool = option(
        False, "LoRA on the fused expert weights of a mixture of experts too (PEFT's target_parameters)."
    )
    lora_layers: list[int] | None = option(None, "Indices of the transformer layers that get an adapter; unset: all.")
    use_rslora: bool = option(False, "Rank-stabilized scaling (Kalajdzievski 2023).")
    use_dora: bool = option(False, "Weight-decomposed adapter (DoRA, Liu et al. 2024).")

    def __post_init__(self) -> None:
        self.lora_target_modules = _as_targets(self.lora_target_modules)
        require(self.lora_layers != [], "--lora_layers is empty: leave it out to adapt all layers.")
        require(
            self.lora_r > 0, f"--lora_r {self.lora_r} must be above 0; to train without an adapter use --no_use_lora."
        )
        require(0 <= self.lora_dropout < 1, f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1.")
        require(
            not (self.lora_experts and (self.lora_dropout or self.use_dora)),
            "--lora_experts cannot be combined with --lora_dropout or --use_dora: PEFT supports neither for expert weights.",
        )
        require(
            self.use_lora or not self.adapter,
            "--adapter goes on from a LoRA adapter, --no_use_lora trains none: give one of them.",
        )


def _as_targets(words: list[str] | str | None) -> list[str] | None:
    """Return the layers' names; None for PEFT's keyword all-linear."""
    words = [words] if isinstance(words, str) else words
    if words is None:
        return None
    require(bool(words) and all(words), "--lora_target_modules is empty: leave it out to adapt all linear layers.")
    names_all = [word.lower().replace("_", "-") == "all-linear" for word in words]
    require(
        len(words) == 1 or not any(names_all),
        "--lora_target_modules all-linear takes all linear layers: give no other names with it.",
    )
    return None if names_all == [True] else words


@dataclass
class ObjectiveConfig:
    """The loss that relates scores to comparisons."""

    objective: Literal["bradley_terry", "plackett_luce"] = option(
        "bradley_terry",
        "bradley_terry: every ordered pair of a prompt's responses, their weights summing to one (Ouyang et al. 2022, "
        "eq. 1); plackett_luce: the likelihood of the whole ranking.",
    )
    ties: Literal["ignore", "half", "rao_kupper"] = option(
        "ignore",
        "Tied pairs: ignore them (counted), count half a win each way, or model them (Rao and Kupper 1967).",
    )
    tie_threshold: float = option(
        1.0, "Rao-Kupper's log theta: the score difference below which a tie is likely; above 0."
    )
    label_smoothing: float = option(0.0, "Probability that a preference label is wrong; at least 0 and below 0.5.")

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 0.5,
            f"--label_smoothing {self.label_smoothing} must be at least 0 and below 0.5.",
        )
        require(self.tie_threshold > 0, f"--tie_threshold {self.tie_threshold} must be above 0.")
        if self.objective == "plackett_luce":
            require(
                self.ties == "ignore",
                "--ties needs --objective bradley_terry; plackett_luce reads strict preferences only.",
            )
            require(self.label_smoothing == 0, "--label_smoothing needs --objective bradley_terry.")


@dataclass
class OutputConfig:
    """How much a command prints."""

    quiet: bool = option(False, "Print only warnings, errors and results: no progress, no notes.")
    verbose: bool = option(
        False, "Print the warnings and notes of the libraries underneath too, and every entry of the training log."
    )


@dataclass
class PlanConfig:
    """The model, hardware and data to plan for."""

    params: str | None = option(
        None,
        "A published shape instead of a MODEL: 7B, 8B, 13B, 32B, 70B, 405B, or the mixtures 8x7B, 30B-A3B, 235B-A22B.",
    )
    card: list[str] = option(
        ["24", "48", "80", "141"],
        "GPU memory in GB; several values are planned in turn. cpu:64 is a host with 64 GB and no GPU.",
    )
    cards: int = option(1, "Number of GPUs; above eight, in machines of eight. On a CPU: number of processes.")
    engine: Literal["auto", "single", "ddp", "zero2", "zero3", "zero3_offload"] = option(
        "auto", "Plan for this engine only; auto: the fastest that fits."
    )
    max_length: int = option(1024, "Longest sequence in tokens, as in training.")
    share: float = option(
        0.5,
        "Part of a sequence that the responses to a prompt have in common; measured instead where --dataset is given.",
    )
    responses: int = option(2, "Responses to a prompt; measured instead where --dataset is given.")
    pairs_per_step: int = option(64, "Comparisons in an optimizer step, over all cards, which take equal shares of it.")
    precision: Literal["bf16", "fp16", "fp32"] | None = option(
        None, "Dtype of the arithmetic; unset: bf16 on cards, fp32 on a CPU."
    )
    trust_remote_code: bool = option(False, "Run the model code that a hub repository brings with it.")

    def __post_init__(self) -> None:
        require(self.cards > 0, f"--cards {self.cards} must be above 0.")
        require(self.max_length > 1, f"--max_length {self.max_length} must be above 1.")
        require(0 <= self.share < 1, f"--share {self.share} must be at least 0 and below 1.")
        require(self.responses > 1, f"--responses {self.responses} must be above 1.")
        require(self.pairs_per_step > 0, f"--pairs_per_step {self.pairs_per_step} must be above 0.")
        require(self.engine != "single" or self.cards == 1, "--engine single is for one card: pass --cards 1.")
        require(
            self.engine in ("auto", "single") or self.cards > 1,
            f"--engine {self.engine} needs several cards: pass --cards N.",
        )


@dataclass
class ScoringConfig:
    """How to load a finished reward model for scoring."""

    base: str | None = option(
        None, "Where the adapter's base is now: a folder or hub id. Unset: where it was in training."
    )
    quantization: Quantization | None = option(None, "Quantization of the base or model; unset: as it was trained.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "Dtype of the arithmetic; auto: as it was trained, but fp32 on a CPU without 16-bit units."
    )
    tokens_per_batch: int = option(
        8192, "Upper bound of a batch's padded size in tokens; lower it when memory runs out."
    )
    share_prefix: SharePrefix = option("auto", SHARE_PREFIX_HELP)
    trust_remote_code: bool = option(False, "Run the model code that a hub repository brings with it.")
    skip_checks: bool = option(
        False,
        "Score without comparing the folder's files and configuration with the hashes in its manifest. Use it for a model "
        "that you changed on purpose.",
    )

    def __post_init__(self) -> None:
        require(self.tokens_per_batch > 0, f"--tokens_per_batch {self.tokens_per_batch} must be above 0.")


@dataclass
class ServeConfig:
    """How to serve a reward model over HTTP."""

    host: str = option("127.0.0.1", "Address to listen on. Others than this machine's own need a token.")
    port: int = option(8000, "Port to listen on; 0 is any free one.")
    token_file: str | None = option(
        None,
        "File whose first line is the token that requests must carry (Authorization: Bearer TOKEN). Unset: the "
        "environment variable QLORA_RM_TOKEN, if there is one.",
    )
    allow_anonymous: bool = option(False, "Serve addresses beyond this machine without a token.")
    allowed_hosts: list[str] = option(
        [],
        "Host and Origin names that requests may use, besides localhost and --host; * allows any. With a token, they are "
        "checked only if this is given. Without one, always: foreign web pages could otherwise reach the server through a "
        "browser.",
    )
    max_wait_ms: float = option(
        5.0, "How long the model may wait for requests that are just being read, to score them together."
    )
    max_queue_sequences: int = option(4096, "Sequences that may wait for the model; beyond it requests get status 503.")
    max_queue_tokens: int = option(1_000_000, "Tokens that may wait for the model; beyond it requests get status 503.")
    max_request_sequences: int = option(512, "Sequences that one request may hold.")
    max_body_bytes: int = option(4_000_000, "Size of a request's body.")
    request_timeout: float = option(
        170.0, "Seconds until a request that has no answer gets status 503; OpenRLHF gives up after 180."
    )
    stop_timeout: float = option(30.0, "Seconds to finish what is waiting when the server is told to stop.")
    skip_golden: bool = option(False, "Serve without scoring the golden items first, which prove the model.")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"--port {self.port} must lie between 0 and 65535.")
        for name in self.allowed_hosts:
            with_port = name.count(":") == 1  # an IPv6 address has more
            require(
                bool(name) and not with_port and not set(name) & set("/@[] "),
                f"--allowed_hosts {name}: give a name or an address alone, without scheme, brackets and port.",
            )
        require(self.max_wait_ms >= 0, f"--max_wait_ms {self.max_wait_ms} must not be negative.")
        for name, value in vars(self).items():
            if name.startswith("max_queue") or name.endswith(("_sequences", "_bytes", "_timeout")):
                require(value > 0, f"--{name} {value} must be above 0.")


READER_NAMES = (
    "transformers",
    "trl",
    "trl-ppo",
    "openrlhf",
    "openrlhf-remote",
    "verl",
    "verl-critic",
    "vllm",
    "sglang",
    "rewardbench",
    "peft",
)
"""Values of `export --for`: the rows of `exporting/consumers.py`, repeated here so that help imports no library."""


@dataclass
class ExportConfig:
    """What an exported folder contains and what it is compared with."""

    policy: str | None = option(
        None,
        "Folder or hub id of the policy, for consumers that pass on its token ids: compare its tokens and template.",
    )
    adapter: str | None = option(None, "Adapter that was merged: its head is compared with the one in the folder.")
    evaluation: str | None = option(
        None, "JSON that `qlora-rm eval --output` wrote; its figures go into the model card."
    )
    normalize: bool = option(
        False, "Write the rewards' mean and deviation into config.json, for OpenRLHF's --reward.normalize_enable."
    )
    copy_weights: bool = option(
        False,
        "Copy the weights. Otherwise hard-link them where the file system allows it, which is fast and takes no space.",
    )
