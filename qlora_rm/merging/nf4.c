/* NF4 there and back on a CPU: each weight becomes the level that it is quantized to.
 *
 * bitsandbytes 0.50 has no CPU kernel for quantizing: its search in torch takes 25 ns a weight on one core, many times
 * as long as copying the weight's file; this takes 0.3. The order of operations is bitsandbytes' own, and is kept by
 * compiling without contraction: the last bit decides at a bound. */

#include <stdint.h>
#include <string.h>

/* The number at the end of a function's name grows when its arguments change: an older build is then not called. */

#define BLOCK 64
#define LEVELS 16

/* One build for all x86-64 processors: the loader takes the widest version that the host can run. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

/* An fp32 number and its bits. Compilers turn integer comparisons and selections into vector instructions at every level
 * of optimization; those of floats, for the sake of NaN and of traps, they do or do not. */
typedef union {
    float value;
    uint32_t bits;
} Number;

/* A block of bf16 or fp32 weights as fp32; the former's bits are the upper half of the latter's. */
static inline void load(const void *weights, int is_bf16, int64_t block, Number *loaded) {
    if (is_bf16) {
        const uint16_t *halves = (const uint16_t *)weights + block * BLOCK;
        for (int i = 0; i < BLOCK; i++) loaded[i].bits = (uint32_t)halves[i] << 16;
    } else {
        memcpy(loaded, (const Number *)weights + block * BLOCK, BLOCK * sizeof *loaded);
    }
}

/* Each block's largest magnitude: the bits of numbers without a sign are in the numbers' order. */
WIDEST void block_scales_1(const void *weights, int is_bf16, int64_t blocks, Number *restrict scales) {
    for (int64_t b = 0; b < blocks; b++) {
        Number weight[BLOCK];
        uint32_t largest = 0;
        load(weights, is_bf16, b, weight);
        for (int i = 0; i < BLOCK; i++) {
            uint32_t magnitude = weight[i].bits & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        scales[b].bits = largest;
    }
}

/* For `weights` [blocks, 64] and their `scales` [blocks], what dequantizing gives: one of the block's own `levels`
 * [blocks, 16], in rising order. A weight over its scale has as its code the number of `bounds` [15] that it is above. */
WIDEST void there_and_back_1(const void *weights, int is_bf16, int64_t blocks, const Number *restrict scales,
                           const Number *restrict levels, const Number *restrict bounds, Number *restrict values) {
    Number bound[LEVELS - 1];
    memcpy(bound, bounds, sizeof bound);
    for (int64_t b = 0; b < blocks; b++, values += BLOCK, levels += LEVELS) {
        Number weight[BLOCK], level[LEVELS];
        load(weights, is_bf16, b, weight);
        memcpy(level, levels, sizeof level);
        float inverse = 1.0f / (scales[b].value > 1e-38f ? scales[b].value : 1e-38f);
        for (int i = 0; i < BLOCK; i++) {
            float scaled = weight[i].value * inverse;
            uint32_t value = level[0].bits;
            for (int code = 1; code < LEVELS; code++) {
                uint32_t above = -(uint32_t)(scaled > bound[code - 1].value); /* all ones, or none */
                value = (level[code].bits & above) | (value & ~above);
            }
            values[i].bits = value;
        }
    }
}
