"""For every test: the signals of a foreground program, whoever started pytest."""

import signal

# A shell starts a job in the background with SIGINT ignored, and an ignored signal stays ignored in children: the tests
# that send Ctrl-C to a command would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
