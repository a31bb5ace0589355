"""A rollout engine in plain torch for nemotron_h, on CPU or GPU, with no compiled kernels.

Which slice of which HF tensor a rank hosts says rollout/layout.py. Read in this order:

    mamba.py  experts.py  model.py   the forward pass of one rank
    cache.py       slots for keys, values and Mamba state
    sampler.py     tokens from logits, the same whatever else runs
    scheduler.py   who runs next
    comm.py  serve.py  rank.py       one process of an engine
    engine.py      the engine as the driver sees it
"""
