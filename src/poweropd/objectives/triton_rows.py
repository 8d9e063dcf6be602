"""The Triton kernels behind `kernels`: one program a row, two sweeps over its columns, fp32 in registers.

The first sweep is online, as in Milakov and Gimelshein, arXiv 1805.02867: sums over exp(logit - largest so far), held per
lane and rescaled where a larger logit is met, so that a column costs one exponential and a block of columns one
reduction. What a logit adds is taken relative to the largest, so that large logits cost no digits. The second sweep writes
the gradient over the products. Both form the logits afresh from the products.

Imported by `kernels` alone, when a kernel is to run: `triton` is not there without a GPU.
"""

import triton
import triton.language as tl

NONE_YET = tl.constexpr(float("-inf"))  # in the place of the largest of no logits
NO_WEIGHT = tl.constexpr(-200.0)  # finite, and its exponential is 0 in fp32


@triton.jit
def _logits(products, bias, columns, inside, scale: tl.constexpr, softcap: tl.constexpr):
    """`lm_head.logits_of` some columns of a row; -inf where not inside."""
    logits = tl.load(products + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        logits += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(logits / softcap))
        logits = tl.where(logits < 0.0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))  # softcap * tanh
    return tl.where(inside, logits, NONE_YET)


@triton.jit
def _through_logits(gradient, logits, scale: tl.constexpr, softcap: tl.constexpr):
    """The gradient with respect to the products, from that with respect to the logits."""
    if softcap is not None:
        gradient *= 1.0 - (logits / softcap) * (logits / softcap)
    return gradient * scale


@triton.jit
def _below(logits, largest, inside):
    return tl.where(inside, logits - largest, NO_WEIGHT)


@triton.jit
def _take(logits, columns, size, largest, top1, sums, depths):
    """Take a block of logits into what is known of its row so far.

    sums and depths: per lane, of e = exp(logit - largest) and of e * (logit - largest). Beside them comes what the
    largest so far lies below the new one, and of the block logit - largest and e.
    """
    peak = tl.max(logits, axis=0)
    fall = 0.0
    if peak > largest:
        if largest > NONE_YET:
            fall = largest - peak
        depths = tl.exp(fall) * (depths + fall * sums)
        sums *= tl.exp(fall)
        top1 = tl.min(tl.where(logits == peak, columns, size), axis=0)
        largest = peak
    below = _below(logits, largest, columns < size)
    e = tl.exp(below)
    return largest, top1, sums + e, depths + e * below, fall, below, e


@triton.jit
def _store(row, normalisers, entropies, largest_logits, top1_ids, largest, log_total, depth, top1):
    """The statistics of a row; `depth` is the mean of logit - largest."""
    tl.store(normalisers + row, largest + log_total)
    tl.store(entropies + row, log_total - depth)
    tl.store(largest_logits + row, largest)
    tl.store(top1_ids + row, top1.to(tl.int64))


@triton.jit
def softmax_rows(
    products,
    bias,
    normalisers,
    entropies,
    largest_logits,
    top1_ids,
    size,
    stride,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of products [B, size] with `stride` between rows; see `kernels.softmax_rows`."""
    row = tl.program_id(0).to(tl.int64)  # B * size may pass 2^31
    products += row * stride
    lanes = tl.arange(0, BLOCK)
    sums, depths = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    largest, top1 = tl.full([], NONE_YET, tl.float32), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        logits = _logits(products, bias, columns, columns < size, scale, softcap)
        largest, top1, sums, depths, _, _, _ = _take(logits, columns, size, largest, top1, sums, depths)
    total = tl.sum(sums, axis=0)
    log_total, depth = tl.log(total), tl.sum(depths, axis=0) / total
    _store(row, normalisers, entropies, largest_logits, top1_ids, largest, log_total, depth, top1)
    if GRADIENT:
        share = 1.0 / total
        for start in range(0, size, BLOCK):
            columns = start + lanes
            inside = columns < size
            logits = _logits(products, bias, columns, inside, scale, softcap)
            gradient = _through_logits(tl.exp(_below(logits, largest, inside)) * share, logits, scale, softcap)
            tl.store(products + columns, gradient.to(products.dtype.element_ty), mask=inside)


@triton.jit
def _joined(log_q, log_p, there):
    """log (Q / P) of the union of outcomes, and what joining them adds to KL(q || p); `there` masks what is no outcome."""
    q = tl.where(there, tl.exp(log_q), 0.0)
    apart = tl.sum(tl.where(there, q * (log_q - log_p), 0.0), axis=0)
    ratio = _log_sum_exp(log_q) - _log_sum_exp(log_p)
    return ratio, tl.sum(q, axis=0) * ratio - apart


@triton.jit
def _log_sum_exp(values):
    peak = tl.max(values, axis=0)
    return peak + tl.log(tl.sum(tl.exp(values - peak), axis=0))


@triton.jit
def reverse_kl_rows(
    student,
    teacher,
    student_bias,
    teacher_bias,
    end_ids,
    values,
    at_teachers_top1,
    normalisers,
    entropies,
    largest_logits,
    top1_ids,
    teacher_normalisers,
    teacher_entropies,
    teacher_largest_logits,
    teacher_top1_ids,
    size,
    student_stride,
    teacher_stride,
    student_scale: tl.constexpr,
    student_softcap: tl.constexpr,
    teacher_scale: tl.constexpr,
    teacher_softcap: tl.constexpr,
    num_ends: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of products [B, size] of both; see `kernels.reverse_kl_rows`. ENDS is a power of two, at least num_ends."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    sums, teacher_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    depths, teacher_depths = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    crosses = tl.zeros([BLOCK], tl.float32)  # of the student's e * (teacher's logit - its largest)
    largest, teacher_largest = tl.full([], NONE_YET, tl.float32), tl.full([], NONE_YET, tl.float32)
    top1, teacher_top1 = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        inside = columns < size
        logits = _logits(teacher, teacher_bias, columns, inside, teacher_scale, teacher_softcap)
        teacher_largest, teacher_top1, teacher_sums, teacher_depths, fall, teacher_below, _ = _take(
            logits, columns, size, teacher_largest, teacher_top1, teacher_sums, teacher_depths
        )
        crosses += fall * sums
        logits = _logits(student, student_bias, columns, inside, student_scale, student_softcap)
        largest, top1, sums, depths, fall, _, e = _take(logits, columns, size, largest, top1, sums, depths)
        crosses = tl.exp(fall) * crosses + e * teacher_below
    total, teacher_total = tl.sum(sums, axis=0), tl.sum(teacher_sums, axis=0)
    log_total, teacher_log_total = tl.log(total), tl.log(teacher_total)
    depth, teacher_depth = tl.sum(depths, axis=0) / total, tl.sum(teacher_depths, axis=0) / teacher_total
    _store(row, normalisers, entropies, largest_logits, top1_ids, largest, log_total, depth, top1)
    _store(
        row, teacher_normalisers, teacher_entropies, teacher_largest_logits, teacher_top1_ids,
        teacher_largest, teacher_log_total, teacher_depth, teacher_top1,
    )  # fmt: skip
    there = _logits(student, student_bias, teacher_top1, teacher_top1 < size, student_scale, student_softcap)
    tl.store(at_teachers_top1 + row, there)
    value = (depth - log_total) - (tl.sum(crosses, axis=0) / total - teacher_log_total)
    ratio_of_ends = 0.0
    if end_ids is not None:
        places = tl.arange(0, ENDS)
        ends = tl.load(end_ids + places, mask=places < num_ends, other=0)
        log_q = _logits(student, student_bias, ends, places < num_ends, student_scale, student_softcap)
        log_p = _logits(teacher, teacher_bias, ends, places < num_ends, teacher_scale, teacher_softcap)
        log_q, log_p = log_q - largest - log_total, log_p - teacher_largest - teacher_log_total
        ratio_of_ends, added = _joined(log_q, log_p, places < num_ends)
        value += added
    tl.store(values + row, value)
    if GRADIENT:
        tl.debug_barrier()  # single columns were read by every warp, and each is overwritten by one
        share = 1.0 / total
        for start in range(0, size, BLOCK):
            columns = start + lanes
            inside = columns < size
            logits = _logits(student, student_bias, columns, inside, student_scale, student_softcap)
            teacher_logits = _logits(teacher, teacher_bias, columns, inside, teacher_scale, teacher_softcap)
            below, teacher_below = _below(logits, largest, inside), _below(teacher_logits, teacher_largest, inside)
            ratios = (below - log_total) - (teacher_below - teacher_log_total)
            if end_ids is not None:
                for place in tl.static_range(num_ends):
                    ratios = tl.where(columns == tl.load(end_ids + place), ratio_of_ends, ratios)
            gradient = tl.exp(below) * share * (ratios - value)
            gradient = _through_logits(gradient, logits, student_scale, student_softcap)
            tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=inside)
