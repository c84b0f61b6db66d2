"""python -m qat.ptq"""

from tmexport.cli import run_verb

run_verb("ptq", "python -m qat.ptq")
