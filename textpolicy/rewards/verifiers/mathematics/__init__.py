"""Mathematical answers: cut into tokens, parsed to a tree, and compared by their values.

`answers.py` has the checks for rewards. `tokens.py`, `grammar.py`, `terms.py`, `measures.py` and
`units.py` read an answer; `comparison.py`, `sets.py`, `values.py` and `precision.py` compare two.
"""
