"""Runs the Triton kernels on a CPU, their programs interleaved by a seeded scheduler.

Everything here needs TRITON_INTERPRET=1 in the environment before triton is first imported, so it
lives in processes of its own: `tests/triton_gru/kernels/test_in_interpreter.py` starts one for each
file here. To run a file by hand: `TRITON_INTERPRET=1 pytest tests/interpreter/test_scan.py`.
"""
