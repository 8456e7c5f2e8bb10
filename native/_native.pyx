# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=True
"""The only binding to the C kernels: checks lengths and types, drops the GIL, calls the table.

Buffers are flat and contiguous; shapes, dtypes and errors for people are the business of
`quantcli.formats.native`. Type ids are ggml's, and 63 is FP8 (E4M3).
"""

import os

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

from quantcli.errors import UsageError

cdef extern from "qk.h" nogil:
    enum:
        QK_TYPE_COUNT
        QK_NO_MEMORY
        QK_BF16
        QK_MXFP4
        QK_NVFP4

    ctypedef int (*qk_encode_fn)(
        const float *, uint8_t *, int64_t, int64_t, const float *) noexcept
    ctypedef void (*qk_decode_fn)(const uint8_t *, float *, int64_t) noexcept

    struct qk_lattice:
        const float *levels
        int count
        int uniform
        int sub
        int block
        int half
        int odd
        int[2] scale_range
        int[2] min_range

    enum:
        QK_COLUMNS_MAX

    ctypedef void (*qk_feedback_fn)(
        const qk_lattice *, const float *, const float *, const float *, const float *,
        const float *, int64_t, int, uint8_t *, float *) noexcept
    ctypedef void (*qk_sweep_fn)(
        const qk_lattice *, const float *, const float *, const float *, int64_t, int, int,
        uint8_t *, float *, float *, float *, float *) noexcept

    enum:
        QK_SIGNS_NONE
        QK_SIGNS_FREE
        QK_SIGNS_EVEN
        QK_PATTERNS_MAX

    struct qk_points:
        int count
        int group
        int width
        int signs
        float apart
        const float *halves[2]
        int[2] half_count
        const uint8_t *patterns

    ctypedef void (*qk_feedback_points_fn)(
        const qk_points *, int, int, int, const float *, const float *, const float *,
        const float *, const float *, const float *, int64_t, int, float *, int32_t *,
        float *) noexcept
    ctypedef void (*qk_sweep_points_fn)(
        const qk_points *, const qk_lattice *, const float *, const float *, const float *,
        int64_t, int, int, int32_t *, float *, float *) noexcept

    enum:
        QK_SMALL_COUNT

    struct qk_table:
        const char *name
        qk_encode_fn *encode
        qk_decode_fn *decode
        qk_feedback_fn feedback
        qk_sweep_fn sweep
        qk_feedback_points_fn feedback_points
        qk_sweep_points_fn sweep_points

    struct qk_type_size:
        int block
        int nbytes

    const qk_type_size *qk_type_sizes
    const qk_table *qk_available(int index) noexcept
    int64_t qk_encode_rows(
        const qk_table *table, int type, int src_type, const uint8_t *src,
        int64_t nrows, int64_t ncols, uint8_t *dst, const float *weights) noexcept
    void qk_decode_all(
        const qk_table *table, int type, const uint8_t *src, float *dst, int64_t n) noexcept
    int64_t qk_first_infinite_scale(
        const uint8_t *blocks, int64_t nblocks, int nbytes,
        const int *offsets, int count, int exponent) noexcept
    int64_t qk_largest_rows(
        const qk_table *table, int src_type, const uint8_t *src, int64_t nrows, int64_t ncols,
        int64_t width, float *out) noexcept
    void qk_small_rows(
        const qk_table *table, int kind, int src_type, const uint8_t *src, const float *scales,
        int64_t nrows, int64_t ncols, int64_t width, uint8_t *dst) noexcept

cdef extern from "grids.h" nogil:
    int qk_grid_set(
        int type, const uint8_t *levels, int count, int dims,
        const int8_t *values, int nlevels) noexcept
    int qk_grid_ready(int type) noexcept
    enum:
        QK_GRID_NO_MEMORY

cdef enum:
    MOST_SCALES = 8

cdef const qk_table *_active = NULL


def available() -> tuple[str, ...]:
    """The instruction sets that were compiled in and that this CPU runs, best first."""
    names = []
    cdef int index = 0
    while qk_available(index) != NULL:
        names.append(qk_available(index).name.decode())
        index += 1
    return tuple(names)


def select(name: str) -> None:
    """Use the kernels of that instruction set from now on; UsageError when this CPU lacks it."""
    global _active
    names = available()
    if name not in names:
        raise UsageError(
            f"there are no kernels for {name!r} here",
            hint=f"this CPU and this build offer {', '.join(names)}",
        )
    _active = qk_available(<int>names.index(name))


cdef const qk_table *_table() except NULL:
    if _active == NULL:
        wanted = os.environ.get("QUANTCLI_CPU")
        try:
            select(wanted or available()[0])
        except UsageError as error:
            raise UsageError(f"QUANTCLI_CPU: {error.message}", hint=error.hint) from None
    return _active


def isa() -> str:
    """The instruction set in use: the best one, or what QUANTCLI_CPU names."""
    return _table().name.decode()


cdef int _known(int type_id, str what) except -1:
    if not 0 <= type_id < QK_TYPE_COUNT or qk_type_sizes[type_id].block == 0:
        raise ValueError(f"{what} {type_id} is unknown")
    return 0


def block_size(int type_id) -> tuple[int, int]:
    """Weights and bytes of a block of ggml's type ``type_id``."""
    _known(type_id, "type")
    return qk_type_sizes[type_id].block, qk_type_sizes[type_id].nbytes


def has_encoder(int type_id) -> bool:
    """Whether there is a kernel that writes this type."""
    _known(type_id, "type")
    return _table().encode[type_id] != NULL


def has_decoder(int type_id) -> bool:
    """Whether there is a kernel that reads this type."""
    _known(type_id, "type")
    return _table().decode[type_id] != NULL


def is_ready(int type_id) -> bool:
    """Whether the kernels have what the type needs: its codebook grid, if it is coded with one."""
    _known(type_id, "type")
    return qk_grid_ready(type_id)


def set_grid(int type_id, const uint8_t[:, ::1] levels, const int8_t[::1] values) -> None:
    """Give the kernels the codebook grid of a type, once for all threads and instruction sets.

    ``levels`` has a row for each point of the grid, its levels; ``values`` is what each level
    decodes to. ValueError when this is no grid of that type.
    """
    cdef int result = -2
    _known(type_id, "type")
    if levels.shape[0] <= 2**16 and values.shape[0] <= 2**8:
        with nogil:
            result = qk_grid_set(
                type_id, &levels[0, 0], <int>levels.shape[0], <int>levels.shape[1],
                &values[0], <int>values.shape[0])
    if result == QK_GRID_NO_MEMORY:
        raise MemoryError
    if result != 0:
        raise ValueError(
            f"{levels.shape[0]} points of {levels.shape[1]} weights in {values.shape[0]} levels "
            f"are no codebook grid of type {type_id}")


cdef int _ready(int type_id) except -1:
    if not qk_grid_ready(type_id):
        raise ValueError(f"the codebook grid of type {type_id} is not set")
    return 0


cdef int _same(str what, int64_t found, int64_t expected) except -1:
    if found != expected:
        raise ValueError(f"{what} has length {found}, expected {expected}")
    return 0


cdef int64_t _packed(int type_id, int64_t n, str what) except -1:
    """Bytes of n elements."""
    cdef int block = qk_type_sizes[type_id].block
    if n < 0 or n % block != 0:
        raise ValueError(f"{what} of {n} is not a multiple of the block length {block}")
    return n // block * qk_type_sizes[type_id].nbytes


def encode(
    int type_id,
    int src_type_id,
    const uint8_t[::1] src,
    int64_t nrows,
    int64_t ncols,
    uint8_t[::1] dst,
    const float[::1] weights=None,
) -> int:
    """Encode rows of a stored float dtype into blocks.

    Returns -1, or the flat index of the first value that is infinite or NaN as float32; ``dst``
    is then only partly written. ``weights`` is one importance per column.
    """
    cdef const qk_table *table = _table()
    cdef const float *importance = NULL
    cdef int64_t result
    _known(type_id, "type")
    _known(src_type_id, "source dtype")
    if table.encode[type_id] == NULL:
        raise ValueError(f"there is no kernel that encodes type {type_id}")
    _ready(type_id)
    if table.decode[src_type_id] == NULL or qk_type_sizes[src_type_id].block != 1:
        raise ValueError(f"source dtype {src_type_id} is not a float dtype")
    if nrows < 0:
        raise ValueError(f"the number of rows is {nrows}")
    _same("src", src.shape[0], nrows * _packed(src_type_id, ncols, "row length"))
    _same("dst", dst.shape[0], nrows * _packed(type_id, ncols, "row length"))
    if weights is not None:
        _same("weights", weights.shape[0], ncols)
        importance = &weights[0] if ncols > 0 else NULL
    if nrows == 0 or ncols == 0:
        return -1
    with nogil:
        result = qk_encode_rows(
            table, type_id, src_type_id, &src[0], nrows, ncols, &dst[0], importance)
    if result == QK_NO_MEMORY:
        raise MemoryError
    return result


def decode(int type_id, const uint8_t[::1] src, float[::1] dst) -> None:
    """Decode blocks, or a stored float dtype, to float32."""
    cdef const qk_table *table = _table()
    _known(type_id, "type")
    if table.decode[type_id] == NULL:
        raise ValueError(f"there is no kernel that decodes type {type_id}")
    _ready(type_id)
    _same("src", src.shape[0], _packed(type_id, dst.shape[0], "element count"))
    if dst.shape[0] == 0:
        return
    with nogil:
        qk_decode_all(table, type_id, &src[0], &dst[0], dst.shape[0])


cdef int64_t _runs(
        int src_type_id, const uint8_t[::1] src, int64_t nrows, int64_t ncols, int64_t width
) except -1:
    """Runs of a row."""
    _known(src_type_id, "source dtype")
    if _table().decode[src_type_id] == NULL or qk_type_sizes[src_type_id].block != 1:
        raise ValueError(f"source dtype {src_type_id} is not a float dtype")
    if nrows < 0 or width < 1:
        raise ValueError(f"{nrows} rows in runs of {width} are not supported")
    _same("src", src.shape[0], nrows * _packed(src_type_id, ncols, "row length"))
    return (ncols + width - 1) // width


def largest(
    int src_type_id, const uint8_t[::1] src, int64_t nrows, int64_t ncols, int64_t width,
    float[::1] out,
) -> int:
    """The largest magnitude of each run of ``width`` columns; the last run has what is left.

    Returns -1, or the flat index of the first value that is infinite or NaN as float32; ``out`` is
    then only partly written.
    """
    cdef const qk_table *table = _table()
    cdef int64_t result
    _same("out", out.shape[0], nrows * _runs(src_type_id, src, nrows, ncols, width))
    if nrows == 0 or ncols == 0:
        return -1
    with nogil:
        result = qk_largest_rows(table, src_type_id, &src[0], nrows, ncols, width, &out[0])
    return result


def small_floats(
    int kind, int src_type_id, const uint8_t[::1] src, const float[::1] scales, int64_t nrows,
    int64_t ncols, int64_t width, uint8_t[::1] dst,
) -> None:
    """The nearest codes of E4M3 (kind 0), E2M1 (1) and MLX's E2M1 (2), a byte each.

    ``scales`` has one for each run of ``width`` columns of each row.
    """
    cdef const qk_table *table = _table()
    if not 0 <= kind < QK_SMALL_COUNT:
        raise ValueError(f"kind {kind} is unknown")
    _same("scales", scales.shape[0], nrows * _runs(src_type_id, src, nrows, ncols, width))
    _same("dst", dst.shape[0], nrows * ncols)
    if nrows == 0 or ncols == 0:
        return
    with nogil:
        qk_small_rows(
            table, kind, src_type_id, &src[0], &scales[0], nrows, ncols, width, &dst[0])


_EXTREMES = {QK_BF16: 0x7f80, QK_MXFP4: 0xff, QK_NVFP4: 0x7e}
"""The bits of a scale, read as 16 bits, that are all set in an extreme one; float16 otherwise."""


def first_infinite_scale(int type_id, const uint8_t[::1] blocks, tuple offsets) -> int:
    """Index of the first block whose scale at one of ``offsets`` is infinite or NaN, or -1.

    The scales are float16, except that a BF16 "block" is a bfloat16. The 8-bit scales of MXFP4 and
    NVFP4 have no infinity; there it is the code that stands for whatever is too large.
    """
    cdef int[MOST_SCALES] places
    cdef int count = len(offsets)
    cdef int nbytes
    cdef int64_t result
    _known(type_id, "type")
    nbytes = qk_type_sizes[type_id].nbytes
    if count > MOST_SCALES:
        raise ValueError(f"{count} scales in a block; at most {MOST_SCALES} are supported")
    for index in range(count):
        places[index] = offsets[index]
        if not 0 <= places[index] <= nbytes - 2:
            raise ValueError(f"a scale at byte {places[index]} of a block of {nbytes}")
    if blocks.shape[0] % nbytes != 0:
        raise ValueError(f"{blocks.shape[0]} bytes are not whole blocks of {nbytes}")
    if blocks.shape[0] == 0 or count == 0:
        return -1
    cdef int exponent = _EXTREMES.get(type_id, 0x7c00)
    with nogil:
        result = qk_first_infinite_scale(
            &blocks[0], blocks.shape[0] // nbytes, nbytes, places, count, exponent)
    return result


cdef int _same_shape(str what, int64_t rows, int64_t cols, int64_t n, int64_t k) except -1:
    if rows != n or cols != k:
        raise ValueError(f"{what} has shape {(rows, cols)}, expected {(n, k)}")
    return 0


cdef int _lattice(
        qk_lattice *lattice, const float[::1] levels, int uniform, int sub, int64_t columns
) except -1:
    if levels.shape[0] < 2 or levels.shape[0] > 256:
        raise ValueError(f"{levels.shape[0]} levels; 2 to 256 are supported")
    if not 0 < columns <= QK_COLUMNS_MAX or columns % 16 or sub < 1 or columns % sub:
        raise ValueError(f"{columns} columns in runs of {sub} are not supported")
    lattice.levels = &levels[0]
    lattice.count = <int>levels.shape[0]
    lattice.uniform = uniform
    lattice.sub = sub
    return 0


def feedback(
    const float[::1] levels, bint uniform, int sub,
    const float[:, ::1] target, const float[:, ::1] weights, const float[:, ::1] factor,
    const float[:, ::1] steps, const float[:, ::1] lows,
    uint8_t[:, ::1] codes, float[:, ::1] errors,
) -> None:
    """Round ``target`` (n, columns) column by column, passing errors on; see qk.h.

    ``factor`` is (columns, columns) of which the part above the diagonal counts; ``steps`` and
    ``lows`` are (n, columns / sub). Fills ``codes`` and ``errors``, ``weights`` less the values.
    """
    cdef const qk_table *table = _table()
    cdef qk_lattice lattice
    cdef int64_t n = target.shape[0]
    cdef int64_t k = target.shape[1]
    _lattice(&lattice, levels, uniform, sub, k)
    _same_shape("weights", weights.shape[0], weights.shape[1], n, k)
    _same_shape("factor", factor.shape[0], factor.shape[1], k, k)
    _same_shape("steps", steps.shape[0], steps.shape[1], n, k // sub)
    _same_shape("lows", lows.shape[0], lows.shape[1], n, k // sub)
    _same_shape("codes", codes.shape[0], codes.shape[1], n, k)
    _same_shape("errors", errors.shape[0], errors.shape[1], n, k)
    if n == 0:
        return
    with nogil:
        table.feedback(
            &lattice, &target[0, 0], &weights[0, 0], &factor[0, 0], &steps[0, 0], &lows[0, 0],
            n, <int>k, &codes[0, 0], &errors[0, 0])


def sweep(
    const float[::1] levels, bint uniform, int sub, int block, bint half,
    tuple scale_range, tuple min_range,
    const float[:, ::1] hessian, const float[:, ::1] sums, const float[:, ::1] gradient,
    bint scales_too, uint8_t[:, ::1] codes, float[:, ::1] d, float[:, ::1] scales,
    float[:, ::1] dmin=None, float[:, ::1] mins=None,
) -> None:
    """One sweep of coordinate descent over whole blocks of columns; see qk.h.

    ``gradient`` is (n, columns), the errors times the whole Hessian for these columns; ``hessian``
    (columns, columns) with a positive diagonal, ``sums`` (columns / sub, columns). Updates
    ``codes`` (n, columns) and, with ``scales_too``, ``d`` and ``dmin`` (n, columns / block),
    ``scales`` and ``mins`` (n, columns / sub).
    """
    cdef const qk_table *table = _table()
    cdef qk_lattice lattice
    cdef int64_t n = gradient.shape[0]
    cdef int64_t k = gradient.shape[1]
    cdef float *low = NULL
    cdef float *lows = NULL
    _lattice(&lattice, levels, uniform, sub, k)
    if block < 32 or block % sub or k % block or sub < 16:
        raise ValueError(f"blocks of {block} in runs of {sub} do not divide {k} columns")
    lattice.block = block
    lattice.half = half
    lattice.odd = 0
    lattice.scale_range[0], lattice.scale_range[1] = scale_range
    lattice.min_range[0], lattice.min_range[1] = min_range
    _same_shape("hessian", hessian.shape[0], hessian.shape[1], k, k)
    _same_shape("sums", sums.shape[0], sums.shape[1], k // sub, k)
    _same_shape("codes", codes.shape[0], codes.shape[1], n, k)
    _same_shape("d", d.shape[0], d.shape[1], n, k // block)
    _same_shape("scales", scales.shape[0], scales.shape[1], n, k // sub)
    if n == 0:
        return
    if dmin is not None and mins is not None:
        _same_shape("dmin", dmin.shape[0], dmin.shape[1], n, k // block)
        _same_shape("mins", mins.shape[0], mins.shape[1], n, k // sub)
        low = &dmin[0, 0]
        lows = &mins[0, 0]
    with nogil:
        table.sweep(
            &lattice, &hessian[0, 0], &sums[0, 0], &gradient[0, 0], n, <int>k, scales_too,
            &codes[0, 0], &d[0, 0], low, &scales[0, 0], lows)


SIGNS = {"none": QK_SIGNS_NONE, "free": QK_SIGNS_FREE, "even": QK_SIGNS_EVEN}
"""Whether a codebook's groups have signs of their own, and which are allowed."""


cdef int _points(
        qk_points *points, const float[:, ::1] first, const float[:, ::1] second,
        const uint8_t[:, ::1] patterns, str signs, float apart, int64_t columns
) except -1:
    cdef int group = <int>(2 * first.shape[1])
    cdef int64_t index
    if group not in (4, 8) or second.shape[1] != first.shape[1]:
        raise ValueError(f"halves of {first.shape[1]} and {second.shape[1]} weights")
    if not 0 < first.shape[0] <= QK_PATTERNS_MAX or not 0 < second.shape[0] <= QK_PATTERNS_MAX:
        raise ValueError(f"{first.shape[0]} and {second.shape[0]} patterns are not supported")
    if not 0 < patterns.shape[0] <= 2**16 or patterns.shape[1] != 2:
        raise ValueError(f"{patterns.shape[0]} points of {patterns.shape[1]} halves")
    for index in range(patterns.shape[0]):
        if patterns[index, 0] >= first.shape[0] or patterns[index, 1] >= second.shape[0]:
            raise ValueError(f"point {index} has a half that there is none of")
    if not 0 < columns <= QK_COLUMNS_MAX or columns % 16:
        raise ValueError(f"{columns} columns are not supported")
    if apart != 0 and (signs != "none" or patterns.shape[0] % 2):
        raise ValueError(f"{patterns.shape[0]} points with {signs} signs have no two halves apart")
    points.apart = apart
    points.count = <int>patterns.shape[0]
    points.group = group
    points.width = 8 if signs == "even" else group
    points.signs = SIGNS[signs]
    points.halves[0], points.halves[1] = &first[0, 0], &second[0, 0]
    points.half_count[0], points.half_count[1] = <int>first.shape[0], <int>second.shape[0]
    points.patterns = &patterns[0, 0]
    return 0


def feedback_points(
    const float[:, ::1] first, const float[:, ::1] second, const uint8_t[:, ::1] patterns,
    str signs, float apart, int sub, int spread, int most,
    const float[:, ::1] target, const float[:, ::1] weights, const float[:, ::1] factor,
    const float[:, ::1] metric, const float[:, ::1] norms, const float[::1] d,
    float[:, ::1] scales, int32_t[:, ::1] codes, float[:, ::1] errors,
) -> None:
    """Round ``target`` (n, columns) group by group, passing errors on; see qk.h.

    ``first`` and ``second`` are the patterns of a group's halves, ``patterns`` (points, 2) tells
    which a point has. With ``apart`` the second half of the points is the first one, its levels
    moved by that, and a run takes points from one half alone. ``factor`` is (columns, columns);
    ``metric`` (columns, width), the rows of each unit's own; ``norms`` (groups, points). Steps are
    ``d`` (n,) times ``scales`` (n, columns / sub), for each of which the best is taken of those up
    to ``spread`` odd numbers away and not above ``most``. Fills ``codes`` (n, groups) and
    ``errors``, ``weights`` less the values.
    """
    cdef const qk_table *table = _table()
    cdef qk_points points
    cdef int64_t n = target.shape[0]
    cdef int64_t k = target.shape[1]
    _points(&points, first, second, patterns, signs, apart, k)
    if sub < 1 or k % sub or sub % points.width:
        raise ValueError(f"{k} columns in runs of {sub} are not supported")
    _same_shape("weights", weights.shape[0], weights.shape[1], n, k)
    _same_shape("factor", factor.shape[0], factor.shape[1], k, k)
    _same_shape("metric", metric.shape[0], metric.shape[1], k, points.width)
    _same_shape("norms", norms.shape[0], norms.shape[1], k // points.group, points.count)
    _same("d", d.shape[0], n)
    _same_shape("scales", scales.shape[0], scales.shape[1], n, k // sub)
    _same_shape("codes", codes.shape[0], codes.shape[1], n, k // points.group)
    _same_shape("errors", errors.shape[0], errors.shape[1], n, k)
    if n == 0:
        return
    with nogil:
        table.feedback_points(
            &points, sub, spread, most, &target[0, 0], &weights[0, 0], &factor[0, 0],
            &metric[0, 0], &norms[0, 0], &d[0], n, <int>k, &scales[0, 0], &codes[0, 0],
            &errors[0, 0])


def sweep_points(
    const float[:, ::1] first, const float[:, ::1] second, const uint8_t[:, ::1] patterns,
    str signs, float apart, int sub, int block, tuple scale_range,
    const float[:, ::1] hessian, const float[:, ::1] norms, const float[:, ::1] gradient,
    bint scales_too, int32_t[:, ::1] codes, float[:, ::1] d, float[:, ::1] scales,
) -> None:
    """One sweep of coordinate descent over whole blocks of columns; see qk.h.

    ``gradient`` is (n, columns), the errors times the whole Hessian for these columns; ``hessian``
    (columns, columns) with a positive diagonal, ``norms`` (groups, points). Updates ``codes``
    (n, groups) and, with ``scales_too``, ``d`` (n, columns / block) and the odd ``scales``
    (n, columns / sub).
    """
    cdef const qk_table *table = _table()
    cdef qk_points points
    cdef qk_lattice lattice
    cdef int64_t n = gradient.shape[0]
    cdef int64_t k = gradient.shape[1]
    cdef int64_t row, column
    _points(&points, first, second, patterns, signs, apart, k)
    if sub < 16 or block < 32 or block % sub or k % block:
        raise ValueError(f"blocks of {block} in runs of {sub} do not divide {k} columns")
    lattice.levels = NULL
    lattice.count, lattice.uniform = 0, 0
    lattice.sub, lattice.block = sub, block
    lattice.half, lattice.odd = 1, 1
    lattice.scale_range[0], lattice.scale_range[1] = scale_range
    lattice.min_range[0], lattice.min_range[1] = 0, 0
    _same_shape("hessian", hessian.shape[0], hessian.shape[1], k, k)
    _same_shape("norms", norms.shape[0], norms.shape[1], k // points.group, points.count)
    _same_shape("codes", codes.shape[0], codes.shape[1], n, k // points.group)
    _same_shape("d", d.shape[0], d.shape[1], n, k // block)
    _same_shape("scales", scales.shape[0], scales.shape[1], n, k // sub)
    for row in range(n):
        for column in range(codes.shape[1]):
            if codes[row, column] & 0xffff >= points.count:
                raise ValueError(f"code {codes[row, column]} is no point of the grid")
    if n == 0:
        return
    with nogil:
        table.sweep_points(
            &points, &lattice, &hessian[0, 0], &norms[0, 0], &gradient[0, 0], n, <int>k,
            scales_too, &codes[0, 0], &d[0, 0], &scales[0, 0])
