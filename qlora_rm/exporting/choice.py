"""Resolve the names after `--for` to consumers, and refuse impossible exports before any file is written."""

from qlora_rm.backbone.load import read_model_config
from qlora_rm.errors import UserError
from qlora_rm.exporting.consumer import WITH_BIAS_IN_SGLANG, Reader
from qlora_rm.exporting.consumers import READERS, UNSUPPORTED


def reader_named(name: str) -> Reader:
    """Return the consumer called `name`.

    Raises:
        UserError: no such consumer, or one that cannot load reward models, with the reason.
    """
    for reader in READERS:
        if reader.name == name:
            return reader
    if name in UNSUPPORTED:
        raise UserError(f"--for {name} is not possible. {UNSUPPORTED[name]}")
    raise UserError(f"--for {name}: no such reader. There are {', '.join(reader.name for reader in READERS)}.")


def require_readable(readers: list[Reader], folder: str, kind: str, trust_remote_code: bool = False) -> None:
    """Refuse, before anything is written, a model that one of the consumers could not score correctly.

    Raises:
        UserError: with the consumer, the reason and a remedy.
    """
    if len({reader.takes for reader in readers}) > 1:
        raise UserError("--for peft takes an adapter, the other readers a whole model: export them apart.")
    if readers[0].takes != kind:
        raise UserError(
            f"{folder} is an adapter, and {readers[0].name} reads whole models. Run `qlora-rm merge {folder} --output "
            "MERGED` and export MERGED."
            if kind == "adapter"
            else f"{folder} is a whole model, and peft reads adapters: export the training run's output."
        )
    if kind == "adapter":
        return
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    others = [reader.name for reader in readers if not reader.reads_4bit]
    if others and getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder} is in 4 bit, which {', '.join(others)} is not known to read: export the model it was made from."
        )
    architecture = (config.architectures or ["unknown"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise UserError(f"{folder} is no reward model: a {architecture} has no score head.")
    for reader in readers:
        if reader.architectures is not None and architecture not in reader.architectures:
            listed = ", ".join(sorted(name.removesuffix("ForSequenceClassification") for name in reader.architectures))
            raise UserError(
                f"{reader.name} ({reader.versions}) is not known to score a {architecture} rightly; it is exported for "
                f"{listed}."
            )
    names = {reader.name for reader in readers}
    if "sglang" in names and names & {"vllm", "verl"} and architecture in WITH_BIAS_IN_SGLANG:
        raise UserError(
            f"sglang wants a bias of the head in a {architecture}, and vllm (verl's engine too) refuses one: export them apart."
        )
