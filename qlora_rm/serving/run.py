"""Run a server: load and verify the model, then serve requests until a signal stops it in order."""

import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from transformers import PreTrainedModel

from qlora_rm import __version__
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.backbone.load import embedding_rows
from qlora_rm.backbone.packed import sharing_model
from qlora_rm.bearer import TOKEN_VARIABLE, read_token
from qlora_rm.config import ScoringConfig, ServeConfig
from qlora_rm.console import say, say_result
from qlora_rm.errors import UserError
from qlora_rm.progress import Phase
from qlora_rm.serving.app import Service
from qlora_rm.serving.batcher import Batcher
from qlora_rm.serving.bodies import Bodies
from qlora_rm.serving.connections import connections_possible, protocol_for
from qlora_rm.serving.hosts import AllowedHosts, is_loopback
from qlora_rm.serving.lanes import Lanes
from qlora_rm.serving.metrics import Metrics
from qlora_rm.serving.protocols import Reader
from qlora_rm.serving.sizes import Sizes
from qlora_rm.verification.golden_proof import prove, prove_decoded


def serve(folder: str, config: ServeConfig, scoring: ScoringConfig) -> int:
    """Serve the model of `folder` until SIGTERM or SIGINT.

    Returns: 0 if every request from before the signal was answered, 1 if `stop_timeout` was too short for that or the model
    thread died.

    Raises:
        UserError: the address is not available or needs a token, there is no such model, or its golden scores have moved.
    """
    token = read_token(config.token_file)
    check_address(config, token)
    listener = _bound(config)  # before the model is loaded, which takes minutes
    model = RewardModel.load(folder, **asdict(scoring))
    service = make_service(model, folder, config, token)
    server = _Server(service.app(), config)
    service.batcher.on_death = server.stop
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after it has stopped; that is no failure
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    finished = service.batcher.close(timeout=0 if server.cut_off else config.stop_timeout)
    if service.batcher.death is not None:
        traceback.print_exception(service.batcher.death)
        say("warning: stopped, since the model thread died")
    elif server.cut_off or not finished:
        say(f"warning: stopped with work unfinished after {config.stop_timeout:g} s")
        sys.stderr.flush()
        os._exit(1)  # the model thread is in a forward pass; a normal exit would wait for it or crash in it
    else:
        say("stopped: every request is answered")
    return 1 if service.batcher.death is not None else 0


def make_service(model: RewardModel, folder: str, config: ServeConfig, token: str | None = None) -> Service:
    """Build the application around a loaded model. Verifies its golden scores first, unless `skip_golden`."""
    decoded = model.text.decoded
    about: dict[str, Any] = {
        "server": f"qlora_rm {__version__}",
        "model": Path(folder).name,  # clients need not see the full path
        "computes_in": model.computes_in,
        "shares_prompts": sharing_model(model.model) is not None,
    }
    if config.skip_golden:
        say("warning: the golden scores are not checked (--skip_golden): nothing proves the scores that are served")
    else:
        try:
            with Phase("golden scores"):
                proof = prove(model, folder)
                prove_decoded(model, decoded, folder)
        except UserError as error:
            raise UserError(f"{error} To serve it all the same, pass --skip_golden.") from error
        say(f"golden scores of {proof.items} items: {proof.drift}")
        about["golden"] = {"items": proof.items, "largest_difference": proof.drift.largest}
    metrics = Metrics()
    metrics.count_tokens_of(model.model)

    def score(sequences: Sequence[list[int]]) -> list[float]:
        return model.score_token_ids(sequences).tolist()

    inner: Any = next(module for module in model.model.modules() if isinstance(module, PreTrainedModel))
    longest = _longest(model, inner)
    limits = (model.tokenization.max_length, model.tokenization.positions, longest)
    reader = Reader(
        name=about["model"],
        text=model.text,
        vocabulary=embedding_rows(inner),
        longest=longest,
        max_sequences=min(config.max_request_sequences, config.max_queue_sequences),
        max_tokens=config.max_queue_tokens,
        sizes=Sizes.of(model.tokenization, min(filter(None, limits), default=None), config.max_queue_tokens),
    )
    batcher = Batcher(
        score,
        metrics,
        tokens_per_batch=model.tokens_per_batch,
        max_sequences=config.max_queue_sequences,
        max_tokens=config.max_queue_tokens,
        max_wait=config.max_wait_ms / 1000,
    )
    lanes = Lanes(parallel=getattr(model.tokenizer, "is_fast", False))
    hosts = AllowedHosts.of(config.host, config.allowed_hosts, has_token=token is not None)
    return Service(reader, batcher, metrics, config, about, lanes, Bodies(config.max_body_bytes), token, hosts)


def _longest(model: RewardModel, inner: PreTrainedModel) -> int | None:
    """Return the length of the longest sequence that the model supports, in tokens.

    None where the contract or a table of positions limits the length, since tokenization checks those.
    """
    if model.tokenization.max_length is not None or model.tokenization.positions is not None:
        return None
    told = getattr(inner.config.get_text_config(), "max_position_embeddings", None)  # few architectures have none
    return min(filter(None, (told, model.tokenizer.model_max_length)), default=None)


def check_address(config: ServeConfig, token: str | None) -> None:
    """Require a token for a server that other machines can reach.

    Raises:
        UserError: the address is not loopback, there is no token, and anonymous access is not allowed.
    """
    if token or config.allow_anonymous or is_loopback(config.host):
        return
    raise UserError(
        f"--host {config.host} can be reached from other machines, and no token is set: anybody there could use the "
        f"model. Set {TOKEN_VARIABLE} or --token_file FILE, or pass --allow_anonymous."
    )


def _bound(config: ServeConfig) -> socket.socket:
    """Bind a socket to the address without accepting connections yet."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.socket(family)
    except OSError as error:
        raise UserError(
            f"{config.host} has an address family that this machine does not support: {error.strerror}."
        ) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(f"Cannot listen on {config.host} port {config.port}: {error.strerror}.") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn, silent except for errors, which reports when it listens."""

    cut_off = False
    """Whether requests were still open at the end of `stop_timeout`."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.given = config
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_for(connections_possible()),
                log_level="error",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(config.stop_timeout),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        say_result(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        say("stopping: no new requests are accepted; queued requests are answered")
        await super().shutdown(sockets)
        self.cut_off = bool(self.server_state.tasks)

    def stop(self) -> None:
        """Stop the server. Safe from any thread."""
        self.should_exit = True
