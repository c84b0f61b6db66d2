"""python -m qat.train"""

from tmexport.cli import run_verb

run_verb("train", "python -m qat.train")
