"""A plugin of pytest (`-p tests.triton_gru.engines.sanitized`): the CPU engine with sanitizers.

Address and undefined behaviour. The thread sanitizer is of no use here: it does not see that
libgomp's barriers, which are futexes in code that it did not compile, order anything.
"""

from triton_gru.engines.cpu import library

library.FLAGS = (
    *(flag for flag in library.FLAGS if flag != "-O3"),
    *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
