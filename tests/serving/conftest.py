"""Fixtures for serving: one small 4-bit reward model, and a service and a server around it."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.serving.app import Service
from tests.reward_models_for_tests import llama_adapter
from tests.serving.servers_for_tests import LOCAL, running, served


@pytest.fixture(scope="session")
def model() -> RewardModel:
    return RewardModel.load(str(llama_adapter()))


@pytest.fixture(
    scope="module"
)  # not longer: tests elsewhere replace time.monotonic, by which a running event loop would sleep on
def service(model: RewardModel) -> Iterator[Service]:
    with served(model, llama_adapter()) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    """A client in this process. An unexpected exception becomes status 500, as for a real client."""
    with TestClient(service.app(), base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """The URL of the same service over a real socket."""
    with running(service.app()) as url:
        yield url
