"""The promise: the same bits at every number of ranks. Knows torch, and no config, no files, no DeepSpeed."""
