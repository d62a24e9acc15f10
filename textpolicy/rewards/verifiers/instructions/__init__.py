"""Whether a text follows instructions that a program can check, after the paper IFEval.

Zhou and others, Instruction-Following Evaluation for Large Language Models, arXiv 2311.07911.
"""
