"""PyTorch: a train step captured once for each input shape, and run as one generated function.

A step is captured once for each shape of its inputs, and then runs without Keras:

1. trace (``trace``): the step (forward, backward and update) runs on fake tensors, and every
   operation that PyTorch dispatches is recorded; steps it does not support are traced by
   ``make_fx``.
2. overrides (``keras_overrides``, ``random``), active during the trace: a few Keras functions are
   replaced by operations that have fast kernels or that can be recorded.
3. simplify (``simplify``, ``views``, ``large_gradients``, ``predication``): redundant operations
   and copies are removed, assignments move to the end, gradients of large tables keep their memory.
4. program (``program``, ``codegen``): operations without side effects come first, then the finite
   check, then the state changes, all in one generated Python function.
5. run: the function is called with the batch and the variables' values; on a GPU it becomes a CUDA
   graph (``cuda_graph``).

A step whose Python depends on values (``if`` on a tensor, ``.item()``) cannot be recorded: PyTorch
raises an error in the trace, and the step runs eagerly. It also runs eagerly when the finite check
fails (``guard``).
"""
