"""The lower bound of the time of a step of a plan, and the estimate by which plans are compared.

A program keeps its slice of W_hh on chip for all steps, so one of its steps takes at least

    lower_bound = (exchanges * latency
                   + max(weight bytes / (128 B / clock), exchanged bytes / L2 rate))

where `weight bytes` are those of one program's slice in shared memory, read once per step, and
`exchanged bytes` what all programs together read of each other's results. The Gluon backward reads
three vectors of factors besides the one or two that it exchanges; they are loaded during the
exchange, so of their time counts what is longer than that. `estimate_us` adds what
the lower bound leaves out and the choice between plans depends on: matrix instructions on tiles
padded to 16 x 8, staging of the vector, partial sums of the warps. Neither is a measurement.
"""

from triton_gru.plan.devices import Device
from triton_gru.plan.plan import (
    COUNTER,
    ELEMENT_BYTES,
    GLUON,
    SINGLE,
    Plan,
    Problem,
    padded_size,
)

# Bytes per clock that a multiprocessor reads from its shared memory, on every GPU of the table.
SHARED_BYTES_PER_CLOCK = 128
# One exchange between programs: a store to L2, a load from it, and the check. To be measured.
EXCHANGE_LATENCY_US = 1.0
# Multiply-adds per clock and multiprocessor of mma.sync on 16-bit operands (on sm_90 and sm_100
# half of what their asynchronous instructions do; a 16-row tile cannot use those).
MATRIX_RATE = {80: 1024, 86: 512, 89: 512, 90: 1024, 100: 1024}
# The counter costs more than the sentinel: the stores must drain, and one more L2 round trip.
COUNTER_EXTRA_US = 0.7
# A further block of the vector has arrived when it is loaded, but must be read from L2.
BLOCK_EXTRA_US = 0.4
# Gates, barriers and addresses of a step, from the instruction counts of the static report.
FIXED_CLOCKS = 300
# The same of the Gluon kernel, with 1 barrier in place of 11 and less than half the instructions: a
# guess until a GPU has run it.
GLUON_FIXED_CLOCKS = 100


def priced(problem: Problem, device: Device, held: int = 0, **plan) -> Plan:
    """Completes a plan by its costs; `held` bytes of its weights are in registers."""
    forward = problem.direction == "forward"
    element = ELEMENT_BYTES[problem.dtype]
    block_m, block_n = plan["block_m"], plan["block_n"]
    span = plan["block_k"] * (plan["k_blocks"] - 1) + plan["tail"]
    programs = plan["group"] * min(plan["groups"], plan["groups_a_launch"])
    vectors, factors = 1 if problem.reset_after else 2, 0
    if not forward:
        vectors, factors = (vectors, 3) if plan["kernel"] == GLUON else (3, 0)
    exchanged = exchanges = ahead = 0
    if plan["group"] > 1:
        vector = programs * block_m * padded_size(problem.hidden) * element
        exchanged, ahead = vector * vectors, vector * factors
        exchanges = 1 if problem.reset_after else 2

    clocks_us = device.clock_mhz
    weights = (plan["weight_bytes"] - held) / SHARED_BYTES_PER_CLOCK
    over_l2 = exchanged / device.l2_bytes_per_clock
    during_exchange = exchanges * EXCHANGE_LATENCY_US * clocks_us
    over_l2 += max(0, ahead / device.l2_bytes_per_clock - during_exchange)
    lower_bound = exchanges * EXCHANGE_LATENCY_US + max(weights, over_l2) / clocks_us

    # Beyond the lower bound: the vector is written to shared memory and read from it again; so are
    # the warps' partial sums; the matrix units compute whole 16 x 8 tiles, float32 at half the
    # rate.
    multiplied = 3 * block_m * block_n * span
    if problem.dtype == "float32" and not problem.tensor_cores:
        arithmetic = multiplied / 128
    else:
        rate = MATRIX_RATE.get(device.capability, 1024) * (0.5 if element == 4 else 1)
        arithmetic = multiplied / rate
    staged = 2 * block_m * span * element * vectors / SHARED_BYTES_PER_CLOCK
    fixed = FIXED_CLOCKS
    if plan["kernel"] == GLUON:  # from global memory straight into the operand
        staged, fixed = 0, GLUON_FIXED_CLOCKS
    sums = 3 if forward else (1 if problem.reset_after else 2)
    summed = 2 * sums * plan["split_k"] * block_m * block_n * 4 / SHARED_BYTES_PER_CLOCK
    if plan["split_k"] == 1:
        summed = 0
    latency = exchanges * (EXCHANGE_LATENCY_US + (COUNTER_EXTRA_US if _counts(plan) else 0))
    if plan["by_block"]:
        latency += (vectors - 1) * BLOCK_EXTRA_US
    busy = max(weights + staged, arithmetic, over_l2) + summed + fixed
    waves = plan["launches"]
    if plan["kernel"] == SINGLE:
        # No exchange, so programs need not be resident together: they run one after the other.
        waves = -(-plan["groups"] // device.multiprocessors)
    return Plan(
        **plan,
        direction=problem.direction,
        exchanged_bytes=exchanged + ahead,
        lower_bound_us=waves * lower_bound,
        estimate_us=waves * (latency + busy / clocks_us),
    )


def _counts(plan: dict) -> bool:
    return plan["group"] > 1 and plan["protocol"] == COUNTER
