"""Every way of dividing the model over ranks gives the tokens of plain one-rank generation."""

import numpy as np
import pytest

from model.layout import uniform_placement

LENGTHS = (9, 1, 17, 6, 30)  # prompt lengths; fewer requests than 8 ranks, so some ranks stay idle
NUM_TOKENS = 12


@pytest.fixture
def prompts(random_prompt):
    return [random_prompt(length) for length in LENGTHS]


@pytest.fixture
def expected(prompts, base_config, reference_of):
    model = reference_of(base_config)
    return [model.generate(prompt, NUM_TOKENS).token_ids for prompt in prompts]


def deal(prompts, make_request, world_size):
    """Requests dealt to ranks unevenly: rank 0 takes two, the others one each while they last."""
    requests = [make_request(prompt, NUM_TOKENS) for prompt in prompts]
    per_rank = [[] for _ in range(world_size)]
    for index, request in enumerate(requests):
        per_rank[max(index - 1, 0) % world_size].append(request)
    return requests, per_rank


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [None, 5])
def test_data_parallel_ranks_give_the_reference_tokens(
    world_size, chunk, prompts, expected, base_config, make_instance, make_request
):
    instance = make_instance(base_config, world_size)
    requests, per_rank = deal(prompts, make_request, world_size)
    instance.run(per_rank, chunk=chunk)
    assert [request.tokens for request in requests] == expected


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [None, 5])
def test_sequence_tensor_ranks_give_the_reference_tokens(
    world_size, chunk, prompts, expected, base_config, make_instance, make_request
):
    # Steps after the prompts have five tokens, so with eight ranks some slices of the sequence are empty.
    instance = make_instance(base_config, world_size, attention="sequence_tensor")
    requests = [make_request(prompt, NUM_TOKENS) for prompt in prompts]
    assert instance.run([requests], chunk=chunk) == expected


@pytest.mark.parametrize("attention", ["data_parallel", "sequence_tensor"])
@pytest.mark.parametrize(
    ("num_redundant", "num_shared"), [(4, 0), (16, 0), (0, 4), (4, 8)], ids=["+4", "+16", "shared4", "+4shared8"]
)
def test_redundant_and_shared_copies_change_no_token(
    attention, num_redundant, num_shared, prompts, expected, base_config, make_instance, make_request
):
    placement = uniform_placement(base_config, world_size=4, num_redundant=num_redundant, num_shared=num_shared)
    shared_expert = "dispatched" if num_shared else "local"
    instance = make_instance(
        base_config, 4, attention=attention, physical_to_logical=placement, shared_expert=shared_expert
    )
    requests, per_rank = deal(prompts, make_request, 4)
    instance.run(per_rank if attention == "data_parallel" else [requests])
    assert [request.tokens for request in requests] == expected


def test_a_skewed_placement_that_differs_by_layer_changes_no_token(
    prompts, expected, base_config, make_instance, make_request
):
    generator = np.random.default_rng(2)
    rows = [generator.permutation(np.r_[np.arange(16), [3, 3, 3, 7]]) for _ in range(base_config.num_moe_layers)]
    instance = make_instance(base_config, 4, physical_to_logical=np.array(rows))
    requests, per_rank = deal(prompts, make_request, 4)
    instance.run(per_rank)
    assert [request.tokens for request in requests] == expected


def test_prefill_on_one_instance_and_decode_on_another_give_the_reference_tokens(
    prompts, expected, base_config, make_instance, make_request
):
    prefill = make_instance(base_config, 2, attention="sequence_tensor")
    decode = make_instance(base_config, 4)
    first = [make_request(prompt, 1) for prompt in prompts]
    prefill.run([first])
    requests, per_rank = deal(prompts, make_request, 4)
    for source, request in zip(first, requests, strict=True):
        rank = next(index for index, held in enumerate(per_rank) if request in held)
        decode.allocate(request, rank)
        # Either prefill rank can be the source: both hold the whole latent cache.
        latents = prefill.ranks[rank % 2].cache.read_blocks(source.blocks)
        decode.ranks[rank].cache.write_blocks(request.blocks[: len(source.blocks)], latents)
        request.num_computed = len(request.prompt)
        request.tokens.append(source.tokens[0])
    while not all(request.is_done for request in requests):
        decode.step([[r for r in held if not r.is_done] for held in per_rank])
    assert [request.tokens for request in requests] == expected


def test_a_step_with_all_ranks_idle_runs_and_samples_nothing(base_config, make_instance):
    for attention in ("data_parallel", "sequence_tensor"):
        instance = make_instance(base_config, 2, attention=attention)
        outputs = instance.step([[], []])
        assert [len(output.token_ids) for output in outputs] == [0, 0]
        assert sum(int(output.expert_counts.sum()) for output in outputs) == 0


def test_expert_counts_add_up_to_every_choice_of_every_token(prompts, base_config, make_instance, make_request):
    totals = []
    for world_size, attention in ((1, "data_parallel"), (4, "data_parallel"), (4, "sequence_tensor")):
        instance = make_instance(base_config, world_size, attention=attention)
        requests, per_rank = deal(prompts, make_request, world_size)
        per_rank = per_rank if attention == "data_parallel" else [requests]
        for rank, held in enumerate(per_rank):
            for request in held:
                instance.allocate(request, rank)
        totals.append(sum(output.expert_counts for output in instance.step(per_rank)))
    assert totals[0].sum(axis=1).tolist() == [sum(LENGTHS) * base_config.num_experts_per_tok] * 2
    np.testing.assert_array_equal(totals[0], totals[1])
    np.testing.assert_array_equal(totals[0], totals[2])


def test_a_data_parallel_decode_step_exchanges_twice_per_mixture_layer(base_config, make_instance, make_request):
    for attention, per_layer in (("data_parallel", 0), ("sequence_tensor", 2)):
        instance = make_instance(base_config, 2, attention=attention)
        request = make_request([9, 10, 11], 1)
        instance.run([[request], []] if attention == "data_parallel" else [[request]])
        expected = 2 * base_config.num_moe_layers + per_layer * base_config.num_hidden_layers
        assert instance.exchange.num_exchanges == expected


def test_a_step_beyond_max_num_tokens_is_refused(base_config, make_instance, make_request):
    instance = make_instance(base_config, 1, max_num_tokens=8)
    with pytest.raises(AssertionError, match="9 tokens exceeds max_num_tokens 8"):
        instance.run([[make_request(list(range(7, 16)), 1)]])


def test_sampled_tokens_are_the_same_alone_and_in_a_batch(prompts, base_config, make_instance, make_request):
    from model.reference import Sampling

    def requests():
        samplings = [Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=i, num_logprobs=2) for i in range(5)]
        return [make_request(p, NUM_TOKENS, s) for p, s in zip(prompts, samplings, strict=True)]

    alone = []
    for request in requests():
        alone += make_instance(base_config, 1).run([[request]])
    together = requests()
    assert make_instance(base_config, 4).run([together[:3], [], together[3:], []]) == alone
    assert make_instance(base_config, 4, attention="sequence_tensor").run([requests()]) == alone
    assert all(len(entry.top) == 2 for request in together for entry in request.logprobs)
