"""Low-bit without training: a file a method, each of which makes the tensors of a checkpoint.

cli.py           the commands; making.py, from a teacher's folder to a checkpoint, and the table of methods
recipes.py       published methods: transformations, a way of rounding and the bits, in one command
transforms/      what is done to the weights before, which leaves the model's function as it is
statistics.py    what activations look like on a calibration text; text.py, its options
calibration.py   what enters each projection on a calibration text
rtn.py           rounding to nearest
gptq.py          error feedback by second moments
awq.py           input channels scaled before rounding, and back in the norm
sigma_delta.py   a weight's error carried to the next weight of its row
"""
