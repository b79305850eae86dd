/* Values of a KV cache: float32, or one byte each, converted when they are written and when they are read.
 *
 *     float32        as computed
 *     int8           the nearest integer, -127 to 127 (scale_kv_cache.py scales keys and values to that range)
 *     float8_e4m3fn  | sign | 4 bits of exponent, bias 7 | 3 of mantissa |, at most 448, no infinities, NaN where the other 7 bits
 *                    are all 1 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3)
 *
 * Ties go to the even number, and what is too large becomes the largest: graph/quant_ops.py's `saturate` to the bit.
 */
#include "vectors.c"

enum { FLOAT32, INT8, FLOAT8_E4M3FN }; /* cpu.py's CACHE_DTYPES is the same list */

INLINE int64_t value_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 1; }

/* float8_e4m3fn, sign-extended. Exponent 0 has no hidden bit: it is that of 1, less the hidden bit. */
INLINE vf float_of_e4m3(vi bits) {
    const vi size = bits & 0x7F;
    const vf normal = (vf)((size << 20) + (120 << 23)), small = (vf)((size << 20) + (121 << 23)) - 0.015625f;
    const vf value = pick(size < 8, small, pick(size == 0x7F, splat(__builtin_nanf("")), normal));
    return (vf)((vi)value | (bits & INT32_MIN));
}

/* LANES bytes. The loop becomes one instruction, which a conversion of a vector of 8 bytes does not in every compiler. */
INLINE vf float_of_bytes(const int dtype, const int8_t *from) {
    int32_t wide[LANES];
    for (int l = 0; l < LANES; l++) wide[l] = from[l];
    vi bits;
    memcpy(&bits, wide, sizeof bits);
    return dtype == INT8 ? __builtin_convertvector(bits, vf) : float_of_e4m3(bits);
}

INLINE void read_bytes(const int dtype, const int8_t *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, float_of_bytes(dtype, from + i));
    if (i == n) return;
    int8_t last[LANES] = {0};
    memcpy(last, from + i, (size_t)(n - i));
    const vf x = float_of_bytes(dtype, last);
    memcpy(to + i, &x, sizeof(float) * (size_t)(n - i));
}

/* n values as float32: where they lie, or in `room`. */
INLINE const float *read_values(int64_t dtype, const char *from, float *room, int64_t n) {
    if (dtype == FLOAT32) return (const float *)from;
    if (dtype == INT8) read_bytes(INT8, (const int8_t *)from, room, n);
    else read_bytes(FLOAT8_E4M3FN, (const int8_t *)from, room, n);
    return room;
}

static int8_t int8_of(float x) {
    const float nearest = rintf(x);
    return (int8_t)(nearest > 127.0f ? 127.0f : nearest < -127.0f ? -127.0f : nearest == nearest ? nearest : 0.0f);
}

/* Below 2^-6 a step is 2^-9; above, half of the 20 bits that go is added before they go. */
static uint8_t e4m3_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    bits &= 0x7FFFFFFF;
    if (x != x) return sign | 0x7F;
    if (fabsf(x) >= 448.0f) return sign | 0x7E;
    if (fabsf(x) < 0.015625f) return sign | (uint8_t)rintf(fabsf(x) * 512.0f);
    return sign | (uint8_t)(((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

static void write_values(int64_t dtype, const float *from, char *to, int64_t n) {
    if (dtype == FLOAT32) memcpy(to, from, sizeof(float) * (size_t)n);
    else if (dtype == INT8)
        for (int64_t i = 0; i < n; i++) ((int8_t *)to)[i] = int8_of(from[i]);
    else
        for (int64_t i = 0; i < n; i++) ((uint8_t *)to)[i] = e4m3_of(from[i]);
}
