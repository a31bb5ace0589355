from miles_lite.parallel import EngineDims, ParallelDims  # noqa: F401
