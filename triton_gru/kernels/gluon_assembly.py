"""Inline assembly of the Gluon kernels: PTX as text, with its constraints.

`inline_asm_elementwise` runs a text once for every `pack` consecutive elements that a thread holds.
Outputs are numbered first: a pack of 16-bit elements is half as many registers, a pack of int32 or
of pointers as many. What one text needs once is taken from the first element of a pack; where the
elements of a pack are equal, the compiler passes one register for all of them.
"""

Assembly = tuple[str, str]  # the text and its constraints

# Bytes of K that a lane reads by one vector load.
VECTOR_BYTES = 16


def poll(
    chunks: int, chunk_bytes: int, tiles: int, tail: bool, element: int = 2, pairs: bool = False
) -> Assembly:
    """Loads a warp's part of the exchanged vector, again and again until it is complete.

    The loads of all chunks are in flight together and are tested together. An element that has not
    arrived is all ones (kernels/exchange.py), and so is then the largest of all elements. Of two
    16-bit elements a half of w is all ones if and only if (~w - 0x00010001) & w has the top bit of
    the lowest such half; before sm_90, which has no maximum of pairs, each word is tested so. The
    warp votes, so that its lanes stay together, and only the lanes that lack something load again.

    Operands: out `chunks` packs of elements, and one of int32, the state of the wait; in
    packs of pointers to the first chunk, unless the tail is the only one, and, with `tail`, of
    those that the last chunk is read by, which is as far from them as from the first; the state;
    the step. The state is the number of looks after the first that a wait may take, or, once one
    was given up, ~step of that: from then on a wait is one look. Of the state's pack the first
    element counts alone; the others are not even written (15 moves a step otherwise).

    Args:
        chunks: vectors per row that a lane loads.
        chunk_bytes: distance from one chunk to the next.
        tiles: tiles of 8 batch rows.
        tail: whether the last chunk has pointers of its own.
        element: bytes, 2 or 4.
        pairs: whether there is a maximum of pairs.
    """
    vector = VECTOR_BYTES // element
    pack = vector * tiles
    words = 4 * tiles
    state = chunks * words
    pointers = state + pack
    packs = (chunks > 1 or not tail) + tail
    last = pointers + pack * (packs - 1)
    waiting = pointers + pack * packs
    loads = []
    for chunk in range(chunks):
        for tile in range(tiles):
            first = chunk * words + 4 * tile
            registers = ", ".join(f"${first + i}" for i in range(4))
            base = last if chunk == chunks - 1 else pointers
            address = f"[${base + vector * tile} + {chunk * chunk_bytes}]"
            loads.append(f"ld.relaxed.gpu.global.v4.b32 {{{registers}}}, {address};")
    tests = []
    for word in range(chunks * words):
        if element == 2 and not pairs:
            tests += [f"sub.s32 t, -65538, ${word};"]
            tests += [f"lop3.b32 lacking, t, ${word}, lacking, 0xEA;"]
        else:
            tests += [f"max.u{32 if element == 4 else '16x2'} lacking, lacking, ${word};"]
    if element == 2 and pairs:
        tests += ["sub.s32 t, -65538, lacking;", "and.b32 lacking, lacking, t;"]
    if element == 2:
        tests += ["and.b32 lacking, lacking, 0x80008000;", "setp.ne.s32 lacks, lacking, 0;"]
    else:
        tests += ["setp.eq.u32 lacks, lacking, 0xffffffff;"]
    lines = [
        "{",
        ".reg .pred lacks, any, again;",
        ".reg .b32 looks, lacking, t;",
        "mov.b32 looks, 0;",
        *loads,
        "LOOK:",
        "mov.b32 lacking, 0;",
        *tests,
        "vote.sync.any.pred any, lacks, 0xffffffff;",
        f"setp.lt.and.s32 again, looks, ${waiting}, any;",
        "@!again bra DONE;",
        "add.s32 looks, looks, 1;",
        *(f"@lacks {load}" for load in loads),
        "bra.uni LOOK;",
        "DONE:",
        f"setp.ge.and.s32 again, ${waiting}, 0, any;",
        f"not.b32 t, ${waiting + pack};",
        f"selp.b32 ${state}, t, ${waiting}, again;",
        "}",
    ]
    constraints = ["=&r"] * pointers + ["l"] * (pack * packs) + ["r"] * (2 * pack)
    return "\n".join(lines), ",".join(constraints)


def read_factors(
    chunks: int, chunk_bytes: int, plane_bytes: int, tiles: int, tail: bool, element: int = 2
) -> Assembly:
    """Loads a lane's part of the three planes of factors, which no program of the launch writes.

    Operands: out 3 `chunks` packs of elements, plane after plane; in packs of pointers to the first
    plane, as `poll` has them.
    """
    words = 4 * tiles
    vector = VECTOR_BYTES // element
    pack = vector * tiles
    pointers = 3 * chunks * words
    last = pointers + pack * ((chunks > 1 or not tail) + tail - 1)
    loads = []
    for plane in range(3):
        for chunk in range(chunks):
            for tile in range(tiles):
                first = (plane * chunks + chunk) * words + 4 * tile
                registers = ", ".join(f"${first + i}" for i in range(4))
                base = last if chunk == chunks - 1 else pointers
                at = plane * plane_bytes + chunk * chunk_bytes
                address = f"[${base + vector * tile} + {at}]"
                loads.append(f"ld.global.v4.b32 {{{registers}}}, {address};")
    return "\n".join(loads), ",".join(["=&r"] * pointers + ["l"] * (last - pointers + pack))


def times(tiles: int, bf16: bool) -> Assembly:
    """The product of two packs of 16-bit elements, rounded once.

    Operands: out the product, in the packs. With bfloat16 a fused multiply-add of -0, which changes
    no product: sm_80 has no multiplication of pairs.
    """
    words = 4 * tiles
    lines = []
    for word in range(words):
        operands = f"${words + word}, ${2 * words + word}"
        if bf16:
            lines.append(f"fma.rn.bf16x2 ${word}, {operands}, zero;")
        else:
            lines.append(f"mul.rn.f16x2 ${word}, {operands};")
    if bf16:
        lines = ["{", ".reg .b32 zero;", "mov.b32 zero, 0x80008000;", *lines, "}"]
    return "\n".join(lines), ",".join(["=&r"] * words + ["r"] * (2 * words))


def read_weights(element: int = 2) -> Assembly:
    """A lane's fragment of a weight tile, past L1: two rows, as the matrix instruction has them.

    The pointers come in its order: the elements of a word of one row, of the other, and so on.
    """
    second = 8 + 4 // element
    lines = (
        "ld.global.nc.v4.b32 {$0, $2, $4, $6}, [$8];",
        f"ld.global.nc.v4.b32 {{$1, $3, $5, $7}}, [${second}];",
    )
    return "\n".join(lines), ",".join(["=&r"] * 8 + ["l"] * (2 * VECTOR_BYTES // element))


def publish(threads: int, element: int = 2) -> Assembly:
    """Stores an element where a flag says so; the first `threads` threads, the others hold copies.

    Relaxed, as the loads of `poll` are. By the letter of PTX's memory model that is not enough for
    2 bytes, which do not overlap the 4 loaded completely: it rests on a store of 2 aligned bytes
    being seen whole or not at all. A plain store and a volatile load rest on more.

    Operands: out one that the compiler wants; in the address, the bits and the flag.
    """
    lines = (
        "{",
        ".reg .pred stored;",
        ".reg .b32 thread;",
        ".reg .b16 bits;",
        "mov.u32 thread, %tid.x;",
        "setp.ne.s32 stored, $3, 0;",
        f"setp.lt.and.u32 stored, thread, {threads}, stored;",
        *(
            ("cvt.u16.u32 bits, $2;", "@stored st.relaxed.gpu.global.b16 [$1], bits;")
            if element == 2
            else ("@stored st.relaxed.gpu.global.b32 [$1], $2;",)
        ),
        "mov.b32 $0, 0;",
        "}",
    )
    return "\n".join(lines), "=r,l,r,r"
