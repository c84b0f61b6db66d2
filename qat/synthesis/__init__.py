"""Text that a model writes itself: its answers to prompts, drawn from its own distribution, to distil a student on.

cli.py        the command
answers.py    prompts in, answers out, a batch at a time; what an interrupted run has written is kept
drawing.py    the drawing itself: many sequences at once
"""
