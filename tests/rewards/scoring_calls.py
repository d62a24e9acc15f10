"""Short calls that score completions of one prompt without columns."""

from textpolicy.rewards import sample_of, scorer_of


def samples(*completions):
    """A sample for each completion."""
    return [sample_of("the prompt", text, {}) for text in completions]


def score_all(rewards, *completions):
    """The verdicts of the completions, from rewards or from an open scorer."""
    with scorer_of(rewards) as scorer:
        return scorer.score(samples(*completions))
