"""What replaces the parameters that reward functions have in TRL, verifiers and verl."""

_LISTS = {"prompts": "prompt", "completions": "completion", "examples": "example"}
_METRICS = 'return tp.Score(reward, {"name": number}) to report numbers beside the reward'
_EQUIVALENTS = {
    "completion_ids": "`tokens` holds the sampled token ids",
    "response_ids": "`tokens` holds the sampled token ids",
    "prompt_ids": "no parameter holds the prompt's token ids; `prompt` is its text",
    "prompt_tokens": "no parameter holds the prompt's token ids; `prompt` is its text",
    "trainer_state": "a reward does not see the state of the trainer; leave the parameter out",
    "log_metric": f"there is no function for logging; {_METRICS}",
    "log_extra": f"there is no function for logging; {_METRICS}",
    "environments": "`turns` and `turn_rewards` hold what happened in the episode",
    "state": "`messages` is the conversation, `turns` are the model's texts, `example` is the row",
    "info": "`example` is the whole row, and each column is a parameter of its own name",
    "extra_info": "`example` is the whole row, and each column is a parameter of its own name",
    "solution_str": "`completion` is what the model wrote",
    "response": "`completion` is what the model wrote",
    "ground_truth": "the right answer is a column of the rows, such as `answer`",
}


def parameter_hint(name: str, *, batched: bool) -> str:
    """Return what to write for a parameter that other libraries have, or an empty text."""
    if not batched and name in _LISTS:
        return (
            f"`{name}` is a parameter of functions that take lists: write @tp.reward(batched=True) "
            f"above the function, or ask for `{_LISTS[name]}`"
        )
    single = {one: many for many, one in _LISTS.items()}
    if batched and name in single:
        return f"a batched reward takes lists: ask for `{single[name]}`"
    if name not in _EQUIVALENTS:
        return ""
    return f"`{name}` is a parameter in other libraries. Here {_EQUIVALENTS[name]}"
