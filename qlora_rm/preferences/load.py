"""Loading of the user's data sets: tokenized comparisons, split into training and held-out parts, and a report."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, NamedTuple

from qlora_rm.config import DataConfig
from qlora_rm.errors import UserError
from qlora_rm.preferences.arrow_table import Table
from qlora_rm.preferences.comparison import Candidates, Comparison, Origin
from qlora_rm.preferences.formats import Format, parse_comparison, recognize
from qlora_rm.preferences.gather import gather
from qlora_rm.preferences.load_report import Part, Report
from qlora_rm.preferences.portions import portions
from qlora_rm.preferences.row_errors import Ledger, RowFault
from qlora_rm.preferences.sizes import size_of
from qlora_rm.preferences.sources import Entry, Rows, Source, read_rows, sources
from qlora_rm.preferences.split import digest, hold_out, lowest, repeat
from qlora_rm.preferences.text_as import Kind, TrainedText
from qlora_rm.preferences.tokenization import Tokenization, check_wins
from qlora_rm.preferences.values import Row
from qlora_rm.progress import Phase

if TYPE_CHECKING:
    from datasets import Dataset

RECOGNIZED_BY = 100
"""Number of a file's first rows that determine its format."""

TOKENIZED_AT_ONCE = 512
BYTES_AT_ONCE = 4_000_000
"""Bytes of text that end a batch early, both when a format is recognized and when rows are tokenized."""
GOLDEN = 8
MOST_MIXED = 100_000_000

HOLD_OUT_HINT = "Give --eval_dataset or --eval_split, raise --eval_fraction, or pass --eval_strategy no."


class PreferenceData(NamedTuple):
    """The data of a training run; `train` and `held_out` have the columns of `arrow_table.SCHEMA`.

    Attributes:
        held_out: None if nothing is held out.
        fingerprint: sha256 over the comparisons of both parts in order; ranks with equal fingerprints read equal data.
        golden_candidates: a few untokenized held-out prompts with their responses, of varied lengths and of the
            training rows' kinds; from the training rows if nothing of these kinds is held out.
        trained_on: the kinds of all training rows, see `text_as.Kind`.
    """

    train: "Dataset"
    held_out: "Dataset | None"
    report: Report
    fingerprint: str
    golden_candidates: list[Candidates]
    trained_on: list[Kind]


def load_preferences(config: DataConfig, tokenization: Tokenization, *, need_eval: bool) -> PreferenceData:
    """Read, tokenize, split and mix the data sets of `config`.

    Arguments:
        need_eval: the run will evaluate, so an empty held-out part is an error.

    Raises:
        UserError: no row is readable, a row is faulty (unless skipped), or no training or held-out comparison is left.
    """
    of_train = sources(config.dataset, config, config.dataset_weights)
    table, ledger = _read(of_train, config, tokenization)
    everything = range(len(table.facts))
    if (of_eval := _held_out_sources(config, of_train)) is not None:
        eval_table, eval_ledger = _read(of_eval, config, tokenization)
        ledgers = {"training data": ledger, "held-out data": eval_ledger}
        train, held, notes = list(everything), list(range(len(eval_table.facts))), _leaks(table, eval_table)
    else:
        eval_table, ledgers, notes = table, {"data": ledger}, []
        is_held = hold_out([fact.prompt for fact in table.facts], config.eval_fraction)
        train, held = ([row for row in everything if is_held[row] is side] for side in (False, True))
    train, mixing = _mixed(table, train, of_train)
    held, choice = _limited(eval_table, held, config.max_eval_comparisons)
    _require_both(table, train, held, need_eval)
    kinds = {table.facts[row].kind for row in train}
    alike = [row for row in held if eval_table.facts[row].kind in kinds]
    notes = [*notes, *_of_another_kind(kinds, {eval_table.facts[row].kind for row in held})]
    parts = {"training": Part.of(table.facts, train)} | ({"held-out": Part.of(eval_table.facts, held)} if held else {})
    contents = [table.facts[row].content for row in train], [eval_table.facts[row].content for row in held]
    training = table.dataset().select(train)
    if config.group_by_prompt:
        training = gather(training, [table.facts[row].prompt for row in train])
        notes = [*notes, f"training: {len(train):,} comparisons gathered by prompt into {len(training):,}"]
    return PreferenceData(
        train=training,
        held_out=eval_table.dataset().select(held) if held else None,
        report=Report(ledgers, parts, [*notes, *mixing, *choice]),
        fingerprint=digest(*contents[0], b"held out", *contents[1]).hex(),
        golden_candidates=eval_table.sample(alike, GOLDEN) if alike else table.sample(train, GOLDEN),
        trained_on=sorted(kinds),
    )


def load_comparisons(
    entries: Sequence[Entry], config: DataConfig, tokenization: Tokenization, text: TrainedText | None = None
) -> tuple["Dataset", Report]:
    """Return all comparisons of `entries` for an evaluation: tokenized, neither split nor mixed.

    Arguments:
        text: how the model reads plain text; None reads rows as training does.

    Raises:
        UserError: no row is readable, or a row is faulty (unless skipped).
    """
    table, ledger = _read(sources(entries, config), config, tokenization, text)
    return table.dataset(), Report({"data": ledger}, {"comparisons": Part.of(table.facts, range(len(table.facts)))})


def _held_out_sources(config: DataConfig, of_train: Sequence[Source]) -> list[Source] | None:
    """Return the data sets that are entirely held out; None if a share of the prompts is held out instead."""
    if config.eval_dataset:
        return sources(config.eval_dataset, config)
    if config.eval_split:
        return [replace(source, split=config.eval_split) for source in of_train]
    return None


def _read(
    of: Sequence[Source], config: DataConfig, tokenization: Tokenization, text: TrainedText | None = None
) -> tuple[Table, Ledger]:
    table, ledger = Table(), Ledger(config.on_bad_row, tokenization.over_long)
    for entry, source in enumerate(of):
        comparisons = _comparisons(source, config, ledger, text)
        unit = "rows" if len(of) == 1 else f"rows of {source.name}"
        with Phase("reading", unit=unit) as reading:  # may download, parse a JSON file, or count rows
            first = list(islice(comparisons, 1))
        with Phase("tokenizing", reading.total, unit) as phase:
            comparisons = chain(first, comparisons)
            for batch in portions(comparisons, lambda item: item.candidates.size[1], TOKENIZED_AT_ONCE, BYTES_AT_ONCE):
                _add(table, ledger, batch, tokenization, source, entry)
                phase.done = ledger.rows[source.name]
    if not table.facts:
        raise UserError(f"No comparison is left of {sum(ledger.rows.values())} rows. " + ". ".join(ledger.lines()))
    return table, ledger


def _add(
    table: Table, ledger: Ledger, batch: list[Comparison], tokenization: Tokenization, source: Source, entry: int
) -> None:
    """Tokenize a batch; add its good rows to the table and the others to the ledger."""
    results = tokenization.tokenize_each([comparison.candidates for comparison in batch])
    for comparison, result in zip(batch, results, strict=True):
        try:
            if isinstance(result, RowFault):
                raise result
            check_wins(result.tokens, comparison.preferences.wins)
        except RowFault as fault:
            ledger.fault(comparison.origin, fault)
            continue
        table.append(comparison, result, entry)
        ledger.kept[source.name] += 1


def _comparisons(source: Source, config: DataConfig, ledger: Ledger, text: TrainedText | None) -> Iterator[Comparison]:
    """Yield the good rows of `source`, parsed in the format of their file's first rows; the others go to the ledger."""
    of_source = read_rows(source, config.dataset_split, config.max_row_bytes)
    for file, rows in groupby(of_source, key=lambda item: item[0].file):
        form: Format | None = None
        while form is None and (head := _head(rows)):
            readable = [row for _, row in head if isinstance(row, dict)]
            if readable:
                form = recognize(readable, file)
                ledger.format_of(file, form.name, form.unread(readable))
            yield from _good(head, form, source, config, ledger, text)
        yield from _good(rows, form, source, config, ledger, text)


def _good(
    rows: Iterable[tuple[Origin, Row | RowFault]],
    form: Format | None,
    source: Source,
    config: DataConfig,
    ledger: Ledger,
    text: TrainedText | None,
) -> Iterator[Comparison]:
    """Yield the comparisons of `rows`; `form` is None if none of them can be read."""
    for origin, row in rows:
        ledger.rows[source.name] += 1
        try:
            if isinstance(row, RowFault):
                raise row
            assert form is not None
            comparison = parse_comparison(row, form, origin, source.name, config.hh_turns, text)
        except RowFault as fault:
            ledger.fault(origin, fault)
            continue
        yield comparison


def _head(rows: Rows) -> list[tuple[Origin, Row | RowFault]]:
    """Return the next rows until `RECOGNIZED_BY` of them are readable; fewer if they are long or most are faulty."""
    head, readable, size = [], 0, 0
    for item in islice(rows, 10 * RECOGNIZED_BY):
        head.append(item)
        if isinstance(item[1], dict):
            readable += 1
            size += size_of(item[1])
        if readable == RECOGNIZED_BY or size > BYTES_AT_ONCE:
            break
    return head


def _leaks(train: Table, held_out: Table) -> list[str]:
    """Return a warning if prompts of user-given held-out data are also in the training data."""
    prompts = {fact.prompt for fact in held_out.facts}
    both = prompts & {fact.prompt for fact in train.facts}
    if not both:
        return []
    return [f"warning: {len(both):,} of the {len(prompts):,} held-out prompts stand in the training data too"]


def _of_another_kind(train: set[Kind], held_out: set[Kind]) -> list[str]:
    """Return a warning if held-out rows are of kinds that no training row has."""
    if held_out <= train:
        return []
    kinds = " and ".join(sorted(held_out - train))
    return [
        f"warning: some held-out rows are {kinds}, and the training rows are {' and '.join(sorted(train))}: such rows are "
        "scored as they are, which training did not see"
    ]


def _mixed(table: Table, train: list[int], of: Sequence[Source]) -> tuple[list[int], list[str]]:
    """Return the training rows with each data set repeated or reduced by its weight, and notes for the report."""
    if all(source.weight == 1 for source in of):
        return train, []
    contents = [fact.content for fact in table.facts]
    mixed: list[int] = []
    notes = []
    for entry, source in enumerate(of):
        rows = [row for row in train if table.facts[row].entry == entry]
        if len(rows) * source.weight > MOST_MIXED:
            raise UserError(
                f"--dataset_weights: {source.name} x {source.weight:g} would be {len(rows) * source.weight:,.0f} comparisons; "
                f"at most {MOST_MIXED:,} are mixed. Lower its weight, and train for more epochs."
            )
        taken = repeat(rows, source.weight, contents)
        notes.append(f"mixing: {source.name} x {source.weight:g}: {len(rows):,} -> {len(taken):,} comparisons")
        mixed += taken
    return mixed, notes


def _limited(table: Table, held: list[int], limit: int | None) -> tuple[list[int], list[str]]:
    if limit is None or len(held) <= limit:
        return held, []
    kept = lowest(held, [fact.prompt + fact.content for fact in table.facts], limit)
    return kept, [f"held-out: {len(kept):,} of {len(held):,} comparisons kept (--max_eval_comparisons)"]


def _require_both(table: Table, train: list[int], held: list[int], need_eval: bool) -> None:
    if not train:
        prompts = len({fact.prompt for fact in table.facts})
        raise UserError(
            f"No training comparison is left: all {len(table.facts)} comparisons ({prompts} distinct prompts) are held "
            "out or weighted away. Give more rows, name held-out rows by --eval_dataset, or pass --eval_fraction 0."
        )
    if need_eval and not held:
        raise UserError(f"No comparison is held out, and the run is to evaluate. {HOLD_OUT_HINT}")
