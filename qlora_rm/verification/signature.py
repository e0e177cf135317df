"""Ed25519 signatures (RFC 8032) of manifests: they prove who wrote a model folder; hashes prove only integrity.

The signature covers the bytes of `rm_manifest.json`, which holds the hashes of all files that a consumer loads. It is
stored next to it in `rm_manifest.json.sig`, in base64. Keys are PEM files, as written by `openssl genpkey -algorithm
ed25519` and `openssl pkey -pubout`.
"""

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_rm.artifacts.as_written import WITHOUT_CONFIGURATIONS, config_changes, file_changes
from qlora_rm.artifacts.folders import artifact_kind
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.errors import UserError
from qlora_rm.verification.checks import Check

SIGNATURE_NAME = f"{FILE_NAME}.sig"
LONGEST = 1000
"""Largest signature file, in bytes."""


def sign(folder: str, key: str) -> Path:
    """Sign the manifest of `folder` with the private key in the file `key`; return the signature's file.

    Raises:
        UserError: the folder differs from its manifest, the manifest does not list all files, or the key cannot be
            used.
    """
    private = _private_key(key)
    artifact_kind(folder)
    manifest = Manifest.load(folder)
    if manifest.schema_version <= WITHOUT_CONFIGURATIONS:
        raise UserError(
            f"The manifest of {folder} is of schema version {manifest.schema_version}, which does not list all files that a "
            "reader loads. Write a new folder with `qlora-rm export` or `qlora-rm merge`, and sign that."
        )
    if changes := [*file_changes(folder, manifest), *config_changes(folder, manifest)]:
        raise UserError(f"{folder} is not as its manifest says: {changes[0]}. Only an unchanged folder is signed.")
    path = Path(folder) / SIGNATURE_NAME
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        signature = private.sign((Path(folder) / FILE_NAME).read_bytes())
        beside.write_bytes(base64.b64encode(signature) + b"\n")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def public_key(path: str) -> Any:
    """Read the Ed25519 public key in a PEM file.

    Raises:
        UserError: the file holds none, or the library `cryptography` is not installed.
    """
    serialization, kinds, _ = _library()
    try:
        found = serialization.load_pem_public_key(_read_key(path))
    except (ValueError, TypeError, _unsupported()) as error:
        raise UserError(
            f"--key {path} holds no public key in PEM. `openssl pkey -in PRIVATE.pem -pubout` writes it."
        ) from error
    if not isinstance(found, kinds.Ed25519PublicKey):
        raise UserError(f"--key {path} holds a key of another kind than Ed25519.")
    return found


def check_signature(folder: str, key: Any) -> Iterator[Check]:
    """Check that the owner of the public key `key` signed the manifest's bytes."""
    _, _, invalid = _library()
    path, name = Path(folder) / SIGNATURE_NAME, "manifest is signed with the key"
    try:
        content, signature = (Path(folder) / FILE_NAME).read_bytes(), _signature(path)
    except FileNotFoundError as error:
        yield Check(name, False, f"{Path(str(error.filename)).name} is not there")
        return
    try:
        key.verify(signature, content)
    except invalid:
        yield Check(name, False, f"{SIGNATURE_NAME} is not a signature of this {FILE_NAME} by this key")
        return
    yield Check(name, True)


def _signature(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(LONGEST)
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        return b""


def _private_key(path: str) -> Any:
    serialization, kinds, _ = _library()
    try:
        found = serialization.load_pem_private_key(_read_key(path), password=None)
    except TypeError as error:  # raised by the library if a password is missing
        raise UserError(
            f"--key {path} is encrypted. Decrypt it first: `openssl pkey -in {path} -out KEY.pem`."
        ) from error
    except (ValueError, _unsupported()) as error:
        raise UserError(
            f"--key {path} holds no private key in PEM. `openssl genpkey -algorithm ed25519 -out KEY.pem` makes one."
        ) from error
    if not isinstance(found, kinds.Ed25519PrivateKey):
        raise UserError(f"--key {path} holds a key of another kind than Ed25519.")
    return found


def _read_key(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise UserError(f"--key {path} cannot be read: {error.strerror}.") from error


def _library() -> tuple[Any, Any, type[Exception]]:
    """The used parts of `cryptography`, an optional dependency: key parsing, Ed25519, invalid-signature error."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise UserError("Signatures need the library cryptography: pip install 'qlora_rm[sign]'.") from error
    return serialization, ed25519, InvalidSignature


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
