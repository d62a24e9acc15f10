"""Sampling from merged weights: the same policy, by the log-probabilities that it records."""

import mlx.core as mx
import numpy as np
import pytest

from tests.adapter_versions import AdapterVersions
from tests.generation.test_generation import RAGGED, recomputed_logprobs
from tests.generation.test_swapping import segment_of
from textpolicy.adapters import AdapterConfig, AdapterContainer, LoRARule, shared_copy
from textpolicy.adapters.merged_copy import MergedCopy
from textpolicy.adapters.quantization.quantize import quantize
from textpolicy.errors import ConfigError
from textpolicy.generation.decoding_batch import DecodingRow
from textpolicy.generation.engine import Engine
from textpolicy.generation.mlx_generation import create_policy
from textpolicy.generation.policy import ModelPolicy
from textpolicy.generation.prefix_cache import PrefixCache
from textpolicy.generation.reload import create_auto_reload_setup, create_reloadable_policy
from textpolicy.generation.sampling import random_keys
from textpolicy.types import Sampling

EVERYWHERE = r".*(proj|embed_tokens)"


def moved(container, version):
    keys = mx.random.split(mx.random.key(version), len(container.parameters()))
    return {
        name: array + 0.05 * mx.random.normal(array.shape, key=key)
        for (name, array), key in zip(container.parameters().items(), keys, strict=True)
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recorded_logprobs_equal_those_of_the_trainer_after_each_reload(load_tiny, tmp_path, kind):
    model, tokenizer = load_tiny()
    rule = LoRARule(module_path=EVERYWHERE, kind=kind, rank=4)
    trained = AdapterContainer.from_model(model, AdapterConfig(rules=[rule]))
    path = tmp_path / "adapters.safetensors"
    trained.publish(path)
    options = {"max_tokens": 20, "merge_adapters": True}
    policy = create_policy(shared_copy(model), tokenizer, options, follow=path)
    plain = create_policy(shared_copy(model), tokenizer, {"max_tokens": 20}, follow=path)
    for version in range(4):
        trained.swap(moved(trained, version), version=version)
        trained.publish(path)
        before = trained.parameters()
        groups = policy.generate(RAGGED, n=4, seed=1)
        completions = [one for group in groups for one in group]
        differences = [
            abs(recorded - other)
            for one in completions
            for recorded, other in zip(one.logprobs, recomputed_logprobs(model, one), strict=True)
        ]
        assert len(differences) > 40
        assert np.mean(differences) < 1e-4
        assert {one.version for one in completions} == {policy.version} == {version}
        assert all(before[name] is array for name, array in trained.parameters().items())
        # Rounding could change a token only where two tokens are about equally likely.
        others = [one for group in plain.generate(RAGGED, n=4, seed=1) for one in group]
        assert [one.tokens for one in completions] == [one.tokens for one in others]
        assert policy.adapter_digest() == plain.adapter_digest()


def test_weights_that_are_not_merged_anew_would_be_noticed(load_tiny):
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=20), merge_adapters=True)
    container.swap(moved(container, 0))
    ((one,),) = policy.generate(["12+30="], seed=1)
    container.swap(moved(container, 1))
    stale = np.subtract(one.logprobs, recomputed_logprobs(model, one))
    assert np.abs(stale).mean() > 1e-2


def test_the_weights_are_merged_once_for_a_version_and_shared_by_other_sampling(load_tiny):
    model, tokenizer = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    policy = ModelPolicy(model, tokenizer, Sampling(max_tokens=4), merge_adapters=True)
    container.swap(moved(container, 0))
    weight = policy.sampled_model().layers[0].mlp.up_proj.weight
    policy.generate(["1+2="])
    greedy = policy.with_sampling(Sampling(max_tokens=4, temperature=0.0))
    greedy.generate(["1+2="])
    for one in (policy, greedy):
        assert one.sampled_model().layers[0].mlp.up_proj.weight is weight
    base = policy.with_adapter(None)
    assert base.sampled_model() is base.model


def test_other_sampling_options_leave_the_sequence_of_generations_repeatable(load_tiny):
    def texts() -> list[str]:
        model, tokenizer = load_tiny()
        policy = create_policy(model, tokenizer, {"max_tokens": 12, "seed": 5})
        other = policy.with_sampling(Sampling(max_tokens=12, temperature=1.5))
        return [other("12+30=").text for _ in range(3)]

    first = texts()
    assert first == texts() and len({*first}) > 1


def test_adapters_that_change_between_tokens_are_merged_between_tokens(load_tiny, tmp_path):
    model, tokenizer = load_tiny()
    versions = AdapterVersions(model, tmp_path, 6)
    sampling = Sampling(max_tokens=16, temperature=3.0)
    policy = ModelPolicy(model, tokenizer, sampling, swap="tokens", merge_adapters=True)
    calls = iter(range(1000))

    def load_newer():
        number, rest = divmod(next(calls), 3)
        if rest == 0 and number < 6:
            versions.use(number)
        return rest == 0

    policy.load_newer = load_newer
    prefixes = PrefixCache()
    engine = Engine(policy.sampled_model(), prefixes=prefixes, newest_version=policy.newest_version)
    for member in range(2):
        # The second row begins with the text of the first, which other adapters have read.
        row = DecodingRow(
            context=[5, 6, 7],
            sampling=sampling,
            stop=lambda tokens: None,
            key=random_keys(0, [(0, member)])[0],
            keep_prefix=True,
        )
        engine.submit([row])
        while engine.can_step:
            engine.step()
        assert row.versions == sorted(row.versions)
        if member == 0:
            assert len({*row.versions}) > 3
        segment = segment_of(row)
        replayed = versions.replay(segment, temperature=3.0)
        assert np.allclose(segment.logprobs, replayed, atol=1e-4)
        versions.use(row.versions[-1])


def test_prompts_do_not_begin_with_what_older_merged_weights_have_read(load_tiny):
    model, _ = load_tiny()
    container = AdapterContainer.from_model(model, AdapterConfig(rank=4))
    merged = MergedCopy(model)
    container.swap(moved(container, 0), version=1)
    prefixes = PrefixCache()
    engine = Engine(merged.refresh(), prefixes=prefixes, newest_version=lambda: container.version)
    engine.submit([_kept_row()])
    while engine.can_step:
        engine.step()
    assert prefixes.nbytes > 0
    container.swap(moved(container, 1), version=2)
    merged.refresh()
    engine.step()
    assert prefixes.nbytes == 0


def _kept_row():
    return DecodingRow(
        context=[5, 6, 7],
        sampling=Sampling(max_tokens=3),
        stop=lambda tokens: None,
        key=random_keys(0, [(0, 0)])[0],
        keep_prefix=True,
    )


@pytest.mark.parametrize("change", ["bfloat16", "float16", "4-bit"])
def test_a_policy_of_other_weights_is_refused_at_once(load_tiny, change):
    model, tokenizer = load_tiny()
    if change == "4-bit":
        quantize(model, 4)
    else:
        model.set_dtype(getattr(mx, change))
    AdapterContainer.from_model(model, AdapterConfig(rank=4))
    with pytest.raises(ConfigError, match=r"not float32.*--dtype float32"):
        ModelPolicy(model, tokenizer, Sampling(), merge_adapters=True)


def test_the_functions_that_create_policies_take_the_option(load_tiny, float32_tiny, tmp_path):
    model, tokenizer = load_tiny()
    with pytest.raises(ConfigError, match="merge_adapters is 'yes'; expected True or False"):
        create_policy(model, tokenizer, {"merge_adapters": "yes"})
    with pytest.raises(ConfigError, match="did you mean 'merge_adapters'"):
        create_policy(model, tokenizer, {"merge_adapter": True})
    path = tmp_path / "adapters.safetensors"
    policy, reload, trained, _ = create_auto_reload_setup(
        float32_tiny, path, max_tokens=8, merge_adapters=True
    )
    container = AdapterContainer.of(trained)
    container.swap(moved(container, 0), version=3)
    container.publish()
    # Without adapters at first, the policy samples from the base.
    other, reload_other = create_reloadable_policy(
        float32_tiny, None, {"max_tokens": 8, "merge_adapters": True}
    )
    assert other.sampled_model() is other.model
    assert reload(path) == reload_other(path) == 3
    for one in (policy, other):
        assert one.sampled_model() is not one.model
        ((completion,),) = one.generate(["12+30="], seed=1)
        expected = recomputed_logprobs(trained, completion)
        assert np.allclose(completion.logprobs, expected, atol=1e-4)
