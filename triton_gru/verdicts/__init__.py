"""Verdicts: measurements of the kernels on a GPU, and the choice of "auto" by them.

A verdict is one shape class (`shapes.py`) on one device with one set of versions
(`environment.py`): checked against the equations, then timed against cuDNN. `measuring.py` runs the
process that measures it (`triton_gru/class_check.py`), `store.py` keeps it on disk, `deciding.py`
decides for "auto". The JSON files in this folder, if any, come with the package.
"""
