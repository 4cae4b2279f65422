"""Where samples come from: arrays, data sets, iterables and what other libraries make."""
