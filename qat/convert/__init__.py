"""A Transformer becomes a hybrid: some layers keep their attention, the others get Mamba-2 started from it.

cli.py        the command; making.py, what it runs
shape.py      the hybrid's dimensions, which layers keep their attention, what fits and what it costs
starting.py   a Mamba-2 mixer out of an attention's weights
fitting.py    out_proj by ridge regression, layer after layer, and the rank of the layers
"""
