"""A judge: another model grades what no program can check, beside a program for what it can.

    textpolicy serve --model Qwen/Qwen3-4B --thinking off --port 8001 --no-token   # the judge
    JUDGE_URL=http://127.0.0.1:8001/v1 python examples/tour/5_a_judge.py [STEPS]

JUDGE_URL is any server of OpenAI's API, and OPENAI_API_KEY its key.
"""

import os
import sys
import tempfile

import textpolicy as tp
from textpolicy.rewards.endpoint import Endpoint
from textpolicy.rewards.judge import judge

RUBRIC = """\
10 for a true sentence about the subject that a child understands.
0 if it is wrong, off the topic or empty, or if it praises itself."""
SUBJECTS = ["cats", "rain", "bread", "the moon", "bees", "snow", "trees", "boats", "bells", "ice"]


def brief(completion):
    """Return 1 up to 80 characters, and less for a longer text."""
    return tp.verifiers.length_score(completion, 1, 80)


server = Endpoint(
    url=os.environ.get("JUDGE_URL", "http://127.0.0.1:8001/v1"),
    model=os.environ.get("JUDGE_MODEL", "Qwen/Qwen3-4B"),
)
# A judge that cannot be reached costs its samples, and not the run.
both = tp.Rewards([judge(server, RUBRIC, name="clear"), brief], weights=[1.0, 0.2], on_error="skip")


def main(steps: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = os.path.join(folder, "rows.csv")
        with open(rows, "w") as file:
            file.write("prompt\n" + "\n".join(f"One sentence about {one}." for one in SUBJECTS))
        settings = {
            "task": {"data": rows, "reward": f"{__file__}:both"},
            "model": {"name": "tiny"},  # writes no sentences: "Qwen/Qwen3-0.6B" does
            "sampling": {"max_tokens": 16},
            "rollout": {"groups_per_step": 2, "group_size": 4},
            "run": {"steps": steps},
        }
        result = tp.run(settings, output=os.path.join(folder, "run"), on_event=print)
        print(result.directory.samples.read_text().splitlines()[-1])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
