"""The stages of a run, what they share, and the pipeline that calls them in order.

A stage that uses scores is a module named after it, with `run(job)`, which raises ValueError for
anything wrong with data, model or what earlier stages left. `finetune` and `evaluate` run in all
processes, the others in the first.
"""
