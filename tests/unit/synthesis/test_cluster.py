"""Asking by Ray: the same run, and the same faults, as from one process."""

import importlib.util
import os

import pytest
from test_pipeline import items, rows, serve, write_recipe

from ultrafuser.synthesis.budget import BudgetError
from ultrafuser.synthesis.cluster import Cluster
from ultrafuser.synthesis.endpoint import EndpointError, Question
from ultrafuser.synthesis.pipeline import Pipeline
from ultrafuser.synthesis.recipe import EndpointSettings, ModelSettings, read_synthesis_recipe

__all__ = ["serve"]
if importlib.util.find_spec("ray") is None and "CI" not in os.environ:
    pytest.skip("Ray is not installed: pip install 'ultrafuser[ray]'", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(path, folder, num_askers):
    pipeline = Pipeline(read_synthesis_recipe(path), folder, num_askers=num_askers)
    try:
        pipeline.run()
    finally:
        pipeline.close()


SMALL = {
    "text": {"meta_topics": ["rivers", "lamps"], "sub_topics": 2, "instructions": 14, "several_turns": 0.3}
}


def test_two_processes_make_what_one_makes_even_with_faults(serve, tmp_path):
    run(write_recipe(tmp_path, serve(), domains=SMALL), tmp_path / "one", None)
    failing = serve(faults=0.2)
    recipe = write_recipe(tmp_path, failing, endpoint={"attempts": 50, "concurrency": 2}, domains=SMALL)
    run(recipe, tmp_path / "two", 2)
    assert items(tmp_path / "two") == items(tmp_path / "one")
    assert rows(tmp_path / "two", "unread", "key")  # it was not without faults


def test_a_budget_that_is_spent_stops_it_and_more_goes_on(serve, tmp_path):
    url = serve()
    with pytest.raises(BudgetError):
        run(write_recipe(tmp_path, url, domains=SMALL, budget={"tokens": 3000}), tmp_path / "run", 2)
    assert rows(tmp_path / "run", "calls", "key")  # as far as it went
    run(write_recipe(tmp_path, url, domains=SMALL), tmp_path / "run", None)
    run(write_recipe(tmp_path, serve(), domains=SMALL), tmp_path / "clean", None)
    assert items(tmp_path / "run") == items(tmp_path / "clean")


def test_a_question_that_alone_is_refused_is_given_up_by_all(serve, tmp_path):
    """The server refuses prompts that have certain words in them."""
    recipe = write_recipe(tmp_path, serve(refused="number 9"), domains=SMALL, unanswered=0.9)
    run(recipe, tmp_path / "one", None)
    given_up = [row[0] for row in rows(tmp_path / "one", "calls", "key") if row[4] is None]
    assert 0 < len(given_up) < len(rows(tmp_path / "one", "calls", "key"))
    run(recipe, tmp_path / "two", 2)
    assert items(tmp_path / "two") == items(tmp_path / "one")
    assert [row[0] for row in rows(tmp_path / "two", "calls", "key") if row[4] is None] == given_up


def test_few_are_asked_until_one_is_answered(serve, tmp_path, monkeypatch):
    """If none can be read, not all of them are paid for again and again."""
    batches, ask = [], Cluster.ask

    def recorded(self, questions, model):
        batches.append([key.split("/")[0] for key, _ in questions])
        return ask(self, questions, model)

    monkeypatch.setattr(Cluster, "ask", recorded)
    monkeypatch.setattr("ultrafuser.synthesis.pipeline._FIRST", 3)
    run(write_recipe(tmp_path, serve(), domains=SMALL), tmp_path / "run", 2)
    assert [len(batch) for batch in batches if "responses" in batch][:2] == [3, 11]


def test_a_server_that_refuses_everything_ends_the_run(serve, tmp_path):
    with pytest.raises(EndpointError, match="not even the simplest question is answered"):
        run(write_recipe(tmp_path, serve(refused="e"), domains=SMALL), tmp_path / "run", 2)
    run(write_recipe(tmp_path, serve(), domains=SMALL), tmp_path / "run", 2)
    run(write_recipe(tmp_path, serve(), domains=SMALL), tmp_path / "clean", None)
    assert items(tmp_path / "run") == items(tmp_path / "clean")


def test_an_endpoint_that_fails_is_told(serve):
    settings = EndpointSettings(base_url=f"{serve()}/v1", api_key_variable=None, concurrency=3)
    cluster = Cluster(settings, 2, None)
    assert list(cluster.ask([], ModelSettings(model="canned"))) == []
    questions = [(str(n), Question([{"role": "user", "content": f"say {n}"}], None, n)) for n in range(10)]
    found = dict(cluster.ask(questions, ModelSettings(model="canned")))
    assert found.keys() == {key for key, _ in questions}
    assert all(reply.finish == "stop" and reply.text for reply in found.values())
    nowhere = settings.model_copy(update={"base_url": "http://127.0.0.1:9/v1", "attempts": 1})
    failed = dict(Cluster(nowhere, 2, None).ask(questions, ModelSettings(model="canned")))
    assert failed.keys() == found.keys()
    assert all(isinstance(error, EndpointError) for error in failed.values())
    assert all("has failed 1 times" in str(error) for error in failed.values())
