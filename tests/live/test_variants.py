"""Other ways to run the same model give the same tokens."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.live.launches import PACKED, SMALL, complete, settings, tokens_of

pytestmark = pytest.mark.ray
PROMPTS = [tuple(range(33, 33 + length)) for length in (3, 40, 75, 40)]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("laptop", (*SMALL, "ray.exchange=gloo", "clock.scale=0")),
        ("colocated", (*PACKED, "clock.scale=0.1")),
    ],
    ids=["gloo, as fast as it can", "colocated, a node in one actor, ten times faster"],
)
def test_tokens_do_not_depend_on_the_arrangement(launch, reference, preset, overrides):
    server = launch("serve", preset, "--port", "0", *settings(*overrides))
    url = server.url()
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        for _ in range(2):
            answers = list(clients.map(lambda prompt: complete(url, prompt, 12), PROMPTS))
            assert [tokens_of(answer) for answer in answers] == [reference(prompt, 12) for prompt in PROMPTS]
    assert server.end() == 0
