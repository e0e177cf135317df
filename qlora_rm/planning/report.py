"""A plan, for people and as JSON: the backbone's weights, memory of a step, what fits, and the command to launch."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from qlora_rm.backbone.limits import positions_of_config
from qlora_rm.backbone.paths import is_local
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.config import AdapterConfig, BackboneConfig, DataConfig, PlanConfig, require
from qlora_rm.console import say, table
from qlora_rm.errors import UserError
from qlora_rm.planning.engines import CARDS_PER_NODE, Engines
from qlora_rm.planning.fit_check import nearest
from qlora_rm.planning.gpus import GB, Card, card_named
from qlora_rm.planning.launch import MODEL, ROWS, launch_line
from qlora_rm.planning.memory import Engine, Memory, Setting, host, loading
from qlora_rm.planning.planner import Planner, require_shares
from qlora_rm.planning.published_shapes import published, read_shape
from qlora_rm.planning.workload import Layout, Workload
from qlora_rm.preferences import Tokenization, load_comparisons

TERMS = tuple(Memory.__dataclass_fields__)


@dataclass(frozen=True)
class Answer:
    """The plan for one kind of device: the fastest setting that fits, or the nearest one that would.

    Attributes:
        settings: each engine with its fastest setting that fits (its leanest, where none does), and its memory.
        fastest: the fastest of all that fit; None where none does.
        hint: in that case, the nearest setting that would fit.
    """

    card: Card
    settings: list[tuple[Setting, Memory, bool]]
    fastest: Setting | None
    line: str | None
    hint: str | None

    def as_dict(self) -> dict[str, Any]:
        settings = [
            {**asdict(setting), **vars(memory), "total": memory.total, "fits": fits}
            for setting, memory, fits in self.settings
        ]
        fastest = asdict(self.fastest) if self.fastest else None
        return {
            "card": self.card.name, "memory": self.card.memory, "settings": settings, "fastest": fastest, "line": self.line,
            "hint": self.hint,
        }  # fmt: skip


def answer(planner: Planner, card: Card, ranks: int, engine: Engine | None, options: dict[str, Any]) -> Answer:
    """The answer for `ranks` devices of one kind."""
    settings = []
    for name in [engine] if engine else planner.engines.of(ranks):
        setting = planner.fastest(card, ranks, name)
        shown = setting or planner.leanest(card, ranks, name)
        settings.append((shown, planner.memory(shown, card), setting is not None))
    fastest = planner.fastest(card, ranks, engine)
    if fastest is None:
        return Answer(card, settings, None, None, nearest(planner, planner.leanest(card, ranks, engine), card))
    return Answer(card, settings, fastest, launch_line(fastest, options, cuda=card.is_cuda), None)


@dataclass(frozen=True)
class Plan:
    """The content of `qlora-rm plan`'s output."""

    name: str
    planner: Planner
    ranks: int
    answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name, "ranks": self.ranks, "weights": vars(self.planner.weights),
            "layout": vars(self.planner.layout), "longest": self.planner.workload.longest,
            "activations": [row | {"rows": batch.rows, "length": batch.length} for row, batch in self._activations()],
            "cards": [answer.as_dict() for answer in self.answers],
        }  # fmt: skip

    def lines(self) -> list[str]:
        weights = self.planner.weights
        lines = [
            f"{self.name}: {weights.parameters / 1e9:.2f} billion weights, {weights.active / 1e9:.2f} of them at work on a "
            f"token, {weights.trainable / 1e6:.1f} million trained",
            f"whole, GB: packed {gb(weights.packed)}, their scales {gb(weights.scales)}, embeddings and norms "
            f"{gb(weights.plain)}, adapter and head {gb(weights.trained)}, their optimizer {gb(8 * weights.trainable)}",
            "",
            f"activations of a micro-batch, GB ({self.planner.layout.kernel} attention, sequences of up to "
            f"{self.planner.workload.longest} tokens, {'each prompt once' if self.planner.layout.packed else 'padded'}):",
            *table(
                ("comparisons", "rows x tokens", "kept", "at the peak", "kept, checkpointed", "at the peak"),
                [
                    (str(row["pairs"]), f"{batch.rows} x {batch.length}", *(gb(row[k]) for k in ("kept", "peak", "kept_checkpointed", "peak_checkpointed")))
                    for row, batch in self._activations()
                ],
            ),
        ]  # fmt: skip
        for found in self.answers:
            lines += ["", *self._answer_lines(found)]
        return lines

    def _activations(self) -> list[tuple[dict[str, int], Any]]:
        rows = []
        for pairs in (1, 4):
            batch = self.planner.workload.batch(pairs)
            plain, saved = (
                self.planner.step(Setting("single", 1, pairs, 2, checkpointing)) for checkpointing in (False, True)
            )
            rows.append(({"pairs": pairs, "kept": plain.kept, "peak": plain.peak, "kept_checkpointed": saved.kept,
                          "peak_checkpointed": saved.peak}, batch))  # fmt: skip
        return rows

    def _answer_lines(self, found: Answer) -> list[str]:
        heading = f"{self.ranks} x {found.card.name}" if found.card.name != "CPU" else (
            f"{self.ranks} CPU processes with {gb(found.card.memory)} GB each"
        )  # fmt: skip
        lines = [f"{heading}, GB a rank:"]
        lines += table(
            ("engine", "comparisons", "checkpointing", *TERMS, "total", "fits"),
            [
                (s.engine, f"{s.pairs} x {s.accumulation}", "yes" if s.checkpointing else "no", *(gb(getattr(m, t)) for t in TERMS), gb(m.total), "yes" if fits else "no")
                for s, m, fits in found.settings
            ],
        )  # fmt: skip
        if found.fastest is None:
            return [*lines, f"nothing fits. {found.hint}"]
        weights = self.planner.weights
        beside = f"while loading {gb(loading(weights, found.fastest))} GB a rank"
        if offloaded := host(weights, found.fastest):
            beside += f"; host memory {gb(offloaded)} GB a rank"
        return [*lines, f"the fastest that fits: {found.fastest.engine}; {beside}", f"  {found.line}"]


def make_plan(
    model: str | None, options: PlanConfig, backbone: BackboneConfig, adapter: AdapterConfig, data: DataConfig
) -> Plan:
    """Plan for a model (a folder, hub id or config.json) or a published shape.

    Raises:
        UserError: neither or both are given, there is no such model, or there is data but no tokenizer to read it.
    """
    if (model is None) == (options.params is None):
        raise UserError("Give a MODEL (folder, hub id or config.json) or --params SIZE: one of the two.")
    _require_effect(model, options, backbone, data)
    cards = [card_named(word) for word in options.card]
    cuda = cards[0].is_cuda
    if any(card.is_cuda != cuda for card in cards):
        raise UserError("--card: plan for cards or for a CPU, not for both at once.")
    engine = None if options.engine == "auto" else options.engine
    per_node = CARDS_PER_NODE if cuda else None
    Engines(cuda, per_node, backbone.quantization).require(engine, options.cards)
    require_shares(options.pairs_per_step, options.cards)
    if model is None:
        config = published(str(options.params))
    else:
        config = read_shape(model, backbone.model_revision, options.trust_remote_code)
    options = _within_positions(options, config, model or str(options.params))
    precision = options.precision or ("bf16" if cuda else "fp32")
    planner = Planner(
        config,
        backbone,
        adapter,
        DTYPES[precision],
        partial(workload_of, model, options, data, getattr(config.get_text_config(), "vocab_size", None)),
        cuda=cuda,
        pairs_per_step=options.pairs_per_step,
        per_node=per_node,
        trust_remote_code=options.trust_remote_code,
    )
    line = door_words(model, options, backbone, adapter, data, precision)
    answers = [answer(planner, card, options.cards, engine, line) for card in cards]
    return Plan(model or str(options.params), planner, options.cards, answers)


def _require_effect(model: str | None, options: PlanConfig, backbone: BackboneConfig, data: DataConfig) -> None:
    """Raise a `UserError` for an option that this plan does not read."""
    if data.dataset:
        idle: dict[str, tuple[Any, ...]] = {"--dataset is measured": (options, PlanConfig(), "share", "responses")}
    else:
        rows = ("dataset_config", "dataset_split", "columns", "hh_turns", "on_bad_row", "max_row_bytes", "over_long")
        idle = {"there is no --dataset": (data, DataConfig(), *rows)}
    if model is None:
        idle["--params is a published shape"] = (backbone, BackboneConfig(), "model_revision")
    elif is_local(model):
        idle[f"{model} is a folder or file, which has no revisions"] = (backbone, BackboneConfig(), "model_revision")
    for reason, (given, default, *names) in idle.items():
        for name in names:
            value = getattr(given, name)
            require(value == getattr(default, name), f"--{name} {value} has no effect: {reason}. Leave it out.")


def _within_positions(options: PlanConfig, config: PretrainedConfig, name: str) -> PlanConfig:
    """Lower a default `--max_length` to the backbone's positions, as training does.

    Raises:
        UserError: `--max_length` is not the default and exceeds the positions.
    """
    positions, default = positions_of_config(config, options.trust_remote_code), PlanConfig().max_length
    if positions is None or options.max_length <= positions:
        return options
    if options.max_length != default:
        raise UserError(
            f"--max_length {options.max_length} is more than the {positions} positions of the backbone {name}. Pass "
            f"--max_length {positions}."
        )
    say(f"max_length: {positions}, since {name} has no more positions; the default is {default}")
    return replace(options, max_length=positions)


def workload_of(
    model: str | None, options: PlanConfig, data: DataConfig, vocabulary: int | None, layout: Layout
) -> Workload:
    """The workload, measured where there is data, assumed otherwise."""
    if not data.dataset:
        return Workload.assumed(options.max_length, options.share, options.responses, layout)
    if model is None:
        raise UserError("--dataset is read by the MODEL's tokenizer, and --params has none: give the MODEL.")
    tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
    vocabulary = max(vocabulary, len(tokenizer)) if vocabulary else None
    tokenization = Tokenization(tokenizer, options.max_length, data.over_long, vocabulary)
    rows, report = load_comparisons(data.dataset, data, tokenization)
    say(*report.lines())
    return Workload.measured(rows, layout)


def door_words(
    model: str | None,
    options: PlanConfig,
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    precision: str,
) -> dict[str, Any]:
    """The options of the train command that a plan depends on and that are not defaults."""
    words: dict[str, Any] = {
        "model_name_or_path": model or MODEL,
        "dataset": data.dataset or ROWS,
        "max_length": options.max_length,
    }
    for given in (backbone, adapter):
        default = vars(type(given)())
        words |= {name: value for name, value in vars(given).items() if value != default[name]}
    if precision != "bf16":
        words["bf16"] = False
    return words | ({"fp16": True} if precision == "fp16" else {})


def gb(size: float) -> str:
    return f"{size / GB:.2f}" if size < 9.995 * GB else f"{size / GB:.1f}"
