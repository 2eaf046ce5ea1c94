"""Tolerances of the kernels' results on a GPU against float64, for the check and for the tests.

||result - exact|| / ||exact|| of y and of every gradient: 4 times the worst that the equations in
plain torch leave on a CPU over T = 50 steps, B = 16, H up to 400 (float32 4.3e-7, float16 9.3e-4,
bfloat16 7.5e-3). tf32 has as many bits as float16, but the matrix units truncate, not round.
"""

TOLERANCE = {"float32": 2e-6, "tf32": 8e-3, "float16": 4e-3, "bfloat16": 3e-2}
# The largest single error as a share of the largest value, in these tolerances: a norm over
# millions of elements would not show it. Plain torch leaves up to 2.4 times its own norm.
SINGLE = 2
