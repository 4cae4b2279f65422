"""Sources of samples: arrays, data sets, iterables and objects of other libraries."""
