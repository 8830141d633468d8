// Packed operands and their products for attention_impl.h. All matrices are made of 32-bit words: one fp32 value, or
// with WORD_VALUES 2 a pair of bf16 values that are neighbours in the sum.
//
//   A operand   [row][word], or the same memory read as its transpose
//   B operand   panels of kPanel columns, [panel][word][kPanel]
//   C           fp32, [row][kKeys] for scores, else like B

constexpr int kPanel = 2 * WIDTH;
constexpr int kChunk = 16;  // words of a packed A row that lie together
constexpr int64_t kKeyWords = kKeys / WORD_VALUES;
static_assert(kKeys % kPanel == 0, "panels must not reach beyond a block of keys");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// sum + a * b, for each word of two values the sum of both products.
TARGET static inline vec add_product(vec sum, vec a, vec b);

#if WORD_VALUES == 1
TARGET inline vec add_product(vec sum, vec a, vec b) { return sum + a * b; }
TARGET static inline vec broadcast_word(const float* word) { return broadcast(*word); }
#else
TARGET static inline vec broadcast_word(const float* word) {
    int32_t both;
    std::memcpy(&both, word, sizeof both);
    return (vec)(both - ints{});
}
#endif

// Rows of heads that share keys, in the order [token][head].
template <class T>
struct Rows {
    const T* data;
    int64_t head, token, group;
    const T* operator[](int64_t row) const { return data + row / group * token + row % group * head; }
};

// WIDTH words of a row from `word` on, zero from `words` on.
template <class T>
TARGET static inline vec load_words(const T* row, int64_t word, int64_t words) {
#if WORD_VALUES == 1
    return load_some(row + word, words - word);
#else
    float all[WIDTH] = {};
    std::memcpy(all, row + 2 * word, std::min<int64_t>(WIDTH, words - word) * sizeof(float));
    return load(all);
#endif
}

// A operand for `multiply` over head_dim: [chunk][row][kChunk].
template <class T>
TARGET static void pack_a(const Rows<T>& rows, int64_t num_rows, int64_t head_dim, float* out) {
    const int64_t words = head_dim / WORD_VALUES;
    for (int64_t row = 0; row < num_rows; ++row) {
        const T* from = rows[row];
        for (int64_t word = 0; word < words; word += WIDTH)
            store(out + (word / kChunk * num_rows + row) * kChunk + word % kChunk, load_words(from, word, words));
    }
}

// B operand whose columns are rows, summed over head_dim; columns from `num_rows` to the panel's end are zero.
template <class T>
TARGET static void pack_transposed(const Rows<T>& rows, int64_t num_rows, int64_t head_dim, float* out) {
    const int64_t words = head_dim / WORD_VALUES;
    for (int64_t first = 0; first < round_up(num_rows, kPanel); first += WIDTH) {
        float* panel = out + first / kPanel * words * kPanel + first % kPanel;
        const T* from[WIDTH];
        for (int i = 0; i < WIDTH; ++i) from[i] = rows[std::min(first + i, num_rows - 1)];
        for (int64_t word = 0; word < words; word += WIDTH) {
            vec block[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                block[i] = first + i < num_rows ? load_words(from[i], word, words) : vec{};
            transpose<WIDTH / 2>(block, kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                if (word + i < words) store(panel + (word + i) * kPanel, block[i]);
        }
    }
}

// B operand whose columns are head_dim, summed over rows; rows from `num_rows` to `padded_rows` and columns from
// head_dim to the panel's end are zero.
template <class T>
TARGET static void pack_b(const Rows<T>& rows, int64_t num_rows, int64_t padded_rows, int64_t head_dim, float* out) {
    const int64_t words = padded_rows / WORD_VALUES;
    for (int64_t word = 0; word < words; ++word) {
        const T* from[WORD_VALUES];
        for (int64_t i = 0; i < WORD_VALUES; ++i) {
            const int64_t row = word * WORD_VALUES + i;
            from[i] = row < num_rows ? rows[row] : nullptr;
        }
        for (int64_t column = 0; column < round_up(head_dim, kPanel); column += WIDTH) {
            vec values[WORD_VALUES];
            for (int64_t i = 0; i < WORD_VALUES; ++i)
                values[i] = from[i] && column < head_dim ? load_some(from[i] + column, head_dim - column) : vec{};
#if WORD_VALUES == 2
            values[0] = (vec)((bits)values[0] >> 16 | (bits)values[1]);
#endif
            store(out + (column / kPanel * words + word) * kPanel + column % kPanel, values[0]);
        }
    }
}

enum Update { kSet, kAdd, kRescaleAndAdd };

struct Product {
    const float* a;
    int64_t a_chunk;     // words from one chunk of A to the next
    int64_t chunk;       // words in a chunk
    const float* b;
    int64_t depth;       // words in all
    float* c;
    const float* rescale;  // [rows], what C is multiplied with first
};

// C[i][j] for ROWS rows and one panel of columns. A's word k of row i is at i * A_ROW + k * A_WORD in its chunk.
template <int ROWS, int A_ROW, int A_WORD, int64_t C_ROW, Update UPDATE>
TARGET static inline void multiply_rows(const Product& p) {
    vec sum[ROWS][2] = {};
    const float *a = p.a, *b = p.b, *rescale = p.rescale;
    const int64_t chunk = p.chunk, a_chunk = p.a_chunk;
    float* c = p.c;
    for (int64_t left = p.depth; left > 0; left -= chunk, a += a_chunk) {
        const int64_t words = std::min(left, chunk);
        for (int64_t k = 0; k < words; ++k, b += kPanel) {
            const vec b0 = load(b), b1 = load(b + WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) {
                const vec value = broadcast_word(a + i * A_ROW + k * A_WORD);
                sum[i][0] = add_product(sum[i][0], value, b0);
                sum[i][1] = add_product(sum[i][1], value, b1);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i, c += C_ROW)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            if (UPDATE == kAdd) sum[i][j] += load(c + j * WIDTH);
            if (UPDATE == kRescaleAndAdd) sum[i][j] += load(c + j * WIDTH) * broadcast(rescale[i]);
            store(c + j * WIDTH, sum[i][j]);
        }
}

// Unrolls to one instance for each number of rows, so that every accumulator is a register.
template <int A_ROW, int A_WORD, int64_t C_ROW, Update UPDATE, int ROWS = TILE_ROWS>
TARGET static void multiply(int64_t rows, const Product& p) {
    if (rows == ROWS)
        multiply_rows<ROWS, A_ROW, A_WORD, C_ROW, UPDATE>(p);
    else if constexpr (ROWS > 1)
        multiply<A_ROW, A_WORD, C_ROW, UPDATE, ROWS - 1>(rows, p);
}
