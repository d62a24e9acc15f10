"""The agent of tasksets of verifiers. No name in this folder is that of a library.

The folder of an agent's file comes first where its process looks for modules.
"""
