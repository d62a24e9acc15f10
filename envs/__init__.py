"""Ready environments, one module each. `--env` takes the name of a module.

A module of one turn has four parts and imports only the standard library:

    make(rng) -> (prompt, example)
        Draws one task from a `random.Random`: the prompt, and the columns that the reward needs.
        Equal generator states give equal tasks. Each problem has one prompt, so that a held-out
        prompt is a held-out problem.
    reward(prompt, visible_answer, example) -> float
        Returns 1.0 for a right answer, and at most 0.1 for the empty one. The visible answer is the
        completion without the thought that a model may begin with.
    gold(example) -> str
        Returns an answer whose reward is 1.0. Supervised warm-up trains on gold answers.
    MAX_TOKENS
        The limit of an answer, with room for every gold answer and its stop token.

docs/environments.md has the further parts of several turns, tools and rows of data.
`textpolicy.environments.load(name)` loads a module, and `check_env` tests this contract.
"""

# First greedy scores as `textpolicy check --sample 8` measures them, by the models that a task
# suits; benchmarks/results/first_scores.json is the record.
FIRST_SCORES = {
    "the embedded model": {"add": 0.56, "sort": 0.72, "reverse": 0.61, "countdown": 0.38},
    "a real small model (SmolLM2-135M-Instruct)": {
        "number_words": 0.58,
        "letter": 0.38,
        "one_word": 0.47,
        "sum_story": 0.35,
        "json_keys": 0.61,
        "word_count": 0.21,
    },
}
