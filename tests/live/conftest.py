"""Launches of the real command, one of them shared by the session, and the tokens that they must give."""

from collections.abc import Callable, Iterator, Sequence

import httpx
import pytest

from model.reference import ReferenceModel, Sampling
from serving.config_file import load_config
from tests.live.launches import Launch, eventually, held, noise, settings


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    """Starts launches. Each must have ended by itself, and must have left nothing, when the test is over."""
    launches: list[Launch] = []

    def start(*arguments: str, **options: object) -> Launch:
        launches.append(Launch(*arguments, **options))  # type: ignore[arg-type]
        return launches[-1]

    yield start
    try:
        for one in launches:
            assert one.process.poll() is not None, "the test did not end its launch"
            assert one.leftovers() == []
    finally:
        for one in launches:
            one.close()


@pytest.fixture(scope="session")
def live() -> Iterator[Launch]:
    """`supernode serve laptop`, the whole of it, for every test that does not break it."""
    launch = Launch("serve", "laptop", "--port", "0", *settings("scheduler.max_queued_requests=80"))
    try:
        launch.url()
        yield launch
        assert launch.process.poll() is None, launch.stderr
        assert launch.end() == 0, launch.stderr
        assert noise(launch.stderr) == []
        assert launch.leftovers() == []
    finally:
        launch.close()


@pytest.fixture
def url(live: Launch) -> Iterator[str]:
    """The shared endpoint; when the test is over, nothing that it asked for is held."""
    url = live.url()
    yield url
    eventually(lambda: held(url), lambda amounts: not any(amounts.values()))
    assert httpx.get(f"{url}/health").status_code == 200
    assert noise(live.stderr) == []


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[int]]:
    """Tokens of plain single-process generation with the weights that every preset serves."""
    config = load_config("laptop")
    model = ReferenceModel(config.shape, config.model.checkpoint)
    known: dict[tuple[object, ...], list[int]] = {}

    def generate(prompt: Sequence[int], num_tokens: int, **sampling: object) -> list[int]:
        key = (*prompt, num_tokens, *sorted(sampling.items()))
        if key not in known:
            known[key] = model.generate(prompt, num_tokens, Sampling(**sampling)).token_ids  # type: ignore[arg-type]
        return known[key]

    return generate
