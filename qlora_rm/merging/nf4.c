/* Quantize weights to NF4 and dequantize them, on a CPU.
 *
 * bitsandbytes 0.50 has no CPU kernel for quantizing. Its search in torch takes 25 ns per weight on one core, many times
 * as long as copying the weight's file. This code takes 0.3 ns. The order of operations is bitsandbytes' own. Compile
 * without contraction to keep it, because the last bit decides at a bound. */

#include <stdint.h>
#include <string.h>

/* Increase the number at the end of a function's name when its arguments change, so that an older build is not called. */

#define BLOCK 64
#define LEVELS 16

/* One build for all x86-64 processors: the loader picks the widest version that the host can run. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

/* An fp32 number and its bits. Compilers vectorize integer comparisons and selections at every optimization level, but
 * those of floats only sometimes, because of NaN and traps. */
typedef union {
    float value;
    uint32_t bits;
} Number;

/* Load a block of bf16 or fp32 weights as fp32. The bits of a bf16 are the upper half of an fp32's. */
static inline void load(const void *weights, int is_bf16, int64_t block, Number *loaded) {
    if (is_bf16) {
        const uint16_t *halves = (const uint16_t *)weights + block * BLOCK;
        for (int i = 0; i < BLOCK; i++) loaded[i].bits = (uint32_t)halves[i] << 16;
    } else {
        memcpy(loaded, (const Number *)weights + block * BLOCK, BLOCK * sizeof *loaded);
    }
}

/* Find each block's largest magnitude. Without the sign, bits compare in the same order as numbers. */
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

/* Write the dequantized values of `weights` [blocks, 64] with `scales` [blocks]. Each is one of the block's `levels`
 * [blocks, 16], in rising order. The code of a weight is the number of `bounds` [15] below the weight over its scale. */
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
