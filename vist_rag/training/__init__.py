"""Training: teach a tower to read, a resampler to compress, a generator to read memory."""
