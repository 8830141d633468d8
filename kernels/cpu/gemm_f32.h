// fp32 products for any vector width. Included once by each gemm_*.cpp, inside its own namespace, after it has defined
//   TARGET      the function attribute that enables its instructions
//   WIDTH       fp32 lanes of a vector
//   TILE_ROWS   rows of a tile: 2 * TILE_ROWS accumulators, two columns and one activation must fit the registers
// and which defines afterwards
//   decode_codes   WIDTH e2m1 codes, one in each byte, as floats
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
TARGET static inline vec decode_codes(const uint8_t* codes);

constexpr int kColumns = 2 * WIDTH;
constexpr int kTileRows = TILE_ROWS;
constexpr int kTilePad = TILE_ROWS > 8 ? 16 : 8;  // row slots of a packed tile

static const float* scale_values() {
    static const struct Table {
        float value[256];
        Table() {
            for (int e = 0; e < 256; ++e) value[e] = e8m0_value(e);
        }
    } table;
    return table.value;
}

TARGET static inline float load_activation(const float* x) { return *x; }
TARGET static inline float load_activation(const uint16_t* x) { return float_from_bf16(*x); }

template <class T>
TARGET void pack_tile(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tile) {
    auto* out = static_cast<float*>(tile);
    for (int64_t i = 0; i < rows; ++i) {
        const T* row = static_cast<const T*>(x) + i * stride;
        for (int64_t k = 0; k < depth; ++k) out[k * kTilePad + i] = load_activation(row + k);
    }
}

TARGET bool pack_forward(const Weight& w, int64_t row, int64_t input, int64_t depth, void* panel) {
    const float* scales = scale_values();
    auto* out = static_cast<vec*>(panel);
    for (int64_t b = input / kBlock; b < (input + depth) / kBlock; ++b) {
        alignas(64) float scale[kColumns];
        alignas(64) uint8_t low[kBlockBytes][kColumns], high[kBlockBytes][kColumns];
        for (int n = 0; n < kColumns; ++n) {
            scale[n] = scales[*w.scale(row + n, b)];
            const uint8_t* bytes = w.block(row + n, b);
            for (int j = 0; j < kBlockBytes; ++j) {
                low[j][n] = bytes[j] & 15;
                high[j][n] = bytes[j] >> 4;
            }
        }
        const vec scale0 = load(scale), scale1 = load(scale + WIDTH);
        for (int j = 0; j < kBlockBytes; ++j, out += 4) {
            out[0] = decode_codes(low[j]) * scale0;
            out[1] = decode_codes(low[j] + WIDTH) * scale1;
            out[2] = decode_codes(high[j]) * scale0;
            out[3] = decode_codes(high[j] + WIDTH) * scale1;
        }
    }
    return true;
}

// Spreads 8 codes at a time over the bytes of an integer. Byte by byte, the vector loads of decode_codes had to wait
// for single-byte stores.
TARGET static inline void split_codes(const uint8_t* bytes, uint8_t* codes) {
    for (int j = 0; j < kBlockBytes; j += 4) {
        uint64_t spread = bytes[j] | bytes[j + 1] << 8 | bytes[j + 2] << 16 | static_cast<uint64_t>(bytes[j + 3]) << 24;
        spread = (spread | spread << 16) & 0x0000ffff0000ffff;
        spread = (spread | spread << 8) & 0x00ff00ff00ff00ff;
        spread = (spread | spread << 4) & 0x0f0f0f0f0f0f0f0f;
        for (int i = 0; i < 8; ++i) codes[2 * j + i] = static_cast<uint8_t>(spread >> 8 * i);
    }
}

TARGET bool pack_dx(const Weight& w, int64_t row, int64_t depth, int64_t input, int64_t width, void* panels) {
    const float* scales = scale_values();
    for (int64_t b = 0; b < width / kBlock; ++b) {
        float* out = static_cast<float*>(panels) + b * kBlock * depth;
        for (int64_t n = 0; n < depth; ++n) {
            alignas(64) uint8_t codes[kBlock];
            const uint8_t* bytes = w.block(row + n, input / kBlock + b);
            // A short piece of each of many rows: those of the next call.
            if (b == 0) prefetch(bytes + depth * w.row_blocks * kBlockBytes, width / 2 + 1);
            split_codes(bytes, codes);
            const vec scale = broadcast(scales[*w.scale(row + n, input / kBlock + b)]);
            for (int k = 0; k < kBlock; k += WIDTH) {
                const int64_t panel = k / kColumns, lane = k % kColumns;
                store_vec(out + (panel * depth + n) * kColumns + lane, decode_codes(codes + k) * scale);
            }
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

TARGET static inline void store_activation(float value, float* y) { *y = value; }
TARGET static inline void store_activation(float value, uint16_t* y) { *y = bf16_from_float(value); }

template <class T>
TARGET void store(const float* c, int64_t rows, const float* bias, void* y, int64_t stride) {
    const float zeros[kColumns] = {};
    const float* add = bias ? bias : zeros;
    for (int64_t i = 0; i < rows; ++i) {
        T* out = static_cast<T*>(y) + i * stride;
        for (int n = 0; n < kColumns; ++n) store_activation(c[i * kColumns + n] + add[n], out + n);
    }
}

template <class T>
TARGET void decode(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, void* out) {
    const float* values = scale_values();
    T* y = static_cast<T*>(out);
    for (int64_t b = 0; b < num_blocks; ++b) {
        alignas(64) uint8_t codes[kBlock];
        alignas(64) float decoded[kBlock];
        split_codes(blocks + b * kBlockBytes, codes);
        const vec scale = broadcast(values[scales[b]]);
        for (int k = 0; k < kBlock; k += WIDTH) store_vec(decoded + k, decode_codes(codes + k) * scale);
        for (int k = 0; k < kBlock; ++k) store_activation(decoded[k], y + b * kBlock + k);
    }
}

template <class T>
constexpr Kernels f32_kernels() {
    return {kColumns,     kTileRows,    kTilePad * sizeof(float), kColumns * sizeof(float),
            pack_tile<T>, pack_forward, pack_dx,                  multiply<>,
            store<T>,     nullptr,      nullptr,                  decode<T>};
}
