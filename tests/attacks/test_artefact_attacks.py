"""Every command refuses a model folder that was changed, by accident or on purpose, and never renders, runs or trusts it."""

import copy
import json
import math
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.allowed import allowed_between_layouts, allowed_drift
from qlora_rm.artifacts.golden import ROUNDED, GoldenItem, drift
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.artifacts.noise import tolerance
from qlora_rm.cli import main
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.verification.checks import Check, check_files
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, seal_again

CATEGORY = "Model folders: tampering and damage"
DTYPES = ("fp32", "bf16")
Change = Callable[[Path], None]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Merged models, by the dtype of training and storage."""
    folders = {dtype: tmp_path_factory.mktemp("merged") / dtype for dtype in DTYPES}
    for dtype, folder in folders.items():
        merge(str(llama_adapter(dtype)), str(folder), dtype=dtype)  # type: ignore[arg-type]
    return folders


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["adapter", "whole"])
def folder(request: pytest.FixtureRequest, dtype: str, tmp_path: Path, wholes: dict[str, Path]) -> Path:
    """A copy of an artifact to change."""
    return copy_of(llama_adapter(dtype) if request.param == "adapter" else wholes[dtype], tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return copy_of(llama_adapter(), tmp_path / "model")


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))


def failed(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(str(folder)) if not check.ok}


def weights_of(folder: Path) -> Path:
    return next(path for path in folder.glob("*model.safetensors"))


def negate_head(folder: Path) -> None:
    path = weights_of(folder)
    tensors = load_file(path)
    name = next(name for name in tensors if "score" in name)
    save_file(tensors | {name: -tensors[name]}, path, {"format": "pt"})


# 1. numbers that would let anything pass


@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN", "1e999", "1e10", "true", '"7"', "1" + "0" * 400])
def test_golden_scores_that_no_model_can_miss_are_refused(folder: Path, word: str) -> None:
    content = content_of(folder)
    content["golden"][0]["scores"] = ["SCORE" for _ in content["golden"][0]["scores"]]
    content["content_sha256"] = None
    negate_head(folder)
    (folder / FILE_NAME).write_text(json.dumps(content).replace('"SCORE"', word))
    with pytest.raises(UserError, match=FILE_NAME):
        Manifest.load(folder)
    assert main(["score", str(folder), "--prompt", "x", "--responses", "a"]) == 2


@pytest.mark.slow
def test_a_negated_head_fails_though_the_hashes_are_updated(folder: Path) -> None:
    negate_head(folder)
    assert "files are those that were written" in failed(folder)
    seal_again(folder)
    assert "golden scores are given again" in failed(folder)


@pytest.mark.parametrize("golden", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("now", [math.nan, math.inf])
def test_drift_of_what_is_no_number_fails(golden: float, now: float) -> None:
    item = GoldenItem("", ["a", "b"], [[1], [2]], [golden, 1.0])
    assert not drift([item], [[now, 1.0]], ROUNDED).ok


# 2. words, and every other field


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quantization",), "banana"),
        (("quantization",), "NONE"),
        (("compute_dtype",), "banana"),
        (("compute_dtype",), "int8"),
        (("contract", "over_long"), "ignore"),
        (("contract", "score_position"), "anywhere"),
        (("contract", "trained_on"), ["songs"]),
        (("contract", "text_as"), "song"),
        (("contract", "max_length"), 0),
        (("contract", "pad_token_id"), -1),
        (("contract", "date"), "yesterday"),
        (("contract", "chat_template_sha256"), "abc"),
        (("noise", "fp8"), {"largest": 0.1, "typical": 0.1, "layouts": 0.1}),
        (("noise", "fp32", "largest"), 1e5),
        (("noise", "fp32", "largest"), -1),
        (("noise", "fp32", "typical"), 5.0),
        (
            ("history",),
            [{"name": "bless", "settings": {}, "drift": 0, "flips": 0, "pairs": 0, "scores": None, "versions": {}}],
        ),
        (("files", "../../secret"), "0" * 64),
        (("golden", 0, "responses"), []),
        (("golden", 0, "scores"), [1.0]),
        (("golden", 0, "token_ids", 0, 0), -1),
        (("versions", "torch"), 2),
        (("schema_version",), 0),
        (("schema_version",), True),
    ],
    ids=str,
)
def test_no_field_takes_a_word_or_number_that_it_does_not_know(
    adapter: Path, path: tuple[Any, ...], value: Any
) -> None:
    """The message names file and field, even if the manifest's own hash was updated."""
    content = content_of(adapter)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    edit_json(adapter / FILE_NAME, **content)
    with pytest.raises(UserError, match=FILE_NAME) as refused:
        Manifest.load(adapter)
    named = next(str(key) for key in path if isinstance(key, str))
    assert named in str(refused.value).replace("schema version", "schema_version")


def test_an_unknown_word_never_widens_the_tolerance() -> None:
    items, noise = Manifest.load(llama_adapter()).golden, Manifest.load(llama_adapter()).noise
    for word in ("banana", "", "FP32", "bf16 "):
        with pytest.raises(UserError, match="no tolerance follows"):
            tolerance(items, noise, "fp32", word)


def mutated(content: Any, chance: random.Random) -> Any:
    """Return a copy in which one value is changed, removed, added, or replaced by one of another type."""
    whole = copy.deepcopy(content)
    places = []

    def visit(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                visit(value[key])

    visit(whole)
    holder, key = chance.choice(places)
    old = holder[key]
    kind = chance.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = old
    elif kind == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = chance.choice([old + 1, -old - 1, old * 1.5 + 0.1, 0, 1e300, -1e300, 2**70])
    else:
        choices = ["banana", None, 0, 1.5, [], {}, True, "0" * 64, "none", "8bit", "bf16", "fp16"]
        holder[key] = chance.choice([choice for choice in choices if choice != old or type(choice) is not type(old)])
    return whole


@pytest.mark.slow
def test_a_manifest_with_any_one_change_is_refused_or_allows_no_more(
    adapter: Path, tries: Callable[[int], None]
) -> None:
    content, chance = content_of(adapter), random.Random(12)
    before = Manifest.load(adapter)
    number, read, refusals = 600, 0, list[str]()
    for _ in range(number):
        (adapter / FILE_NAME).write_text(json.dumps(mutated(content, chance)), encoding="utf-8")
        try:
            found = Manifest.load(adapter)
        except UserError as error:
            refusals.append(str(error))
            continue
        read += 1
        for computes_in in ("fp32", "bf16", "fp16"):
            assert allowed_drift(found, computes_in) == allowed_drift(before, computes_in)
            assert allowed_between_layouts(found, computes_in) == allowed_between_layouts(before, computes_in)
        assert found == before, "only its own hash may be left out"
    assert read < number / 50
    assert all(FILE_NAME in refusal for refusal in refusals)
    tries(number)


# 3. every command checks before it scores


ROW = '{"prompt": "a ", "chosen": "b", "rejected": "c"}\n'
NAMED = {
    "score": ["--prompt", "x", "--responses", "a"],
    "eval": ["--dataset", "ROWS"],
    "serve": ["--port", "0", "--skip_golden"],
    "verify": [],
    "merge": ["--output", "OUT"],
    "export": ["--for", "peft", "--output", "OUT"],
    "train": ["--adapter", "MODEL", "--dataset", "ROWS", "--output_dir", "OUT"],
}


def said_by(command: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (tmp_path / "rows.jsonl").write_text(ROW)
    places = {"ROWS": str(tmp_path / "rows.jsonl"), "OUT": str(tmp_path / "out"), "MODEL": str(folder)}
    words = [places.get(word, word) for word in NAMED[command]]
    try:
        status = main([command, *([] if command == "train" else [str(folder)]), *words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    except UserError as error:  # train's own entry point prints it
        return 2, str(error)
    out, err = capfd.readouterr()
    return status, out + err


@pytest.mark.slow
@pytest.mark.parametrize("command", NAMED)
@pytest.mark.parametrize("change", ["template", "head", "base", "extra file"])
def test_every_command_refuses_a_changed_folder(
    command: str, change: str, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if change == "template":
        template = adapter / "chat_template.jinja"
        template.write_text("{% if 'bees' in messages|string %}Yes.{% endif %}" + template.read_text(encoding="utf-8"))
        named = "chat_template.jinja has changed"
    elif change == "head":
        negate_head(adapter)
        named = "adapter_model.safetensors has changed"
    elif change == "base":
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="stranger/model")
        named = "adapter_config.json"
    else:
        (adapter / "modeling_bees.py").write_text("raise SystemExit(77)\n")
        edit_json(adapter / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_bees.Bees", None]})
        named = "tokenizer_config.json has changed"
    status, said = said_by(command, adapter, tmp_path, capfd)
    assert status == (1 if command == "verify" else 2), said
    assert named in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or command == "train"


def test_checks_can_be_left_out_and_that_is_said(adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    negate_head(adapter)
    assert main(["score", str(adapter), "--prompt", "x", "--responses", "a", "--skip_checks"]) == 0
    assert "--skip_checks" in capfd.readouterr().err


def test_a_second_start_does_not_hash_again(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_rm.artifacts import hash_cache

    hashed: list[str] = []
    whole = hash_cache.hash_file
    monkeypatch.setattr(hash_cache, "hash_file", lambda path: hashed.append(path.name) or whole(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr(hash_cache, "SMALL", 1)
    monkeypatch.setattr(hash_cache, "SETTLED", -1e9)
    path = weights_of(adapter)
    assert hash_cache.cached_hash(path) == hash_cache.cached_hash(path)
    assert hashed == [path.name]
    found = path.stat()
    negate_head(adapter)
    import os

    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # a forger sets the time back
    assert hash_cache.cached_hash(path) == whole(path)
    assert hashed == [path.name] * 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert hash_cache.cached_hash(path) == whole(path)


# 4. files that consumers use


def verify_files(folder: Path) -> list[Check]:
    return [check for check in check_files(str(folder), Manifest.load(folder)) if not check.ok]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "stranger/model"}),
        ("adapter_config.json", {"base_model_name_or_path": None}),
        ("adapter_config.json", {"task_type": "CAUSAL_LM"}),
        ("adapter_config.json", {"peft_type": "BANANA"}),
        ("adapter_config.json", {"peft_type": "PROMPT_TUNING"}),
        ("adapter_config.json", {"r": 10**9}),
        ("config.json", {"architectures": None}),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}),
        ("config.json", {"num_labels": 3}),
        ("config.json", {"num_labels": 10**12}),
        ("config.json", {"pad_token_id": 5}),
        ("config.json", {"num_hidden_layers": 1_000_000}),
        ("config.json", {"num_hidden_layers": 3000}),
        ("config.json", {"vocab_size": 10**11}),
        ("config.json", {"vocab_size": 10**9}),
        ("config.json", {"hidden_size": 1 << 23}),
        ("config.json", {"intermediate_size": 1 << 23}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"model_type": "banana"}),
        ("config.json", {"layer_types": ["full_attention"] * 2_000_000}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_readers_take_from_a_configuration_is_checked(
    tmp_path: Path, wholes: dict[str, Path], file: str, changes: dict[str, Any]
) -> None:
    folder = copy_of(llama_adapter() if file.startswith("adapter") else wholes["fp32"], tmp_path / "model")
    edit_json(folder / file, **changes)
    assert "files are those that were written" in {check.name for check in verify_files(folder)}
    seal_again(folder)
    began = time.monotonic()
    found = failed(folder)
    assert found
    assert not any("Traceback" in detail for detail in found.values())
    assert time.monotonic() - began < 60
    with pytest.raises(UserError):
        RewardModel.load(str(folder))


@pytest.mark.slow
def test_the_list_of_files_covers_everything_that_is_read(folder: Path) -> None:
    edit_json(folder / FILE_NAME, files={})
    assert "not in the manifest's list" in failed(folder)["files are those that were written"]
    seal_again(folder)
    assert failed(folder) == {}
    for name in list(content_of(folder)["files"]):
        files = {other: sha256 for other, sha256 in content_of(folder)["files"].items() if other != name}
        edit_json(folder / FILE_NAME, files=files)
        with pytest.raises(UserError, match=r"is not in the manifest's list"):
            RewardModel.load(str(folder))
        seal_again(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model-2.safetensors",
        "pytorch_model.bin",
        "adapter_model.bin",
        "chat_template.json",
        "vllm.yaml",
    ],
)
def test_a_file_more_that_would_be_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    assert name in failed(folder)["files are those that were written"]


@pytest.mark.parametrize("name", ["README.md", "handler.py", "._model.safetensors", ".gitattributes"])
def test_a_file_that_nobody_reads_is_not_asked_about(folder: Path, name: str) -> None:
    (folder / name).write_text("A note.")
    assert failed(folder) == {}


# 5. signatures


def keys(folder: Path) -> tuple[str, str]:
    """A new private key and its public one, as openssl writes them."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="needs qlora_rm[sign]")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    private, pem = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    folder.mkdir()
    kept, shown = folder / "key.pem", folder / "public.pem"
    kept.write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    shown.write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return str(kept), str(shown)


@pytest.mark.slow
def test_a_signature_finds_what_consistent_edits_hide(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys(tmp_path / "mine")
    _, other = keys(tmp_path / "other")
    assert main(["verify", str(adapter), "--key", public]) == 1
    assert "rm_manifest.json.sig is not there" in capsys.readouterr().out
    assert main(["sign", str(adapter), "--key", private]) == 0
    assert main(["verify", str(adapter), "--key", public]) == 0
    assert main(["verify", str(adapter), "--key", other]) == 1
    edit_json(adapter / FILE_NAME, reward=content_of(adapter)["reward"] | {"mean": 3.0})
    assert main(["verify", str(adapter)]) == 0, "a consistent edit"
    capsys.readouterr()
    assert main(["verify", str(adapter), "--key", public]) == 1
    assert "is not a signature of this" in capsys.readouterr().out
    for damaged_signature in (b"", b"banana", b"A" * 10_000, b"\xff" * 64):
        (adapter / "rm_manifest.json.sig").write_bytes(damaged_signature)
        assert main(["verify", str(adapter), "--key", public]) == 1


def test_a_key_that_is_none_is_the_user_s_mistake(adapter: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path / "mine")
    (tmp_path / "banana.pem").write_text("banana")
    for wrong in (str(tmp_path / "banana.pem"), str(tmp_path / "nowhere.pem"), private):
        assert main(["verify", str(adapter), "--key", wrong]) == 2
    for wrong in (str(tmp_path / "banana.pem"), str(tmp_path / "nowhere.pem"), public):
        assert main(["sign", str(adapter), "--key", wrong]) == 2
    negate_head(adapter)
    assert main(["sign", str(adapter), "--key", private]) == 2


def test_without_the_library_a_signature_is_refused_with_a_message(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*(name for name in sys.modules if name.startswith("cryptography")), "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for command in ("sign", "verify"):
        assert main([command, str(adapter), "--key", "key.pem"]) == 2
        assert "qlora_rm[sign]" in capsys.readouterr().err


def test_a_configuration_of_others_may_hold_infinity(tmp_path: Path) -> None:
    """Mamba 2's configurations do: {"time_step_limit": [0.0, Infinity]}."""
    from qlora_rm.backbone.load import read_model_config

    base = copy_of(llama_adapter().parent / "base", tmp_path / "base")
    text = (base / "config.json").read_text(encoding="utf-8")
    (base / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1), encoding="utf-8")
    assert read_model_config(str(base)).time_step_limit == [0.0, math.inf]


# 6. templates and configurations that would use all time or memory

BOMBS = {
    "two loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "one text": "{{ 'x' * 9000000000 }}",
    "doubling": "{% set n = namespace(s='x'*1000) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "adding": "{% set n = namespace(s='x'*1000) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "method": "{{ 'x'.center(9000000000) }}",
    "filter": "{{ 'x'|center(9000000000) }}",
    "printf": "{{ '%9000000000d' % 1 }}",
    "star": "{{ '%*d' % (9000000000, 1) }}",
    "format": "{{ '{:{w}}'.format(1, w=9000000000) }}",
    "power": "{{ (9**9)**(9**9) }}",
    "replace": "{{ ('x'*90000).replace('x', 'y'*90000) }}",
    "filtered replace": "{{ ('x'*90000)|replace('x', 'y'*90000) }}",
    "bytes": "{{ (5).to_bytes(9000000000, 'big') }}",
    "join": "{{ ('x'*10000).join(['y']*100000) }}",
    "list": "{{ [1] * 9000000000 }}",
    "nested": "{% set n = namespace(l=[]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l == n.l }}",
    "hash": "{% set n = namespace(t=(1,)) %}{% for i in range(99) %}{% set n.t = (n.t, n.t) %}{% endfor %}{{ {n.t: 1} }}",
    "output": "{% for i in range(100000) %}{{ 'x'*100000 }}{% endfor %}",
    "kept": "{% set n = namespace(l=[]) %}{% for i in range(100000) %}{% set n.l = n.l + ['x'*90000 ~ i] %}{% endfor %}",
    "slices": "{% set b = 'x'*90000000 %}{% for i in range(100000) %}{% set c = b[1:] %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "indent": "{{ ('a\\n'*1000000)|indent(900000) }}",
    "tabs": "{{ 'a\\tb'.expandtabs(9000000000) }}",
    "translate": "{{ ('x'*1000000).translate({120: 'y'*1000000}) }}",
    "sum": "{{ [[1]]|sum(start=[]) }}",
    "batch": "{{ [1]|batch(9000000000, 0)|list }}",
    "recursion": "{% for a in [1] recursive %}{{ loop([1,1]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 100_000,
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "long": "x" * 2_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_is_rendered_within_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applies to a new template, such as in a foreign model. One whose hash differs from the manifest's is never rendered."""
    from qlora_rm.preferences import Candidates, Tokenization, bounded_templates
    from qlora_rm.preferences.row_errors import RowFault
    from tests.tokenizers_for_tests import small_tokenizer

    monkeypatch.setattr(bounded_templates, "SECONDS", 0.5)
    tokenization = Tokenization(small_tokenizer(chat_template=BOMBS[name]))
    turns = [{"role": "user", "content": "Hi."}]
    began = time.thread_time()
    [result] = tokenization.tokenize_each([Candidates(turns, ([{"role": "assistant", "content": "Hi."}],))])
    assert isinstance(result, RowFault) and result.kind == "template_error"
    assert time.thread_time() - began < 8


def test_a_bounded_template_renders_what_transformers_renders() -> None:
    from transformers.utils import chat_template_utils

    from qlora_rm.preferences.bounded_templates import compiled

    for template in (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim ~ loop.index }}{{ '\n' if not loop.last }}{% endfor %}",
        "{%- for m in messages[::-1] if m.role != 'x' %}{{ m.content.split(' ')[-1]|upper|replace('A', 'b') }}{% endfor %}",
        "{% set ns = namespace(l=[], n=0) %}{% for m in messages %}{% set ns.l = ns.l + [m.content] %}{% endfor %}{{ ns.l }}",
        "{{ messages|tojson(indent=2) }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}'.format('x') }}{{ 3 * 4 + 2 ** 5 }}{{ [1] + [2] }}",
        "{% macro one(m) %}<{{ m.content }}>{% endmacro %}{{ messages|map(attribute='content')|join(', ') }}{{ one(messages[0]) }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% else %}none{% endfor %}{{ (1, 2) }}{{ {'a': [1]} }}{{ undefined_ }}",
        "{% for m in messages %}{% if loop.index0 % 2 == 0 %}{{ loop.length }}{% continue %}{% endif %}{{ m.content[1:3] }}{% endfor %}",
    ):
        messages = [{"role": "user", "content": " A bee. "}, {"role": "assistant", "content": "Yes and no"}]
        theirs = chat_template_utils._cached_compile_jinja_template(template)
        assert compiled(template).render(messages=messages) == theirs.render(messages=messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two loops", "one text"])
def test_a_changed_template_is_not_rendered(adapter: Path, name: str) -> None:
    (adapter / "chat_template.jinja").write_text(BOMBS[name])
    for _ in range(2):
        began = time.thread_time()
        found = failed(adapter)
        assert "not tried" in found["golden texts give the golden token ids"]
        assert "chat template is the trained one" in found
        assert time.thread_time() - began < 30
        seal_again(adapter)  # update the file's hash for the second round; the contract's hash stays


def test_checks_are_told_as_they_come(adapter: Path) -> None:
    told: list[str] = []
    checks = verify(str(adapter), tell=lambda check: told.append(check.name))
    assert told == [check.name for check in checks]


# 7. messages, not tracebacks


def lying_headers() -> dict[str, bytes]:
    def file(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def one(**changes: Any) -> dict[str, Any]:
        return {"score.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}

    return {
        "empty": b"",
        "seven bytes": b"\1\2\3\4\5\6\7",
        "no header": struct.pack("<Q", 0),
        "length beyond the file": file(one(), length=10**6),
        "length beyond memory": file(one(), length=2**63 + 5),
        "offsets beyond": file(one(data_offsets=[0, 10**9])),
        "offsets before": file(one(data_offsets=[-64, 0])),
        "offsets reversed": file(one(data_offsets=[64, 0])),
        "overlapping": file({"a": one()["score.weight"], "b": one()["score.weight"]}),
        "shape of another size": file(one(shape=[400, 4])),
        "negative shape": file(one(shape=[-4, -4])),
        "huge shape": file(one(shape=[2**40, 2**40])),
        "unknown dtype": file(one(dtype="BANANA")),
        "a list": file([1, 2]),
        "deep": file(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "no JSON": file(b"{{{{"),
        "not UTF-8": file(b"\xff\xfe\xfd"),
        "a pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'touch hacked'\ntR." * 4,
        "a zip": b"PK\x03\x04" + b"\0" * 100,
    }


@pytest.mark.parametrize("name", lying_headers())
@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_file_of_weights_that_is_none_has_a_message(
    name: str, kind: str, tmp_path: Path, wholes: dict[str, Path]
) -> None:
    folder = copy_of(llama_adapter() if kind == "adapter" else wholes["fp32"], tmp_path / "model")
    weights_of(folder).write_bytes(lying_headers()[name])
    seal_again(folder)
    assert "model loads" in failed(folder)
    with pytest.raises(UserError):
        RewardModel.load(str(folder))


@pytest.mark.parametrize("file", [FILE_NAME, "adapter_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "3",
        '{"a": NaN}',
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"a": 1, "a": 2}',
        '{"a": 1e999}',
        "\ud800x",
    ],
    ids=lambda text: text[:12],
)
def test_broken_json_has_a_message(adapter: Path, file: str, text: str) -> None:
    (adapter / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert failed(adapter)
    with pytest.raises(UserError):
        RewardModel.load(str(adapter))
    with pytest.raises(UserError):
        RewardModel.load(str(adapter), skip_checks=True)


@pytest.mark.slow
def test_verify_tells_failed_from_could_not(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(adapter)]) == 0
    elsewhere = copy_of(adapter, tmp_path / "no base")
    base = content_of(elsewhere)["base"] | {"name_or_path": str(tmp_path / "gone")}
    edit_json(elsewhere / FILE_NAME, base=base)
    edit_json(elsewhere / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    seal_again(elsewhere)
    capsys.readouterr()
    assert main(["verify", str(elsewhere)]) == 2
    printed = capsys.readouterr().out
    assert "????  model loads" in printed and "could not be made" in printed
    negate_head(adapter)
    assert main(["verify", str(adapter)]) == 1
    (adapter / FILE_NAME).unlink()
    assert main(["verify", str(adapter)]) == 2
    assert main(["verify", str(tmp_path / "nowhere")]) == 2


@pytest.mark.long
@pytest.mark.slow
def test_an_output_that_is_full_is_said(tmp_path: Path) -> None:
    for words in (["--help"], ["recipes"], ["verify", str(llama_adapter())]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "qlora_rm.cli", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert "error: standard output cannot be written: No space left on device." in done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def damaged(path: Path, chance: random.Random) -> str:
    """Damage one file, and return how."""
    content = bytearray(path.read_bytes())
    how = chance.choice(["flip", "flip", "cut", "add", "zero"])
    if how == "flip":
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[chance.randrange(len(content)) :]
    elif how == "add":
        content += bytes(chance.randrange(256) for _ in range(8))
    else:
        place = chance.randrange(len(content))
        content[place : place + 64] = b"\xff" * len(content[place : place + 64])
    path.write_bytes(content)
    return how


@pytest.mark.slow
def test_random_damage_is_found_and_never_raises(
    tmp_path: Path, wholes: dict[str, Path], tries: Callable[[int], None]
) -> None:
    """Half of the tries update the hashes, to test the checks after them too.

    Then a check must still fail, or no check can see the damage. Nothing raises.
    """
    chance, number = random.Random(7), 30
    for attempt in range(number):
        source = llama_adapter() if attempt % 2 else wholes["fp32"]
        folder = copy_of(source, tmp_path / str(attempt))
        names = [*sorted(content_of(folder)["files"]), FILE_NAME]
        path = folder / chance.choice(names)
        before = path.read_bytes()
        how = damaged(path, chance)
        same = path.name == FILE_NAME and _parsed(before) == _parsed(path.read_bytes())
        same = same or before == path.read_bytes()
        if attempt % 4 >= 2 and path.name != FILE_NAME:
            seal_again(folder)
            verify(str(folder))
        else:
            assert same or failed(folder), f"{how} of {path.name} was not found"
        shutil.rmtree(folder)
    tries(number)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_torch_is_not_asked_to_unpickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds even if a pickle replaces the safetensors file."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    path = weights_of(folder)
    torch.save({}, path.with_name("adapter_model.bin" if "adapter" in path.name else "pytorch_model.bin"))
    path.unlink()
    seal_again(folder)
    assert "model loads" in failed(folder)
