"""The kernels and the layer on a real GPU: `pytest -m gpu tests/gpu`.

What `tests/interpreter` tests for every interleaving of a few small programs is checked here for
the code the compiler made of it, at the sizes it is for. To try the tests themselves without a GPU,
at tiny sizes in the interpreter: `TRITON_INTERPRET=1 pytest -m gpu tests/gpu`.
"""
