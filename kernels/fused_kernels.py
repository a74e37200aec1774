"""Device code of the fused pass: read, combine, assemble (fused.py has the schedule's launchers and says how they belong together).

In the loop. A tile of entries is gathered once, through indices loaded one iteration ahead (an index load in the iteration that needs it
would stop Triton from pipelining the gather), multiplied with the rows, exponentiated, and multiplied again as values. The width is split
into parts no wider than the row tile where the compiler would otherwise hand both products a layout in which every warp reads every row.

Pivot. |x·m| ≤ 1 for unit rows, so the constant 1/τ replaces the running maximum where exp(-2/τ) stays a normal number: bfloat16 and float32
at τ ≥ 0.025. Temperatures that only the GPU knows launch both variants; each looks at them first and the wrong one leaves at once.
"""

# ruff: noqa: RUF005  (Triton's language adds tuples but does not unpack them)

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Smallest temperature of the constant pivot: weights reach down to 2**(-2 log2(e) / 0.025) = 2**-115, still 2**11 above the smallest
# normal number, which leaves room for rows up to 4% longer than a unit.
CONSTANT_PIVOT_TEMP: tl.constexpr = tl.constexpr(0.025)
# float16 weights below 2**-14 lose bits; 2**15 times larger, a row's largest is still in range and its small ones keep theirs.
HALF_HEADROOM = 15.0
# What a pivot starts from: below any logit, yet finite, so that the difference of two of them is 0 and not NaN.
NO_PIVOT: tl.constexpr = tl.constexpr(-3e38)


@triton.jit(do_not_specialize=["student_rows", "teacher_rows", "student_tiles", "blocks", "tiles", "share", "extra"])
def read_kernel(
    student_ptr,  # [student_rows, WIDTH]
    teacher_ptr,  # [teacher_rows, WIDTH]
    memory_ptr,  # [K, WIDTH]
    entry_values_ptr,  # [K, VALUE_WIDTH], what is read out where OTHER_VALUES
    partition_ptr,  # [K] int32 where GATHERED, else entries are taken as they lie
    bias_ptr,  # [K] float32 in the order of the partition, in units of log 2, where HAS_BIAS
    row_group_ptr,  # [student_rows] int32 where HAS_GROUPS: rows do not see the entries of their own group
    key_group_ptr,  # [K] int32 in the order of the partition
    student_temp,  # a number, or a pointer where TEMPS_ON_DEVICE
    teacher_temp,
    values_ptr,  # [slots, BLOCK_ROWS, VALUE_WIDTH] float32: Σ weight · value
    totals_ptr,  # [slots, BLOCK_ROWS] float32: Σ weight
    pivots_ptr,  # [slots, BLOCK_ROWS] float32: log2 of the scale of both
    student_rows,
    teacher_rows,
    student_tiles,  # row tiles of the student; the teacher's follow
    block_size,
    blocks,
    tiles,  # entry tiles of a block
    share,  # entry tiles of a program; the first `extra` programs have one more
    extra,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    GATHERED: tl.constexpr,
    OTHER_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    EVEN_BLOCK: tl.constexpr,  # block_size is a multiple of BLOCK_ENTRIES
    CONSTANT_PIVOT: tl.constexpr,
    EITHER_PIVOT: tl.constexpr,  # both variants are launched; the temperatures say which of them works
    TEMPS_ON_DEVICE: tl.constexpr,
    HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    MASK_STORES: tl.constexpr,
    LOAD_KEYS: tl.constexpr,
):
    i_program = tl.program_id(0)
    if TEMPS_ON_DEVICE:
        student_tau = tl.load(student_temp)
        teacher_tau = tl.load(teacher_temp)
        constant_is_safe = tl.minimum(student_tau, teacher_tau) >= CONSTANT_PIVOT_TEMP
        if EITHER_PIVOT and constant_is_safe != CONSTANT_PIVOT:
            return
    else:
        student_tau = student_temp
        teacher_tau = teacher_temp
    begin = i_program * share + tl.minimum(i_program, extra)
    end = begin + share + (i_program < extra).to(tl.int32)

    PART: tl.constexpr = PADDED_WIDTH // PARTS
    VALUE_PART: tl.constexpr = PADDED_VALUE_WIDTH // PARTS
    EVEN_WIDTH: tl.constexpr = WIDTH == PADDED_WIDTH
    EVEN_VALUES: tl.constexpr = VALUE_WIDTH == PADDED_VALUE_WIDTH
    ROUNDS_WEIGHTS: tl.constexpr = memory_ptr.dtype.element_ty != tl.float32
    CUTS_WEIGHTS: tl.constexpr = memory_ptr.dtype.element_ty == tl.bfloat16
    o_row = tl.arange(0, BLOCK_ROWS)
    o_entry = tl.arange(0, BLOCK_ENTRIES)
    o_column = tl.arange(0, PART)
    o_value = tl.arange(0, VALUE_PART)
    for item in range(begin // tiles, tl.cdiv(end, tiles)):
        first = tl.maximum(begin - item * tiles, 0)
        last = tl.minimum(end - item * tiles, tiles)
        i_rows = item // blocks
        i_block = item % blocks
        if i_rows < student_tiles:
            p_x = student_ptr
            start_row = i_rows * BLOCK_ROWS
            rows = student_rows
            scale = LOG2E / student_tau
        else:
            p_x = teacher_ptr
            start_row = (i_rows - student_tiles) * BLOCK_ROWS
            rows = teacher_rows
            scale = LOG2E / teacher_tau
        m_x = (o_row < rows - start_row)[:, None]
        p_x = p_x + start_row.to(tl.int64) * WIDTH + o_row[:, None] * WIDTH + o_column[None, :]
        b_x = ()  # PARTS × [BLOCK_ROWS, PART]
        b_values = ()  # PARTS × [BLOCK_ROWS, VALUE_PART]
        for part in tl.static_range(PARTS):
            m_part = m_x if EVEN_WIDTH else m_x & (part * PART + o_column < WIDTH)[None, :]
            b_x = b_x + (tl.load(p_x + part * PART, mask=m_part, other=0.0),)
            b_values = b_values + (tl.zeros([BLOCK_ROWS, VALUE_PART], tl.float32),)
        b_total = tl.zeros([BLOCK_ROWS], tl.float32)
        b_rounded = tl.zeros([BLOCK_ROWS], tl.float32)  # Σ of the weights as the second product has them
        b_pivot = tl.full([BLOCK_ROWS], scale if CONSTANT_PIVOT else NO_PIVOT, tl.float32)

        begin_block = i_block.to(tl.int64) * block_size
        p_index = partition_ptr + begin_block + o_entry
        if GATHERED:
            if EVEN_BLOCK:
                b_index = tl.load(p_index + first * BLOCK_ENTRIES)
            else:
                b_index = tl.load(p_index + first * BLOCK_ENTRIES, mask=first * BLOCK_ENTRIES + o_entry < block_size, other=0)
        if HAS_GROUPS:
            b_row_group = tl.load(row_group_ptr + start_row + o_row, mask=o_row < rows - start_row, other=0)
        for tile in tl.range(first, last, num_stages=STAGES):
            start = tile * BLOCK_ENTRIES
            m_entry = start + o_entry < block_size
            if GATHERED:
                b_entry = b_index.to(tl.int64)
            else:
                b_entry = begin_block + (start + o_entry if EVEN_BLOCK else tl.minimum(start + o_entry, block_size - 1))
            p_entry = memory_ptr + b_entry * WIDTH
            p_m = p_entry[:, None] + o_column[None, :]
            if GATHERED:
                if EVEN_BLOCK:
                    b_index = tl.load(p_index + tl.minimum(start + BLOCK_ENTRIES, block_size - BLOCK_ENTRIES))
                else:
                    m_next = start + BLOCK_ENTRIES + o_entry < block_size
                    b_index = tl.load(p_index + start + BLOCK_ENTRIES, mask=m_next, other=0)
            if HAS_BIAS:
                b_bias = tl.load(bias_ptr + begin_block + start + o_entry, mask=m_entry, other=float("-inf"))
            if HAS_GROUPS:
                b_key_group = tl.load(key_group_ptr + begin_block + start + o_entry, mask=m_entry, other=0)
            b_m = ()  # PARTS × [BLOCK_ENTRIES, PART]
            b_logits = tl.zeros([BLOCK_ROWS, BLOCK_ENTRIES], tl.float32)
            for part in tl.static_range(PARTS):
                if EVEN_WIDTH:
                    b_part = tl.load(p_m + part * PART)
                else:
                    b_part = tl.load(p_m + part * PART, mask=(part * PART + o_column < WIDTH)[None, :], other=0.0)
                if LOAD_KEYS:
                    p_key = p_entry[None, :] + part * PART + o_column[:, None]
                    if EVEN_WIDTH:
                        b_key = tl.load(p_key)
                    else:
                        b_key = tl.load(p_key, mask=(part * PART + o_column < WIDTH)[:, None], other=0.0)
                else:
                    b_key = b_part.T
                b_logits = tl.dot(b_x[part], b_key, b_logits, input_precision=PRECISION)
                if OTHER_VALUES:
                    p_value = entry_values_ptr + b_entry[:, None] * VALUE_WIDTH + part * VALUE_PART + o_value[None, :]
                    if EVEN_VALUES:
                        b_part = tl.load(p_value)
                    else:
                        b_part = tl.load(p_value, mask=(part * VALUE_PART + o_value < VALUE_WIDTH)[None, :], other=0.0)
                b_m = b_m + (b_part,)

            if CONSTANT_PIVOT:
                b_weights = tl.exp2(b_logits * scale - scale)
            else:
                if HAS_BIAS:
                    b_logits = b_logits * scale + b_bias[None, :]
                if HAS_GROUPS:
                    b_logits = tl.where(b_row_group[:, None] != b_key_group[None, :], b_logits, float("-inf"))
                if not EVEN_BLOCK:
                    b_logits = tl.where(m_entry[None, :], b_logits, float("-inf"))
                factor = 1.0 if HAS_BIAS else scale
                b_new = tl.maximum(b_pivot, tl.max(b_logits, 1) * factor - HEADROOM)
                b_rescale = tl.exp2(b_pivot - b_new)
                b_pivot = b_new
                b_weights = tl.exp2(b_logits * factor - b_pivot[:, None])
                b_total = b_total * b_rescale
                b_rounded = b_rounded * b_rescale
                b_old = b_values
                b_values = ()
                for part in tl.static_range(PARTS):
                    b_values = b_values + (b_old[part] * b_rescale[:, None],)
            if not EVEN_BLOCK:
                b_weights = tl.where(m_entry[None, :], b_weights, 0.0)
            b_total += tl.sum(b_weights, 1)
            if CUTS_WEIGHTS:
                # Their upper halves as they are: a conversion costs the transcendental unit as much as the power of two did.
                b_upper = b_weights.to(tl.uint32, bitcast=True) & 0xFFFF0000
                b_rounded += tl.sum(b_upper.to(tl.float32, bitcast=True), 1)
                b_operand = (b_upper >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            else:
                b_operand = b_weights.to(memory_ptr.dtype.element_ty)
                if ROUNDS_WEIGHTS:
                    b_rounded += tl.sum(b_operand.to(tl.float32), 1)
            b_old = b_values
            b_values = ()
            for part in tl.static_range(PARTS):
                b_values = b_values + (tl.dot(b_operand, b_m[part], b_old[part], input_precision=PRECISION),)

        # Of two pieces of work that follow each other the second has a later program or a later item: the sum tells them apart.
        slot = (i_program + item).to(tl.int64)
        # Makes the read-out a mean of entries however the weights were rounded; their exact sum stays the softmax's.
        b_correction = (b_total / tl.where(b_rounded == 0.0, 1.0, b_rounded))[:, None] if ROUNDS_WEIGHTS else 1.0
        tl.store(totals_ptr + slot * BLOCK_ROWS + o_row, b_total)
        if not CONSTANT_PIVOT:
            tl.store(pivots_ptr + slot * BLOCK_ROWS + o_row, b_pivot)
        p_values = values_ptr + slot * BLOCK_ROWS * VALUE_WIDTH + o_row[:, None] * VALUE_WIDTH + o_value[None, :]
        for part in tl.static_range(PARTS):
            if EVEN_VALUES and not MASK_STORES:
                tl.store(p_values + part * VALUE_PART, b_values[part] * b_correction)
            else:
                m_part = m_x if EVEN_VALUES else m_x & (part * VALUE_PART + o_value < VALUE_WIDTH)[None, :]
                tl.store(p_values + part * VALUE_PART, b_values[part] * b_correction, mask=m_part)


@triton.jit
def _owner(tile, share, extra):
    """The program that has a tile of the list."""
    long = extra * (share + 1)
    return tl.where(tile < long, tile // (share + 1), extra + (tile - long) // share)


@triton.jit(do_not_specialize=["student_rows", "student_tiles", "blocks", "tiles", "share", "extra"])
def combine_kernel(
    values_ptr,
    totals_ptr,
    pivots_ptr,
    student_temp,
    teacher_temp,
    readout_ptr,  # [student_rows + teacher_rows, WIDTH] float32, as wide as the values
    logsumexp_ptr,  # [student_rows + teacher_rows] float32, or [.., blocks] where PER_BLOCK
    student_rows,
    student_tiles,
    blocks,
    tiles,
    share,
    extra,
    WIDTH: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,  # at a time
    SLOTS: tl.constexpr,  # of each of them at a time
    BLOCK_ROWS: tl.constexpr,
    CONSTANT_PIVOT: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
):
    """One program per row and part of its columns: partials of a block are brought to one scale and normalised, blocks are added up.

    The partials of several blocks are one tile, so that their loads wait for memory together and not one after the other.
    """
    row = tl.program_id(0)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < WIDTH
    student_tau = tl.load(student_temp) if TEMPS_ON_DEVICE else student_temp
    teacher_tau = tl.load(teacher_temp) if TEMPS_ON_DEVICE else teacher_temp
    constant = CONSTANT_PIVOT
    if TEMPS_ON_DEVICE:
        constant = CONSTANT_PIVOT & (tl.minimum(student_tau, teacher_tau) >= CONSTANT_PIVOT_TEMP)
    common_pivot = LOG2E / tl.where(row < student_rows, student_tau, teacher_tau)
    local = tl.where(row < student_rows, row, row - student_rows)
    i_rows = local // BLOCK_ROWS + tl.where(row < student_rows, 0, student_tiles)
    o_slot = tl.arange(0, SLOTS)
    b_readout = tl.zeros([COLUMNS], tl.float32)
    logsumexp = 0.0
    for start in range(0, blocks, BLOCKS):
        o_block = start + tl.arange(0, BLOCKS)
        b_item = i_rows * blocks + tl.minimum(o_block, blocks - 1)
        b_first = _owner(b_item * tiles, share, extra) + b_item
        b_last = _owner(b_item * tiles + tiles - 1, share, extra) + b_item
        b_pivot = tl.full([BLOCKS], NO_PIVOT, tl.float32)
        b_total = tl.zeros([BLOCKS], tl.float32)
        b_values = tl.zeros([BLOCKS, COLUMNS], tl.float32)
        for done in range(0, tl.max(b_last - b_first, 0) + 1, SLOTS):
            b_slot = b_first[:, None] + done + o_slot[None, :]  # [BLOCKS, SLOTS]
            m_slot = b_slot <= b_last[:, None]
            b_cell = b_slot.to(tl.int64) * BLOCK_ROWS + local % BLOCK_ROWS
            b_other = tl.where(m_slot, common_pivot, NO_PIVOT)
            if not constant:
                b_other = tl.load(pivots_ptr + b_cell, mask=m_slot, other=NO_PIVOT)
            b_totals = tl.load(totals_ptr + b_cell, mask=m_slot, other=0.0)
            p_partial = values_ptr + b_cell[:, :, None] * WIDTH + o_column[None, None, :]
            b_partial = tl.load(p_partial, mask=m_slot[:, :, None] & m_column[None, None, :], other=0.0)  # [BLOCKS, SLOTS, COLUMNS]
            b_new = tl.maximum(b_pivot, tl.max(b_other, 1))
            b_rescale = tl.exp2(b_pivot - b_new)
            b_weight = tl.exp2(b_other - b_new[:, None])
            b_pivot = b_new
            b_total = b_total * b_rescale + tl.sum(b_totals * b_weight, 1)
            b_values = b_values * b_rescale[:, None] + tl.sum(b_partial * b_weight[:, :, None], 1)
        m_block = o_block < blocks
        m_seen = m_block & (b_total != 0.0)  # a row that sees no entry of a block reads out nothing there
        b_readout += tl.sum(tl.where(m_seen[:, None], b_values / b_total[:, None], 0.0), 0)
        b_logsumexp = (b_pivot + tl.log2(b_total)) / LOG2E
        if PER_BLOCK:
            if tl.program_id(1) == 0:
                tl.store(logsumexp_ptr + row.to(tl.int64) * blocks + o_block, b_logsumexp, mask=m_block)
        else:
            logsumexp += tl.sum(tl.where(m_block, b_logsumexp, 0.0), 0)
    if not PER_BLOCK and tl.program_id(1) == 0:
        tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(readout_ptr + row.to(tl.int64) * WIDTH + o_column, b_readout, mask=m_column)


@triton.jit(do_not_specialize=["rows", "blocks", "tiles", "row_tiles", "splits"])
def back_kernel(
    rows_ptr,  # [rows, WIDTH]
    memory_ptr,  # [K, WIDTH]
    row_values_ptr,  # [rows, VALUE_WIDTH] where OTHER_VALUES
    partition_ptr,  # [K] int32 where GATHERED
    bias_ptr,  # [K] float32 in the order of the partition, in units of log 2, where HAS_BIAS
    row_group_ptr,  # [rows] int32 where HAS_GROUPS
    key_group_ptr,  # [K] int32 in the order of the partition
    shift_ptr,  # [blocks, rows] float32: log2 of what divides a row's weights
    factor_ptr,  # [blocks, rows] float32 where HAS_FACTOR, or [1, rows]
    factor_stride,  # rows, or 0 where all blocks have one factor
    size_ptr,  # [1] float32 where SCALED: another
    temperature,  # a number, or a pointer where TEMPS_ON_DEVICE
    result_ptr,  # [splits, K, VALUE_WIDTH] float32, or [splits, K] where not HAS_VALUES
    entries,  # K
    rows,
    block_size,
    blocks,
    tiles,  # entry tiles of a block
    row_tiles,
    splits,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GATHERED: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    OTHER_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SCALED: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
    SIZE: tl.constexpr,  # a factor of all results
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    LOAD_KEYS: tl.constexpr,
):
    """What entries get back: a program keeps a tile of entries of one block and sees a part of the rows, a tile at a time.

    The read-out with its operands exchanged. The logsumexp of rows are known, so there is no running maximum; each result is written once.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_block = i_tile // tiles
    tau = tl.load(temperature) if TEMPS_ON_DEVICE else temperature
    scale = LOG2E / tau
    PART: tl.constexpr = PADDED_WIDTH // PARTS
    VALUE_PART: tl.constexpr = PADDED_VALUE_WIDTH // PARTS
    EVEN_WIDTH: tl.constexpr = WIDTH == PADDED_WIDTH
    EVEN_VALUES: tl.constexpr = VALUE_WIDTH == PADDED_VALUE_WIDTH
    o_entry = tl.arange(0, BLOCK_ENTRIES)
    o_row = tl.arange(0, BLOCK_ROWS)
    o_column = tl.arange(0, PART)
    o_value = tl.arange(0, VALUE_PART)

    # Entries as they lie have one address and small steps from it, which take half the registers of addresses.
    start_tile = i_tile % tiles * BLOCK_ENTRIES
    m_entry = o_entry < block_size - start_tile
    begin_tile = i_block.to(tl.int64) * block_size + start_tile
    b_entry = o_entry
    p_memory = memory_ptr
    p_result = result_ptr + i_split.to(tl.int64) * entries * VALUE_WIDTH
    if GATHERED:
        b_entry = tl.load(partition_ptr + begin_tile + o_entry, mask=m_entry, other=0).to(tl.int64)
    else:
        p_memory += begin_tile * WIDTH
        p_result += begin_tile * VALUE_WIDTH
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + begin_tile + o_entry, mask=m_entry, other=0.0)
    if HAS_GROUPS:
        b_key_group = tl.load(key_group_ptr + begin_tile + o_entry, mask=m_entry, other=0)
    b_m = ()  # PARTS × [BLOCK_ENTRIES, PART]
    b_result = ()  # PARTS × [BLOCK_ENTRIES, VALUE_PART]
    for part in tl.static_range(PARTS):
        m_part = m_entry[:, None] if EVEN_WIDTH else m_entry[:, None] & (part * PART + o_column < WIDTH)[None, :]
        b_m = b_m + (tl.load(p_memory + b_entry[:, None] * WIDTH + part * PART + o_column[None, :], mask=m_part, other=0.0),)
        b_result = b_result + (tl.zeros([BLOCK_ENTRIES, VALUE_PART], tl.float32),)
    b_sum = tl.zeros([BLOCK_ENTRIES], tl.float32)

    first = i_split * row_tiles // splits
    last = (i_split + 1) * row_tiles // splits
    p_shift = shift_ptr + i_block.to(tl.int64) * rows + o_row
    p_factor = factor_ptr + i_block.to(tl.int64) * factor_stride + o_row
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * BLOCK_ROWS
        b_row = tl.minimum(start + o_row, rows - 1).to(tl.int64)  # past the end the last row again, with weight 0
        m_row = start + o_row < rows
        b_shift = tl.load(p_shift + start, mask=m_row, other=float("inf"))
        if HAS_FACTOR:
            b_factor = tl.load(p_factor + start, mask=m_row, other=0.0)
        if HAS_GROUPS:
            b_row_group = tl.load(row_group_ptr + start + o_row, mask=m_row, other=0)
        p_row = rows_ptr + b_row * WIDTH
        b_logits = tl.zeros([BLOCK_ENTRIES, BLOCK_ROWS], tl.float32)
        b_y = ()  # PARTS × [BLOCK_ROWS, VALUE_PART]
        for part in tl.static_range(PARTS):
            m_column = part * PART + o_column < WIDTH
            if HAS_VALUES and not OTHER_VALUES:
                p_part = p_row[:, None] + part * PART + o_column[None, :]
                b_part = tl.load(p_part) if EVEN_WIDTH else tl.load(p_part, mask=m_column[None, :], other=0.0)
            if LOAD_KEYS or not HAS_VALUES or OTHER_VALUES:
                p_x = p_row[None, :] + part * PART + o_column[:, None]
                b_x = tl.load(p_x) if EVEN_WIDTH else tl.load(p_x, mask=m_column[:, None], other=0.0)
            else:
                b_x = b_part.T
            b_logits = tl.dot(b_m[part], b_x, b_logits, input_precision=PRECISION)
            if OTHER_VALUES:
                p_value = row_values_ptr + b_row[:, None] * VALUE_WIDTH + part * VALUE_PART + o_value[None, :]
                if EVEN_VALUES:
                    b_part = tl.load(p_value)
                else:
                    b_part = tl.load(p_value, mask=(part * VALUE_PART + o_value < VALUE_WIDTH)[None, :], other=0.0)
            if HAS_VALUES:
                b_y = b_y + (b_part,)
        b_logits = b_logits * scale - b_shift[None, :]
        if HAS_BIAS:
            b_logits += b_bias[:, None]
        b_weights = tl.exp2(b_logits)
        if HAS_FACTOR:
            b_weights = b_weights * b_factor[None, :]
        if HAS_GROUPS:
            b_weights = tl.where(b_key_group[:, None] != b_row_group[None, :], b_weights, 0.0)
        if HAS_VALUES:
            b_operand = b_weights.to(memory_ptr.dtype.element_ty)
            b_old = b_result
            b_result = ()
            for part in tl.static_range(PARTS):
                b_result = b_result + (tl.dot(b_operand, b_y[part], b_old[part], input_precision=PRECISION),)
        else:
            b_sum += tl.sum(b_weights, 1)

    size = SIZE
    if SCALED:
        size = SIZE * tl.load(size_ptr)
    p_result += b_entry * VALUE_WIDTH
    if HAS_VALUES:
        for part in tl.static_range(PARTS):
            m_value = m_entry[:, None] if EVEN_VALUES else m_entry[:, None] & (part * VALUE_PART + o_value < VALUE_WIDTH)[None, :]
            tl.store(p_result[:, None] + part * VALUE_PART + o_value[None, :], b_result[part] * size, mask=m_value)
    else:
        tl.store(p_result, b_sum * size, mask=m_entry)


@triton.jit(do_not_specialize=["student_views", "teacher_views", "images", "blocks", "pairs"])
def assemble_kernel(
    student_ptr,  # [V, images, WIDTH]
    teacher_ptr,  # [T, images, WIDTH]
    readout_ptr,  # [V + T, images, WIDTH] float32
    logsumexp_ptr,  # [V + T, images] float32
    student_temp,
    teacher_temp,
    statistics_ptr,  # [4, V + T, images] float32: each row's part of the four statistics of loss.assemble
    gradient_ptr,  # [V, images, WIDTH] float32
    student_views,
    teacher_views,
    images,
    blocks,
    pairs,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TEACHERS: tl.constexpr,  # teacher views, padded to a power of two
    TEMPS_ON_DEVICE: tl.constexpr,
):
    """One program per image and view: its part of loss.assemble."""
    image = tl.program_id(0)
    view = tl.program_id(1)
    o_column = tl.arange(0, PADDED_WIDTH)
    m_column = o_column < WIDTH
    views = student_views + teacher_views
    shared = tl.minimum(student_views, teacher_views)  # teacher view j is the same crop as student view j
    scale = 1.0 / (pairs * 1.0 * images * blocks)
    row = (view * images + image).to(tl.int64)
    b_readout = tl.load(readout_ptr + row * WIDTH + o_column, mask=m_column, other=0.0)
    logsumexp = tl.load(logsumexp_ptr + row)
    loss = 0.0
    student_entropy = 0.0
    teacher_entropy = 0.0
    kl = 0.0
    if view < student_views:
        student_tau = tl.load(student_temp) if TEMPS_ON_DEVICE else student_temp
        o_teacher = tl.arange(0, TEACHERS)
        m_target = (o_teacher < teacher_views) & (o_teacher != view)
        p_target = readout_ptr + ((student_views + o_teacher) * images + image).to(tl.int64)[:, None] * WIDTH + o_column[None, :]
        b_target = tl.sum(tl.load(p_target, mask=m_target[:, None] & m_column[None, :], other=0.0), 0)
        targets = teacher_views - (view < shared).to(tl.float32)
        b_z = tl.load(student_ptr + row * WIDTH + o_column, mask=m_column, other=0.0).to(tl.float32)
        loss = (targets * logsumexp - tl.sum(b_z * b_target) / student_tau) * scale
        kl = loss
        student_entropy = (logsumexp - tl.sum(b_z * b_readout) / student_tau) / (student_views * 1.0 * images * blocks)
        b_gradient = (targets * b_readout - b_target) * (scale / student_tau)
        tl.store(gradient_ptr + row * WIDTH + o_column, b_gradient, mask=m_column)
    else:
        teacher_tau = tl.load(teacher_temp) if TEMPS_ON_DEVICE else teacher_temp
        j = view - student_views
        b_w = tl.load(teacher_ptr + (j * images + image).to(tl.int64) * WIDTH + o_column, mask=m_column, other=0.0)
        entropy = logsumexp - tl.sum(b_w.to(tl.float32) * b_readout) / teacher_tau
        teacher_entropy = entropy / (teacher_views * 1.0 * images * blocks)
        kl = -entropy * (student_views - (j < shared).to(tl.float32)) * scale
    cells = (views * images).to(tl.int64)
    tl.store(statistics_ptr + row, loss)
    tl.store(statistics_ptr + cells + row, student_entropy)
    tl.store(statistics_ptr + 2 * cells + row, teacher_entropy)
    tl.store(statistics_ptr + 3 * cells + row, kl)
