"""Solve word problems whose answer is a number, in the form of GSM8K.

`--data` takes rows with `question` and `answer`, in which the number follows `####`, such as the
published ones, hf:openai/gsm8k:main:train. The few rows below are written for this project, for a
first try.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

PROMPT = "{question}\nReason step by step, and end with the number alone after ####."
DATA = "hf:openai/gsm8k:main:train"
MAX_TOKENS = 512
# Characters of the number that are read. No right answer is longer.
LONGEST = 40
_NUMBER = re.compile(r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?")

ROWS = [
    {"question": question, "answer": answer}
    for question, answer in [
        ("A tram holds 40 people. How many do 6 trams hold?", "6*40 = 240\n#### 240"),
        ("Mia has 15 marbles and gives 6 away. How many are left?", "15-6 = 9\n#### 9"),
        ("A book costs $12 and a pen $3. What do 2 of each cost?", "12+3 = 15, 2*15 = 30\n#### 30"),
        ("48 eggs go into boxes of 6. How many boxes?", "48/6 = 8\n#### 8"),
        ("Ali walks 3 km a day for 2 weeks. How many km?", "2*7 = 14, 14*3 = 42\n#### 42"),
        ("Half of 90 seats are taken. How many are free?", "90/2 = 45\n#### 45"),
        ("A tank of 500 l loses 20 l a day. What is left after 9 days?", "500-180 = 320\n#### 320"),
        ("3 pizzas are cut into 8 slices each; 5 are eaten. How many are left?", "24-5\n#### 19"),
        ("Noa saves $25 a month. How much in a year and a half?", "18*25 = 450\n#### 450"),
        ("A film lasts 150 minutes. How many hours is that?", "150/60 = 2.5\n#### 2.5"),
        ("From 1,200 sheets a class of 24 takes 10 each. How many are left?", "#### 960"),
        ("It was 4 degrees and fell by 11. How many degrees is it?", "4-11 = -7\n#### -7"),
    ]
]


def gold(example: Mapping[str, Any]) -> str:
    return str(example["answer"])


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    answer, right = number_in(visible_answer), number_in(str(example["answer"]))
    return float(answer is not None and answer == right)


def number_in(text: str) -> Fraction | None:
    """Return the number after the last ####, or None if there is none."""
    _, found, after = text.rpartition("####")
    match = _NUMBER.match(after.strip()[:LONGEST]) if found else None
    return Fraction(match.group().replace(",", "").replace("$", "")) if match else None
