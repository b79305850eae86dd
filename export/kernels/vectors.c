/* Vectors of float32 and what the kernels compute with them.
 *
 * GCC/Clang vector extensions, so that it compiles on any architecture. No -ffast-math: NaN and infinities stay what they are.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float v4 __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t vi4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (vi4){i, j, k, l})
#endif

INLINE vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE v4 load4(const float *p) { v4 x; memcpy(&x, p, sizeof x); return x; }
INLINE void store4(float *p, v4 x) { memcpy(p, &x, sizeof x); }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Asks for the cache lines of memory that will be read. An address where nothing lies asks for nothing, without harm. */
INLINE void fetch(const char *at, int64_t bytes) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

/* e^x, relative error below 3e-7 for -87 <= x <= 88, 0 below, NaN for NaN. 2^n times a degree-5 minimax polynomial on
 * |r| <= ln(2)/2, where x = n ln(2) + r; adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the bits. */
INLINE vf exp_v(vf x) {
    const vf magic = splat(12582912.0f);
    vf t = x * 1.44269504f + magic, n = t - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = r * 0.00829761940985918f + 0.04191562905907631f;
    y = y * r + 0.16667576134204865f;
    y = y * r + 0.4999889135360718f;
    y = y * r + 0.9999997019767761f;
    y = y * r + 1.0000001192092896f;
    vf power = (vf)(((vi)t - (0x4B400000 - 127)) << 23);
    return (vf)((vi)(y * power) & ~(vi)(x < -87.0f));
}

/* tanh x: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, else that. */
INLINE vf tanh_v(vf x) {
    const vi sign = (vi)splat(-0.0f);
    vf a = (vf)((vi)x & ~sign), z = x * x;
    vf small = z * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * z + -5.37397155531e-2f;
    small = small * z + 1.33314422036e-1f;
    small = small * z + -3.33332819422e-1f;
    small = small * z * x + x;
    vf large = 1.0f - 2.0f / (exp_v(pick(a > 20.0f, splat(20.0f), a) * 2.0f) + 1.0f);
    return pick(a < 0.625f, small, (vf)((vi)large | ((vi)x & sign)));
}

INLINE v4 fold(vf x) { /* sums the vector's quarters of four lanes */
    v4 parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
#if LANES == 16
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
#else
    return parts[0] + parts[1];
#endif
}

INLINE v4 sums_of(vf a, vf b, vf c, vf d) { /* {sum of a, sum of b, sum of c, sum of d} */
    v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    v4 x = SHUFFLE(p, q, 0, 4, 2, 6) + SHUFFLE(p, q, 1, 5, 3, 7);
    v4 y = SHUFFLE(r, s, 0, 4, 2, 6) + SHUFFLE(r, s, 1, 5, 3, 7);
    return SHUFFLE(x, y, 0, 1, 4, 5) + SHUFFLE(x, y, 2, 3, 6, 7);
}
