// fp32 products for any vector width. Included once by each gemm_*.cpp, inside its own namespace, after it has defined
//   TARGET      the function attribute that enables its instructions
//   WIDTH       fp32 lanes of a vector
//   TILE_ROWS   rows of a tile: 2 * TILE_ROWS accumulators, two columns and one activation must fit the registers
// and before it defines the functions that are only declared below.
// Compiler vectors instead of intrinsics: the same lines become SSE2 or NEON, AVX2 and AVX-512.

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t vec_bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t vec_bf16 __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

// From and to any address.
TARGET static inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
TARGET static inline vec load(const uint16_t* from);
TARGET static inline void store_vec(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
// As bf16_from_float.
TARGET static inline void store_vec(uint16_t* to, vec value) {
    const vec_bits bits = (vec_bits)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vec_bits is_nan = (vec_bits)(value != value);
    const vec_bf16 result = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), vec_bf16);
    std::memcpy(to, &result, sizeof result);
}
// Subtracting zero keeps every value, -0 included, so compilers reduce this to a broadcast.
TARGET static inline vec broadcast(float value) { return value - vec{}; }

constexpr int kColumns = 2 * WIDTH;
constexpr int kTileRows = TILE_ROWS;
// Row slots of a packed tile. Two more than six made products with 256 rows 2 % slower: less of A stays in L2.
constexpr int kTilePad = TILE_ROWS > 8 ? 16 : TILE_ROWS;

struct MXFP4 {};  // the type of weights that have no C++ type; bf16 is uint16_t

// out[k * step + i] = from[i * stride + k] as fp32, for `rows` <= 8 rows and a step of at least 6. It may write any
// slot before (padded_depth(depth) - 1) * step + min(step, 8).
template <class T>
TARGET static void transpose_8_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out,
                                    int64_t step);

// A panel of Y = X W^T, see Kernels.
TARGET static void decode_columns(const Weight&, int64_t row, int64_t input, int64_t depth, float* panel);

// 32 weights without their scale; the second in an order of its own, weight quick_order(i) at i.
TARGET static inline void decode_block(const uint8_t* bytes, vec out[kBlock / WIDTH]);
TARGET static inline void decode_quickly(const uint8_t* bytes, vec out[kBlock / WIDTH]);
static int quick_order(int i);

static const float* scale_values() {
    static const struct Table {
        float value[256];
        Table() {
            for (int e = 0; e < 256; ++e) value[e] = e8m0_value(e);
        }
    } table;
    return table.value;
}

template <class T>
TARGET static void transpose(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t step) {
    for (int64_t i = 0; i < rows; i += 8)
        transpose_8_rows(from + i * stride, stride, std::min<int64_t>(rows - i, 8), depth, out + i, step);
}

template <class T>
TARGET void pack_tile(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tile) {
    transpose(static_cast<const T*>(x), stride, rows, depth, static_cast<float*>(tile), kTilePad);
}

template <class T>
TARGET bool pack_forward(const Weight& w, int64_t row, int64_t input, int64_t depth, void* panel) {
    auto* out = static_cast<float*>(panel);
    if constexpr (std::is_same_v<T, MXFP4>)
        decode_columns(w, row, input, depth, out);
    else
        transpose(reinterpret_cast<const T*>(w.at(row, input)), w.inputs, std::min<int64_t>(w.rows - row, kColumns),
                  depth, out, kColumns);
    return true;
}

template <class T>
TARGET static void copy_row(const T* from, int64_t count, float* out, int64_t panel_step) {
    for (; count >= kColumns; from += kColumns, count -= kColumns, out += panel_step)
        for (int i = 0; i < kColumns; i += WIDTH) store_vec(out + i, load(from + i));
    T rest[kColumns] = {};
    std::memcpy(rest, from, count * sizeof(T));
    if (count)
        for (int i = 0; i < kColumns; i += WIDTH) store_vec(out + i, load(rest + i));
}

template <class T>
TARGET bool pack_dx(const Weight& w, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels) {
    const float* scales = scale_values();
    const int64_t panel_step = panel_stride(depth) * kColumns;
    for (int64_t n = 0; n < depth; ++n) {
        const uint8_t* from = w.at(row + n, input);
        float* out = static_cast<float*>(panels) + n * kColumns;
        if constexpr (std::is_same_v<T, MXFP4>) {
            const uint8_t* scale = w.scale(row + n, input / kBlock);
            for (int64_t b = 0; b < width / kBlock; ++b) {
                vec values[kBlock / WIDTH];
                decode_block(from + b * kBlockBytes, values);
#pragma GCC unroll 8
                for (int i = 0; i < kBlock / WIDTH; ++i)
                    store_vec(out + (b * kBlock / kColumns + i / 2) * panel_step + i % 2 * WIDTH,
                              values[i] * broadcast(scales[scale[b]]));
            }
        } else {
            copy_row(reinterpret_cast<const T*>(from), width, out, panel_step);
        }
    }
    return true;
}

// Sums of kDepth products are added to C at the end: a rounding error has fewer additions to grow in than if C were
// the start of the sum.
template <int ROWS>
TARGET void multiply_rows(const float* tile, const float* panel, int64_t depth, float* c, bool accumulate) {
    vec sum[ROWS][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const vec b0 = load(panel + k * kColumns), b1 = load(panel + k * kColumns + WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const vec a = broadcast(tile[k * kTilePad + i]);
            sum[i][0] += a * b0;
            sum[i][1] += a * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            float* total = c + i * kColumns + j * WIDTH;
            store_vec(total, accumulate ? load(total) + sum[i][j] : sum[i][j]);
        }
}

// Unrolls to one instance for each number of rows, so that every accumulator is a register.
template <int ROWS = kTileRows>
TARGET void multiply(int64_t rows, const void* tile, const void* panel, int64_t depth, float* c, bool accumulate) {
    if (rows == ROWS)
        multiply_rows<ROWS>(static_cast<const float*>(tile), static_cast<const float*>(panel), depth, c, accumulate);
    else if constexpr (ROWS > 1)
        multiply<ROWS - 1>(rows, tile, panel, depth, c, accumulate);
}

template <class T>
TARGET void store(const float* c, int64_t rows, int64_t count, const float* bias, void* y, int64_t stride) {
    float add[kColumns] = {};
    if (bias) std::memcpy(add, bias, count * sizeof(float));
    for (int64_t i = 0; i < rows; ++i, c += kColumns) {
        T rounded[kColumns];
        T *row = static_cast<T*>(y) + i * stride, *out = count == kColumns ? row : rounded;
        for (int n = 0; n < kColumns; n += WIDTH) store_vec(out + n, load(c + n) + load(add + n));
        if (out == rounded) std::memcpy(row, rounded, count * sizeof(T));
    }
}

template <class T>
TARGET void decode(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, void* out) {
    const float* values = scale_values();
    T* y = static_cast<T*>(out);
    for (int64_t b = 0; b < num_blocks; ++b) {
        vec decoded[kBlock / WIDTH];
        decode_block(blocks + b * kBlockBytes, decoded);
        for (int i = 0; i < kBlock / WIDTH; ++i)
            store_vec(y + b * kBlock + i * WIDTH, decoded[i] * broadcast(values[scales[b]]));
    }
}

// fp32 rows, each padded with zeros to whole vectors, in the order in which the weights are decoded.
template <class X, class W>
TARGET void pack_few(const void* x, int64_t stride, int64_t rows, int64_t depth, void* packed) {
    const auto* from = static_cast<const X*>(x);
    auto* out = static_cast<float*>(packed);
    for (int64_t i = 0; i < rows; ++i, from += stride)
        for (int64_t k = 0; k < depth; k += WIDTH, out += WIDTH) {
            X some[WIDTH] = {};
            for (int j = 0; j < WIDTH && k + j < depth; ++j) {
                const int in_block = static_cast<int>((k + j) % kBlock);
                some[j] = from[std::is_same_v<W, MXFP4> ? k + j - in_block + quick_order(in_block) : k + j];
            }
            store_vec(out, load(some));
        }
}

// ROWS dot products with each of WEIGHTS weight rows, read once as they lie: nothing is transposed or stored. Rows
// after the last weight row repeat it.
template <class W, int ROWS, int WEIGHTS>
TARGET static inline void dot_rows(const float* x, const Weight& w, int64_t row, float* c) {
    const float* scales = scale_values();
    const int64_t stride = ceil_div(w.inputs, WIDTH) * WIDTH;
    vec sum[WEIGHTS][ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < WEIGHTS * ROWS; ++i) sum[i / ROWS][i % ROWS] = vec{};
    const uint8_t *data[WEIGHTS], *scale[WEIGHTS];
#pragma GCC unroll 4
    for (int n = 0; n < WEIGHTS; ++n) {
        const int64_t at = std::min(row + n, w.rows - 1);
        data[n] = w.at(at, 0);
        scale[n] = w.scales ? w.scale(at, 0) : nullptr;
    }
    const int64_t ahead = WEIGHTS * w.row_bytes();
    int64_t k = 0;
    if constexpr (std::is_same_v<W, MXFP4>) {
        for (; k < w.inputs; k += kBlock)
#pragma GCC unroll 4
            for (int n = 0; n < WEIGHTS; ++n) {
                const uint8_t* bytes = data[n] + k / kBlock * kBlockBytes;
                if (k % (4 * kBlock) == 0) prefetch(bytes + ahead, 1);
                vec values[kBlock / WIDTH];
                decode_quickly(bytes, values);
                const vec factor = broadcast(scales[scale[n][k / kBlock]]);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i) {
                    vec part = values[0] * load(x + i * stride + k);
#pragma GCC unroll 8
                    for (int j = 1; j < kBlock / WIDTH; ++j) part += values[j] * load(x + i * stride + k + j * WIDTH);
                    sum[n][i] += part * factor;
                }
            }
    } else {
        for (; k + WIDTH <= w.inputs; k += WIDTH)
#pragma GCC unroll 4
            for (int n = 0; n < WEIGHTS; ++n) {
                const W* weights = reinterpret_cast<const W*>(data[n]) + k;
                if (k % (64 / sizeof(W)) == 0) prefetch(reinterpret_cast<const uint8_t*>(weights) + ahead, 1);
                const vec values = load(weights);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i) sum[n][i] += values * load(x + i * stride + k);
            }
        const int64_t rest = w.inputs - k;
        for (int n = 0; n < WEIGHTS && rest > 0; ++n)
            for (int i = 0; i < ROWS; ++i) {
                W weights[WIDTH] = {};
                std::memcpy(weights, reinterpret_cast<const W*>(data[n]) + k, rest * sizeof(W));
                sum[n][i] += load(weights) * load(x + i * stride + k);
            }
    }
    for (int n = 0; n < WEIGHTS; ++n)
        for (int i = 0; i < ROWS; ++i) {
            float total = 0;
            for (int lane = 0; lane < WIDTH; ++lane) total += sum[n][i][lane];
            c[i * kColumns + n] = total;
        }
}

template <class W, int ROWS = kFewRows>
TARGET void forward_few(const void* x, int64_t stride, int64_t rows, const Weight& w, int64_t row, float* c) {
    if (rows == ROWS) {
        constexpr int weights = ROWS <= 2 ? 4 : 2;  // with more, the sums would not stay in 16 registers
        for (int n = 0; n < kColumns; n += weights)
            dot_rows<W, ROWS, weights>(static_cast<const float*>(x), w, row + n, c + n);
    } else if constexpr (ROWS > 1) {
        forward_few<W, ROWS - 1>(x, stride, rows, w, row, c);
    }
}

template <class X, class W>
constexpr Kernels kernels_of() {
    return {kColumns,     kTileRows,       kTilePad * sizeof(float), kColumns * sizeof(float),
            pack_tile<X>, pack_forward<W>, pack_dx<W>,               multiply<>,
            store<X>,     forward_few<W>,  pack_few<X, W>,           nullptr,
            decode<X>};
}

template <class X>
const Kernels& kernels_for(DType weights) {
    static const Kernels mxfp4 = kernels_of<X, MXFP4>(), bf16 = kernels_of<X, uint16_t>(), f32 = kernels_of<X, float>();
    return weights == kMXFP4 ? mxfp4 : weights == kBFloat16 ? bf16 : f32;
}

static const Kernels& kernels_for(DType activations, DType weights) {
    return activations == kBFloat16 ? kernels_for<uint16_t>(weights) : kernels_for<float>(weights);
}
