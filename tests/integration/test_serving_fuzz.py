"""Requests made from the server's own description, right and wrong ones: it never fails, and says what it promises."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from test_serving import Server, fused  # noqa: F401 (a fixture)

READ = [("GET", path) for path in ("/v1/models", "/health", "/metrics")]
ASK = [("POST", path) for path in ("/v1/chat/completions", "/v1/completions")]


@pytest.fixture(scope="module")
def api(fused):  # noqa: F811
    server = Server(fused, max_new_tokens=20)
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    server.stop()
    assert server.decoder.num_active == server.decoder.num_waiting == 0


def statuses(operation, mode):
    """Of responses to generated requests, each checked against the description."""
    found = set()
    # The description cannot say in what order roles come, or that a text must be at least one token.
    (excluded,) = CHECKS.get_by_names(["positive_data_acceptance"])

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body) % 4:
            case.body["model"] = "tiny"  # most of the time, or the request ends there
        found.add(case.call_and_validate(excluded_checks=[excluded]).status_code)

    ask()
    return found


def test_the_description_is_complete(api):
    assert {(op.ok().method.upper(), op.ok().path) for op in api.get_all_operations()} == {*READ, *ASK}


@pytest.mark.parametrize(("method", "path"), [*READ, *ASK])
def test_every_response_is_as_described(api, method, path):
    found = statuses(api[path][method], GenerationMode.POSITIVE)
    assert found == ({200} if method == "GET" else {200, 400, 404})


@pytest.mark.parametrize(("method", "path"), ASK)
def test_what_is_not_as_described_is_refused(api, method, path):
    assert statuses(api[path][method], GenerationMode.NEGATIVE) == {400}
