"""Ready tasks, one module each. The name of a module is what `--env` takes.

A module holds four things and imports nothing but the standard library:

    make(rng) -> (prompt, example)
        One task drawn from a `random.Random`: the text the model sees, and the columns that the
        reward needs. Equal generator states give equal tasks. The prompt decides the problem:
        one problem has one prompt, so that holding out prompts holds out problems.
    reward(prompt, completion, example) -> float
        1.0 for a right answer, 0.0 for anything else, the empty completion included.
    gold(example) -> str
        An answer that scores 1.0: what supervised warm-up imitates.
    MAX_TOKENS
        Enough for every gold answer and its stop token.

`textpolicy.environments.load(name)` reads a module; `check` tests that it keeps this contract.
"""
