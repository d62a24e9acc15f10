"""A streamed answer is that of `generate`, and a conversation continues from its KV cache."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest

from tests.generation.test_generation import PositionCounter
from tests.generation.test_stop_rules import byte_fallback_tokenizer, random_tokens
from textpolicy.adapters import AdapterConfig, AdapterContainer
from textpolicy.adapters.adapter_state import AdapterState
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.generation.prompts import decode_text, encode_prompt
from textpolicy.generation.streamed_text import StreamedText
from textpolicy.types import Sampling


class CountingModel(PositionCounter):
    """A model with the sizes that a policy reads, which counts the positions that it processes."""

    @property
    def args(self):
        return self.inner.args


def conversation(first: str, answer: str, second: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]


@pytest.fixture(scope="module")
def tokenizers(load_tiny):
    return [load_tiny()[1], byte_fallback_tokenizer()]


@pytest.mark.parametrize("which", [0, 1])
def test_the_pieces_of_a_text_are_the_whole_text(tokenizers, which):
    tokenizer, rng = tokenizers[which], random.Random(which)
    usable = [t for t in range(len(tokenizer)) if t not in tokenizer.eos_token_ids]
    for round_number in range(150):
        # Half of the texts of the first tokenizer have lone bytes, which no text can show. The
        # second one would take back characters that it has shown when such a byte follows.
        lone = which == 0 and round_number % 2
        tokens = random_tokens(rng, tokenizer, usable if lone else usable[4:11])
        stream = StreamedText(tokenizer)
        pieces = [
            stream.next_piece(tokens[:end], ended=end == len(tokens))
            for end in range(1, len(tokens) + 1)
        ]
        assert "".join(pieces) == decode_text(tokenizer, tokens)
        assert sum(map(bool, pieces)) > 5


def test_a_character_comes_in_one_piece(tokenizers):
    tokenizer = tokenizers[1]
    tokens = tokenizer.encode("a🙂b", add_special_tokens=False)
    stream = StreamedText(tokenizer)
    pieces = [stream.next_piece(tokens[:end], ended=False) for end in range(1, len(tokens) + 1)]
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_streamed_answer_is_the_answer_of_generate(load_tiny, temperature):
    policy = ModelPolicy(*load_tiny(), Sampling(max_tokens=24, temperature=temperature))
    for seed, prompt in enumerate(["12+34=", "Say something long, please", "Sort 3 1 2"]):
        ((completion,),) = policy.generate([prompt], seed=seed)
        pieces = list(policy.stream(prompt, seed=seed))
        assert "".join(pieces) == completion.text
        assert len(pieces) > 1 or len(completion.tokens) < 4


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(load_tiny):
    model, tokenizer = load_tiny()
    counting = CountingModel(model)
    policy = ModelPolicy(counting, tokenizer, Sampling(max_tokens=8, temperature=0))
    answer = "".join(policy.stream("Sort 3 1 2 and say why"))
    whole = conversation("Sort 3 1 2 and say why", answer, "12+34=")
    read = len(encode_prompt(tokenizer, whole[:1])) + len(tokenizer.encode(answer))
    counting.positions = 0
    ((expected,),) = policy.generate([whole])
    without = counting.positions
    counting.positions = 0
    assert "".join(policy.stream(whole)) == expected.text
    assert without - counting.positions >= read - 1


def test_a_new_version_of_the_adapters_reads_the_conversation_again(load_tiny):
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4), seed=3)
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=12, temperature=0))
    answer = "".join(policy.stream("12+30="))
    changed = {
        name: value + 0.2 * mx.random.normal(value.shape, key=mx.random.key(number))
        for number, (name, value) in enumerate(container.parameters().items())
    }
    container.swap(changed)
    whole = conversation("12+30=", answer, "Sort 3 1 2")
    ((expected,),) = policy.generate([whole])
    assert policy.version > 0
    assert "".join(policy.stream(whole)) == expected.text


def shifted(container, size):
    """Return other tensors for the adapter of a container."""
    return {
        name: value + size * mx.random.normal(value.shape, key=mx.random.key(number))
        for number, (name, value) in enumerate(container.parameters().items())
    }


def check_that_the_conversation_is_read_again(policy, answer):
    whole = conversation("12+30=", answer, "Sort 3 1 2")
    ((expected,),) = policy.generate([whole])
    assert "".join(policy.stream(whole)) == expected.text


@pytest.fixture(params=[False, True], ids=["layers", "merged"])
def adapted(load_tiny, request):
    """Return a policy with an adapter that changes its answers, and the adapter's container."""
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4), seed=3)
    container.swap(shifted(container, 0.2), version=1)
    sampling = Sampling(max_tokens=12, temperature=0)
    return ModelPolicy(model, tokenizer, sampling, merge_adapters=request.param), container


def test_adapters_that_are_turned_off_read_the_conversation_again(adapted):
    policy, container = adapted
    answer = "".join(policy.stream("12+30="))
    with container.disabled():
        check_that_the_conversation_is_read_again(policy, answer)
    check_that_the_conversation_is_read_again(policy, answer)


def test_another_adapter_of_the_same_version_reads_the_conversation_again(adapted):
    policy, container = adapted
    container.add("other", replace(container.adapter(), arrays=shifted(container, 0.3)))
    answer = "".join(policy.stream("12+30="))
    container.activate("other")
    assert policy.version == 1
    check_that_the_conversation_is_read_again(policy, answer)


def test_a_swap_to_tensors_of_the_same_version_reads_the_conversation_again(adapted):
    policy, container = adapted
    answer = "".join(policy.stream("12+30="))
    container.swap(shifted(container, 0.3), version=1)
    check_that_the_conversation_is_read_again(policy, answer)


def test_adapters_that_are_turned_on_again_keep_their_caches(adapted):
    policy, container = adapted
    list(policy.stream("12+30="))
    size = policy._prefixes.nbytes
    with container.disabled():
        pass
    policy._prefixes.use_adapters(AdapterState.of(policy.model))
    assert policy._prefixes.nbytes == size


def test_the_kept_caches_stay_below_their_limit_and_the_oldest_goes_first(load_tiny):
    model, tokenizer = load_tiny()
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=4, temperature=0))
    list(policy.stream("one"))
    size = policy._prefixes.nbytes
    assert size > 0
    policy._prefixes = PrefixCache(max_bytes=3 * size)
    prompts = ["one", "two", "six", "ten"]
    for prompt in prompts:
        list(policy.stream(prompt))
        assert policy._prefixes.nbytes <= 3 * size
    known = [
        policy._prefixes.longest(encode_prompt(tokenizer, prompt))[0]
        - len(encode_prompt(tokenizer, prompt))
        for prompt in prompts
    ]
    assert known[0] < 0 and known[-1] == 0


def test_a_text_that_goes_on_replaces_its_beginning(load_tiny):
    model, tokenizer = load_tiny()
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=4, temperature=0))
    answer = "".join(policy.stream("12+30="))
    list(policy.stream(conversation("12+30=", answer, "1+1=")))
    assert len(policy._prefixes._prefixes) <= 2


def test_a_policy_with_another_adapter_samples_alike_and_leaves_the_first_as_it_was(
    adapted, load_tiny, tmp_path
):
    policy, container = adapted

    def answers(policy):
        return policy.generate(["12+30="], n=2, seed=1)

    own, tensors = answers(policy), container.parameters()
    container.swap(shifted(container, 0.3), version=5)
    container.publish(tmp_path / "other.safetensors")
    others = answers(policy)
    container.swap(tensors, version=1)
    other, base = policy.with_adapter(tmp_path / "other.safetensors"), policy.with_adapter(None)
    assert answers(other) == others != own
    assert answers(base) == answers(ModelPolicy(*load_tiny(), policy.sampling)) != own
    assert answers(policy) == own
