"""What the kernels were measured to take on a GPU, and what "auto" makes of it.

A verdict is one shape class (`shapes.py`) on one device with one set of versions
(`environment.py`): checked against the equations, then timed against cuDNN. `measuring.py` gets it
from a process of its own (`triton_gru/class_check.py`), `store.py` keeps it on disk, `deciding.py`
answers "auto". The JSON files in this folder, if any, come with the package.
"""
