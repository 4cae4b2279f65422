"""PyTorch: a train step recorded once for each shape, and run as one generated function.

A step is recorded once for each shape of its inputs, and from then on runs without Keras:

1. trace (``trace``): the step, forward, backward and update, runs on fake tensors, and every
   operation that PyTorch dispatches is written down; where that does not do, ``make_fx`` records.
2. overrides (``keras_overrides``, ``random``), while it is traced: a few Keras functions are
   replaced by operations with a fast kernel, or that a record can hold.
3. simplify (``simplify``, ``views``, ``large_gradients``, ``predication``): less is computed
   and copied, assignments move to the end, the gradients of large tables keep their memory.
4. program (``program``, ``codegen``): operations without an effect on the state come
   first, then the finite check, then the changes, all in one generated Python function.
5. run: the function is called with the batch and the variables' values; on a GPU it becomes a CUDA
   graph (``cuda_graph``).

What depends on values in Python (``if`` on a tensor, ``.item()``) cannot be recorded: PyTorch says
so in the trace, and the step runs eagerly. So it does if the check fails (``guard``).
"""
