"""A server that speaks OpenAI's HTTP interface.

cli.py          the verb `serve`: options, loading, listening
app.py          routes: who may ask, how large a body may be, what an error looks like
protocol.py     uvicorn's HTTP/1.1 connection with time limits
fields.py       values out of a JSON body, each checked
bodies.py       the bodies of /v1/completions and /v1/chat/completions as an `Asked`
scheduler.py    the one thread that runs the model: prompts in slices, then a token for everyone
choice.py       one text that is being made: sampling, stop texts, log-probabilities
grammar.py      JSON schemas and grammars (llguidance)
vocabulary.py   the bytes of every token
answers.py      events of choices as OpenAI's JSON
metrics.py      counters for Prometheus
"""
