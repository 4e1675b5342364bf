"""Guest kernels with a soft-RoCE device, for tests that need verbs; see `guest`."""
