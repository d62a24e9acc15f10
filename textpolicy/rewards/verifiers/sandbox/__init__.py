"""Runs model-written code where it can change nothing, learn nothing and decide nothing.

`code_judge.py` is the part in the run: it starts two boxes, gives them work and reads the verdict.
`box.py` builds a box, and `syscall_filter.py` says which system calls it allows. The files in
`inside/` are the programs that run in a box; nothing else imports them.
"""
