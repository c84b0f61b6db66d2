"""Training: quantisation-aware, with a teacher, or of a full-precision model from nothing.

cli.py        the command; training.py, what it runs: models, tokens and batches put together
loop.py       the loop; step.py, one step of it; run.py, what both are given
hooks.py      what happens between steps: metrics, bar, evaluation, checkpoints, reasons to stop
teacher.py    what a teacher must be able to do; teacher_cache.py, its predictions kept on disk
saving.py     what --resume reads; sharding.py, weights shared out between processes; curves.py, scalars.py, the pictures
"""
