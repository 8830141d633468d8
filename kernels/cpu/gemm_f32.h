// fp32 products for any vector width. Included once by each gemm_*.cpp, inside its own namespace, after it has defined
//   TARGET      the function attribute that enables its instructions
//   WIDTH       fp32 lanes of a vector
//   TILE_ROWS   rows of a tile: 2 * TILE_ROWS accumulators, two columns and one activation must fit the registers
// and before it defines the functions declared below.
// Compiler vectors instead of intrinsics: the same lines become SSE2 or NEON, AVX2 and AVX-512.

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));

TARGET static inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
TARGET static inline void store_vec(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
// Subtracting zero keeps every value, -0 included, so compilers reduce this to a broadcast.
TARGET static inline vec broadcast(float value) { return value - vec{}; }

constexpr int kColumns = 2 * WIDTH;
constexpr int kTileRows = TILE_ROWS;
constexpr int kTilePad = TILE_ROWS > 8 ? 16 : 8;  // row slots of a packed tile

struct MXFP4 {};  // the type of weights that have no C++ type; bf16 is uint16_t

// out[k * step + i] = from[i * stride + k] as fp32, for `rows` <= 8 rows. What the other slots up to 8 hold, and those of
// further k up to padded_depth(depth), does not matter.
template <class T>
TARGET static void transpose_8_rows(const T* from, int64_t stride, int64_t rows, int64_t depth, float* out,
                                    int64_t step);

// A panel of Y = X W^T, see Kernels.
TARGET static void decode_columns(const Weight&, int64_t row, int64_t input, int64_t depth, float* panel);

// 32 weights; of every kColumns, out has the first at a multiple of `panel_step`.
TARGET static void decode_block(const uint8_t* bytes, float scale, float* out, int64_t panel_step);

static const float* scale_values() {
    static const struct Table {
        float value[256];
        Table() {
            for (int e = 0; e < 256; ++e) value[e] = e8m0_value(e);
        }
    } table;
    return table.value;
}

// From any address.
template <class T>
TARGET static inline float load_element(const T* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    if constexpr (sizeof value == 2)
        return float_from_bf16(value);
    else
        return value;
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
        for (int i = 0; i < kColumns; ++i) out[i] = load_element(from + i);
    for (int64_t i = 0; i < count; ++i) out[i] = load_element(from + i);
}

template <class T>
TARGET bool pack_dx(const Weight& w, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels) {
    const float* scales = scale_values();
    const int64_t panel_step = padded_depth(depth) * kColumns, row_bytes = w.row_bytes();
    for (int64_t n = 0; n < depth; ++n) {
        const uint8_t* from = w.at(row + n, input);
        float* out = static_cast<float*>(panels) + n * kColumns;
        // A short piece of each of many rows: those of the next call, to arrive while these are multiplied.
        prefetch(from + depth * row_bytes, bytes_of(w.type, width) + 1);
        if constexpr (std::is_same_v<T, MXFP4>) {
            const uint8_t* scale = w.scale(row + n, input / kBlock);
            for (int64_t b = 0; b < width / kBlock; ++b)
                decode_block(from + b * kBlockBytes, scales[scale[b]], out + b * kBlock / kColumns * panel_step,
                             panel_step);
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

TARGET static inline void store_element(float value, float* y) { *y = value; }
TARGET static inline void store_element(float value, uint16_t* y) { *y = bf16_from_float(value); }

template <class T>
TARGET void store(const float* c, int64_t rows, int64_t count, const float* bias, void* y, int64_t stride) {
    const float zeros[kColumns] = {};
    const float* add = bias ? bias : zeros;
    for (int64_t i = 0; i < rows; ++i, c += kColumns) {
        T* out = static_cast<T*>(y) + i * stride;
        // A constant count is what compilers vectorize.
        if (count == kColumns)
            for (int n = 0; n < kColumns; ++n) store_element(c[n] + add[n], out + n);
        else
            for (int n = 0; n < count; ++n) store_element(c[n] + add[n], out + n);
    }
}

template <class T>
TARGET void decode(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, void* out) {
    const float* values = scale_values();
    T* y = static_cast<T*>(out);
    for (int64_t b = 0; b < num_blocks; ++b) {
        alignas(64) float decoded[kBlock];
        decode_block(blocks + b * kBlockBytes, values[scales[b]], decoded, kColumns);
        for (int k = 0; k < kBlock; ++k) store_element(decoded[k], y + b * kBlock + k);
    }
}

template <class X, class W>
constexpr Kernels kernels_of() {
    return {kColumns,     kTileRows,       kTilePad * sizeof(float), kColumns * sizeof(float),
            pack_tile<X>, pack_forward<W>, pack_dx<W>,               multiply<>,
            store<X>,     nullptr,         nullptr,                  decode<X>};
}

template <class X>
const Kernels& kernels_for(DType weights) {
    static const Kernels mxfp4 = kernels_of<X, MXFP4>(), bf16 = kernels_of<X, uint16_t>(), f32 = kernels_of<X, float>();
    return weights == kMXFP4 ? mxfp4 : weights == kBFloat16 ? bf16 : f32;
}

static const Kernels& kernels_for(DType activations, DType weights) {
    return activations == kBFloat16 ? kernels_for<uint16_t>(weights) : kernels_for<float>(weights);
}
