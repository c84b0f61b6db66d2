"""Zero-shot tasks with lm-eval's definitions, for a checkpoint folder (torch) or a GGUF (`runtime_ref`, no torch).

tasks.py what is asked, examples.py where the questions come from, scoring.py log-likelihoods, metrics.py accuracies,
runtime_scorer.py and torch_scorer.py the two kinds of model, lm_eval_model.py the same models inside lm-eval.
"""
