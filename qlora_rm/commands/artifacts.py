"""The commands that create and verify artifacts: merge, export, sign, verify."""

import argparse
from dataclasses import asdict
from typing import Any

from qlora_rm.bearer import read_token
from qlora_rm.commands.common import EVALUATED, Run, line_of, status_of
from qlora_rm.config import READER_NAMES, DataConfig, ExportConfig, ScoringConfig, ServeConfig, require
from qlora_rm.console import printable
from qlora_rm.errors import UserError
from qlora_rm.options import add_options, read_options


def add_merge(command: argparse.ArgumentParser) -> Run:
    command.add_argument("adapter", metavar="ADAPTER", help="Folder of an adapter that qlora-rm trained.")
    command.add_argument(
        "--output", metavar="DIR", required=True, help="Folder to write; it must not exist, or be empty."
    )
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="Dtype of the weights. [bf16]")
    command.add_argument(
        "--base",
        choices=("dequantized", "original", "both"),
        default="dequantized",
        help="Add the adapter to the base as training's quantization left it, which keeps the scores; to the base as it "
        "was before; or try both on --dataset and keep the better. [dequantized]",
    )
    command.add_argument(
        "--base_model", metavar="FOLDER_OR_HUB_ID", help="Another place of the base than the manifest names."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of a sentence.")
    add_options(command, ScoringConfig, ["trust_remote_code"])
    add_options(command, DataConfig, EVALUATED)
    return _merge


def _merge(options: argparse.Namespace) -> None:
    from qlora_rm.merging.merge import merge
    from qlora_rm.output import as_json

    settings = {name: getattr(options, name) for name in ("dtype", "base_model", "trust_remote_code")}
    if options.base == "both":
        _merge_both(options, settings)
        return
    if options.dataset:
        raise UserError("--dataset is what --base both measures on; pass both of them or neither.")
    merged = merge(options.adapter, options.output, base=options.base, **settings)
    print(
        as_json(asdict(merged))
        if options.json
        else f"{options.output}: {merged.method} to {merged.dtype}; scores differ from the golden ones by {merged.drift:.2g} at most\n",
        end="",
    )


def _merge_both(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    data = read_options(options, DataConfig)
    if not data.dataset:
        raise UserError("--base both measures on held-out pairs: pass --dataset FILE, FOLDER or HUB_ID.")
    from qlora_rm.merging.compare_bases import merge_better
    from qlora_rm.output import as_json

    choice = merge_better(options.adapter, options.output, data, **settings)
    print(as_json(choice.as_dict()) if options.json else "\n".join(choice.lines()) + "\n", end="")


def add_export(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "model", metavar="DIR", help="Folder of a whole model that qlora-rm wrote; of an adapter, for peft."
    )
    command.add_argument(
        "--for",
        dest="readers",
        nargs="+",
        metavar="NAME",
        help=f"Readers that this one folder is for: {', '.join(READER_NAMES)}.",
    )
    command.add_argument(
        "--to-4bit",
        action="store_true",
        help="Quantize a whole model again instead, to serve it in 4 bit, and count what that does to the order of "
        "responses: of the golden items, and of the rows of --dataset.",
    )
    command.add_argument(
        "--output", metavar="DIR", required=True, help="Folder to write; it must not exist, or be empty."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_options(command, ExportConfig)
    add_options(command, ScoringConfig, ["base", "trust_remote_code"])
    add_options(command, DataConfig, EVALUATED)
    return _export


def _export(options: argparse.Namespace) -> int:
    if bool(options.readers) == options.to_4bit:
        raise UserError("Give --for NAME, or --to-4bit: one of the two.")
    if options.to_4bit:
        return _to_4bit(options)
    if options.dataset:
        raise UserError("--dataset is what --to-4bit counts on; --for compares with the golden items.")
    from qlora_rm.exporting.export import export
    from qlora_rm.output import as_json

    exported = export(
        options.model,
        options.readers,
        options.output,
        read_options(options, ExportConfig),
        base=options.base,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print(as_json(exported.as_dict()), end="")
        return 0 if exported.ok else 1
    print(*map(line_of, exported.checks), sep="\n")
    print(*(f"note: {printable(note)}" for note in exported.notes), sep="\n")
    print(*(f"not checked: {printable(what)}" for what in exported.unchecked), sep="\n")
    failed = sum(not check.ok for check in exported.checks)
    readers = ", ".join(exported.readers)
    print(
        f"{options.output} was not written: {failed} of {len(exported.checks)} checks failed for {readers}"
        if failed
        else f"{options.output}: for {readers}; all {len(exported.checks)} checks hold"
    )
    return 1 if failed else 0


def _to_4bit(options: argparse.Namespace) -> int:
    from qlora_rm.exporting.requantize import requantize
    from qlora_rm.merging.compare_bases import token_ids_of
    from qlora_rm.output import as_json

    data = read_options(options, DataConfig)
    yours = token_ids_of(options.model, data, options.trust_remote_code) if data.dataset else []
    done = requantize(options.model, options.output, yours=yours, trust_remote_code=options.trust_remote_code)
    print(as_json(asdict(done)) if options.json else f"{options.output}: in 4 bit; {done}\n", end="")
    return 0


def add_sign(command: argparse.ArgumentParser) -> Run:
    command.epilog = (
        "Hashes show that a folder has not changed; whoever can write it can change both. A signature shows who wrote it. "
        "`qlora-rm verify DIR --key PUBLIC.pem` checks it. openssl genpkey -algorithm ed25519 -out KEY.pem makes a key, and "
        "openssl pkey -in KEY.pem -pubout -out PUBLIC.pem its public half."
    )
    command.add_argument("model", metavar="DIR", help="Folder of an adapter or complete model that qlora-rm wrote.")
    command.add_argument("--key", metavar="FILE", required=True, help="Ed25519 private key in PEM.")
    return _sign


def _sign(options: argparse.Namespace) -> None:
    from qlora_rm.verification.signature import sign

    print(f"{sign(options.model, options.key)}: signed")


def add_verify(command: argparse.ArgumentParser) -> Run:
    command.epilog = (
        "Exit status: 0 where all checks hold, 1 where one failed, 2 where one could not be made (a base that is gone, a "
        "manifest that is not there, a mistake in the options)."
    )
    command.add_argument("model", metavar="DIR", help="Folder of an adapter or complete model that qlora-rm wrote.")
    command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    command.add_argument(
        "--key", metavar="FILE", help="Ed25519 public key in PEM that must have signed the manifest (`qlora-rm sign`)."
    )
    add_options(command, ScoringConfig, ["base", "trust_remote_code"])
    server = command.add_argument_group("A running server instead of the folder's weights")
    server.add_argument("--url", help="Where it is; DIR holds the manifest and the tokenizer of the model it serves.")
    server.add_argument(
        "--protocol",
        choices=("auto", "score", "get_reward", "classify"),
        default="auto",
        help="score is this project's, get_reward OpenRLHF's, classify vLLM's; auto: by the path of the URL, or by asking. [auto]",
    )
    add_options(command, ServeConfig, ["token_file"])
    return _verify


def _verify(options: argparse.Namespace) -> int:
    from qlora_rm.output import as_json
    from qlora_rm.verification.folder import verify

    def tell(check: Any) -> None:
        if not options.json:
            print(line_of(check), flush=True)

    if options.url:
        require(not options.key, "--key has no effect with --url: a server has no signature. Leave it out.")
        checks = _verify_endpoint(options)
        for check in checks:
            tell(check)
    else:
        checks = verify(
            options.model,
            base=options.base,
            trust_remote_code=options.trust_remote_code,
            key=options.key,
            tell=tell,
        )
    status = status_of(checks)
    if options.json:
        print(as_json({"ok": status == 0, "status": status, "checks": [asdict(check) for check in checks]}), end="")
    else:
        print(f"{options.url or options.model}: {_summary(checks)}")
    return status


def _summary(checks: list[Any]) -> str:
    failed, open_ = (sum(not c.ok and c.checked is checked for c in checks) for checked in (True, False))
    if not failed + open_:
        return f"all {len(checks)} checks hold"
    words = [
        f"{n} of {len(checks)} checks {what}" for n, what in ((failed, "failed"), (open_, "could not be made")) if n
    ]
    return ", ".join(words)


def _verify_endpoint(options: argparse.Namespace) -> Any:
    from qlora_rm.verification.server import verify_endpoint

    return verify_endpoint(
        options.model,
        options.url,
        protocol=None if options.protocol == "auto" else options.protocol,
        token=read_token(options.token_file),
        trust_remote_code=options.trust_remote_code,
    )
