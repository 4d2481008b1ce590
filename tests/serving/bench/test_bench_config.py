"""Options of the load generator: ranges, defaults, and the lists among them."""

import math

import pytest

from serving.bench_config import BenchConfig, parse_metrics, parse_pairs, parse_percentiles
from serving.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url: '127.0.0.1:8000' is not http://HOST[:PORT]"),
        ({"base_url": "ftp://host"}, "base_url: 'ftp://host'"),
        ({"backend": "tgi"}, "backend: 'tgi' is not one of openai, openai-chat"),
        ({"prompt_format": "xml"}, "prompt_format: 'xml' is not one of tokens, text"),
        ({"backend": "openai-chat", "prompt_format": "tokens"}, "prompt_format: 'tokens' cannot be sent by backend"),
        ({"request_rate": 0.0}, "request_rate: 0.0 must be above the limit 0"),
        ({"burstiness": 0.0}, "burstiness: 0.0 must be above the limit 0"),
        ({"max_concurrency": 0}, "max_concurrency: 0 is below the limit 1"),
        ({"num_warmups": -1}, "num_warmups: -1 is below the limit 0"),
        ({"ready_check_timeout_s": -1}, "ready_check_timeout_s: -1 is below the limit 0"),
        ({"request_timeout_s": 0}, "request_timeout_s: 0 must be finite and above the limit 0"),
        ({"time_factor": math.inf}, "time_factor: inf must be finite"),
        ({"temperature": -0.1}, "temperature: -0.1 is below the limit 0"),
        ({"cancel_share": 1.5}, "cancel_share: 1.5 is not in [0, 1]"),
        ({"seed": -1}, "seed: -1 is below the limit 0"),
        ({"metric_percentiles": (101.0,)}, "metric_percentiles: (101.0,) are not all in [0, 100]"),
        ({"percentile_metrics": ("latency",)}, "percentile_metrics: 'latency' is not one of ttft, tpot, itl, e2el"),
        ({"metadata": {"duration": "1"}}, "metadata: duration: a key of the result itself"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        BenchConfig(**({"base_url": "http://127.0.0.1:8000"} | options))
    assert message in str(caught.value)


def test_a_base_url_may_end_in_v1_and_the_endpoint_may_be_another():
    assert BenchConfig(base_url="http://h:1/v1/").url == "http://h:1/v1/completions"
    assert BenchConfig(base_url="https://h", backend="openai-chat").url == "https://h/v1/chat/completions"
    assert BenchConfig(base_url="http://h", endpoint="/proxy/v1/completions").url == "http://h/proxy/v1/completions"


def test_list_like_options_are_read():
    assert parse_percentiles("50, 99,99.9") == (50.0, 99.0, 99.9)
    assert parse_metrics("itl,ttft") == ("ttft", "itl")
    assert parse_pairs("header", ["A=b=c", "D="]) == {"A": "b=c", "D": ""}
    for call in (
        lambda: parse_percentiles("fast"),
        lambda: parse_percentiles(""),
        lambda: parse_percentiles("101"),
        lambda: parse_metrics("ttft,latency"),
        lambda: parse_pairs("header", ["A"]),
    ):
        with pytest.raises(ConfigError):
            call()
