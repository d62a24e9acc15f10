"""Find a hidden word of five letters in six guesses, with a hint for each letter.

The hint is the letter itself if the letter is in the right place, `?` if the letter is in another
place of the word, and `.` if the word does not have the letter.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

LENGTH = 5
MAX_TOKENS = 12
MAX_TURNS = 6
_LIST = """
about above actor adopt after again agent agree ahead alarm album alert alive alone among anger
angle apple apply arena argue arise armor aside asset audio avoid awake award badge baker basic
beach begin being below bench birth black blade blame blank blend bless blind block blood board
boost bound brain brake brand brave bread break brick brief bring broad brown brush build cabin
cable camel candy cargo carry catch cause chain chair chalk charm chase cheap check chest chief
child claim class clean clear climb clock close cloth cloud coach coast color coral count court
cover crack craft crane cream crest crime crisp crowd crown curve cycle daily dance depth diary
dozen draft drama dream dress drift drink drive eager eagle early earth eight elbow empty enemy
enjoy enter equal error event every exact exist extra fable faith false fancy feast fence fever
field fifth fight final first flame flash fleet float floor flour focus force forge forum found
frame fresh front frost fruit giant given glass globe glory glove grace grade grain grand grant
grape graph grass great green greet group guard guess guest guide habit happy heart heavy hinge
honey horse hotel house human humor ideal image index inner input issue ivory joint judge juice
knife knock label large laser later laugh layer learn lemon level light limit linen liver local
logic lucky lunar lunch magic major maker march match maybe mayor medal melon mercy metal meter
might minor model money month moral motor mount mouse mouth movie music nerve never night noble
noise north novel nurse ocean offer olive onion opera orbit order organ other outer owner paint
panel paper party patch peace pearl pedal phase phone photo piano piece pilot pitch place plain
plane plant plate point polar porch pound power press price pride prime print prize proof proud
quick quiet quilt radar radio raise ranch range rapid reach ready realm rebel relax reply rider
ridge right river roast robin robot rough round route royal rural sauce scale scene scent score
scout sense serve seven shade shake shape share sharp sheep sheet shelf shell shine shirt shore
short shout sight skill sleep slice slope small smart smile smoke snake solar solid solve sound
south space spare spark speak speed spend spice spoon sport stack staff stage stair stand start
state steam steel steep stick still stone store storm story stove sugar suite sunny sweet swift
table taste teach thank theme thick thing think third throw tiger title toast today topic torch
total touch tower track trade trail train treat trend trial tribe trick truck trust truth twice
uncle under union unity upper urban usual valid value vapor video visit vital vivid voice wagon
waist waste watch water wheat wheel where white whole width world worry wound wrist write yield
young youth zebra
"""
WORDS = _LIST.split()


def make(rng: Random) -> tuple[str, dict[str, Any]]:
    prompt = "Find my word of five letters. Answer with one word, nothing else."
    return prompt, {"word": rng.choice(WORDS)}


def problem(example: Mapping[str, Any]) -> str:
    return example["word"]


def reply(completions: Sequence[str], example: Mapping[str, Any]) -> str | None:
    guess = completions[-1].strip().lower()
    if guess == example["word"]:
        return None
    if len(guess) != LENGTH or not guess.isalpha():
        return f"expected one word of {LENGTH} letters"
    return mark(guess, example["word"])


def gold(example: Mapping[str, Any]) -> list[str]:
    return [example["word"]]


def reward(prompt: str, visible_answer: str, example: Mapping[str, Any]) -> float:
    return float(visible_answer.strip().lower() == example["word"])


def mark(guess: str, word: str) -> str:
    """Return the hint to a guess. A letter gets `?` at most as often as it is in other places."""
    unplaced = Counter(
        hidden for letter, hidden in zip(guess, word, strict=True) if letter != hidden
    )
    marks = ""
    for letter, hidden in zip(guess, word, strict=True):
        if letter == hidden:
            marks += letter
        elif unplaced[letter]:
            unplaced[letter] -= 1
            marks += "?"
        else:
            marks += "."
    return marks
