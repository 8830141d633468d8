// One block of keys of the backward pass, for attention_impl.h.
//
//   P = exp(scores - lse)    dP = dO V^T    dS = scaling P (dP - delta)    delta = sum of dO O over head_dim
//   dV = P^T dO              dK = dS^T Q    dQ = dS K

struct BackwardScratch : Scratch {
    float *k, *v, *k_rows, *dk, *dv, *q, *d_out, *q_rows, *d_out_rows, *scores, *d_scores, *words, *dq;
    Sight* seen;  // of every tile

    BackwardScratch(const Attention& p, void* memory) : Scratch(memory) {
        const int64_t rows = round_up(p.block_tokens(kBackwardRows) * p.group(), WORD_VALUES);
        const int64_t depth = round_up(p.head_dim / WORD_VALUES, kChunk), columns = round_up(p.head_dim, kPanel);
        k = take(kKeys * depth);
        v = take(kKeys * depth);
        k_rows = take(kKeyWords * columns);
        dk = take(kKeys * columns);
        dv = take(kKeys * columns);
        q = take(rows * depth);
        d_out = take(rows * depth);
        q_rows = take(rows / WORD_VALUES * columns);
        d_out_rows = take(rows / WORD_VALUES * columns);
        scores = take(rows * kKeys);
        d_scores = take(rows * kKeys);
        words = take(rows * kKeyWords);
        dq = take(rows * columns);
        seen = reinterpret_cast<Sight*>(take(ceil_div(rows, TILE_ROWS) * sizeof(Sight) / sizeof(float)));
    }
};

static size_t backward_bytes(const Attention& p) { return BackwardScratch(p, nullptr).bytes(); }

template <class T>
TARGET static void prepare(const Attention& p, int64_t item) {
    const int64_t batch = item / p.query_heads, head = item % p.query_heads;
    const T* out = static_cast<const T*>(p.out.data) + batch * p.out.batch + head * p.out.head;
    const T* d_out = static_cast<const T*>(p.d_out.data) + batch * p.d_out.batch + head * p.d_out.head;
    float* delta = p.delta + item * p.queries;
    for (int64_t t = 0; t < p.queries; ++t, out += p.out.token, d_out += p.d_out.token) {
        vec products = vec{};
        for (int64_t column = 0; column < p.head_dim; column += WIDTH) {
            const int64_t left = p.head_dim - column;
            products += load_some(out + column, left) * load_some(d_out + column, left);
        }
        delta[t] = sum(products);
    }
    const float *lse = p.lse + item * p.queries, sink = p.sinks[head];
    double d_sink = 0;
    for (int64_t t = 0; t < p.queries; t += WIDTH) {
        const int64_t left = p.queries - t;
        d_sink -= sum(exp2((sink - load_some(lse + t, left)) * kLog2E) * load_some(delta + t, left));
    }
    p.dsinks[item] = static_cast<float>(d_sink);
}

// P and dS of one row, in place of its scores and dP.
TARGET static inline void softmax_backward(float* scores, float* d_scores, const Sight seen, float scale, float lse,
                                           float delta, float scaling) {
    for (int64_t from = seen.begin; from < seen.end; from += WIDTH) {
        const vec weight = exp2(load(scores + from) * scale - lse);
        store(scores + from, weight);
        store(d_scores + from, weight * scaling * (load(d_scores + from) - delta));
    }
}

// Scores as transposed A operand, summed over rows: [word][column].
TARGET static inline const float* as_columns(const float* scores, int64_t num_rows, int64_t columns, float* words) {
#if WORD_VALUES == 1
    (void)num_rows, (void)columns, (void)words;
    return scores;
#else
    for (int64_t row = 0; row < num_rows; row += 2)
        for (int64_t from = 0; from < columns; from += WIDTH) {
            const bits even = rounded_to_bf16(load(scores + row * kKeys + from));
            const bits odd = row + 1 < num_rows ? rounded_to_bf16(load(scores + (row + 1) * kKeys + from)) : bits{};
            store(words + row / 2 * kKeys + from, (vec)(even | odd << 16));
        }
    return words;
#endif
}

template <class T>
TARGET static void store_key_rows(const float* panels, const View& view, int64_t batch, int64_t kv_head,
                                  const KeyBlock& keys, int64_t head_dim) {
    T* out = static_cast<T*>(view.data) + batch * view.batch + kv_head * view.head + keys.first * view.token;
    for (int64_t key = 0; key < keys.count; ++key, out += view.token)
        for (int64_t column = 0; column < head_dim; column += WIDTH)
            store_some(out + column, load(panels + (column / kPanel * kKeys + key) * kPanel + column % kPanel),
                       head_dim - column);
}

template <class T>
class BackwardBlock {
public:
    TARGET BackwardBlock(const Attention& attention, int64_t item, void* memory)
        : p(attention),
          s(attention, memory),
          batch(item % p.kv_items() / p.kv_heads),
          kv_head(item % p.kv_heads),
          keys(p, batch, item / p.kv_items() * kKeys) {}

    TARGET void run(Turn* turns) {
        pack_transposed(key_rows<T>(p.k, batch, kv_head, keys.first), keys.count, p.head_dim, s.k);
        pack_transposed(key_rows<T>(p.v, batch, kv_head, keys.first), keys.count, p.head_dim, s.v);
        pack_b(key_rows<T>(p.k, batch, kv_head, keys.first), keys.count, kKeys, p.head_dim, s.k_rows);
        std::memset(s.dk, 0, kKeys * columns * sizeof(float));
        std::memset(s.dv, 0, kKeys * columns * sizeof(float));

        const int64_t block_tokens = p.block_tokens(kBackwardRows), num_blocks = p.blocks(kBackwardRows);
        const int64_t first = std::max<int64_t>(0, keys.first - p.position(0));
        const int64_t end = std::min(p.queries, keys.first + keys.count - 1 + p.window - p.position(0));
        for (int64_t block = first / block_tokens; block * block_tokens < end; ++block) {
            const int64_t start = block * block_tokens;
            token = std::max(first, start);
            num_tokens = std::min(end, start + block_tokens) - token;
            num_rows = num_tokens * p.group();
            const bool seen = sight(p, keys, batch, token, num_tokens).end > 0;
            if (seen) add_rows();
            // The first block of keys that any of these rows may see.
            const int64_t earliest = std::max<int64_t>(0, p.position(start) - p.window + 1) / kKeys;
            Turn& turn = turns[(batch * p.kv_heads + kv_head) * num_blocks + block];
            const auto own = static_cast<int32_t>(keys.first / kKeys - earliest);
            while (turn.load(std::memory_order_acquire) != own) std::this_thread::yield();
            if (seen) add_dq();
            turn.store(own + 1, std::memory_order_release);
        }
        store_key_rows<T>(s.dk, p.dk, batch, kv_head, keys, p.head_dim);
        store_key_rows<T>(s.dv, p.dv, batch, kv_head, keys, p.head_dim);
    }

private:
    // Adds the block's rows to dk and dv and leaves their dq in scratch.
    TARGET void add_rows() {
        const int64_t padded_rows = round_up(num_rows, WORD_VALUES);
        const auto q = query_rows<T>(p.q, p, batch, kv_head, token);
        const auto d_out = query_rows<T>(p.d_out, p, batch, kv_head, token);
        pack_a(q, num_rows, p.head_dim, s.q);
        pack_a(d_out, num_rows, p.head_dim, s.d_out);
        pack_b(q, num_rows, padded_rows, p.head_dim, s.q_rows);
        pack_b(d_out, num_rows, padded_rows, p.head_dim, s.d_out_rows);
        const Tiles tiles(num_rows);
        for (int64_t tile = 0; tile < tiles.count; ++tile) s.seen[tile] = tile_sight(p, keys, batch, token, tiles, tile);
        multiply_by_keys(tiles, s.q, s.k, s.scores);
        multiply_by_keys(tiles, s.d_out, s.v, s.d_scores);
        for (int64_t tile = 0; tile < tiles.count; ++tile)
            for (int64_t row = tiles.start(tile); row < tiles.start(tile + 1); ++row) differentiate(row, s.seen[tile]);
        multiply_transposed(as_columns(s.scores, num_rows, keys.columns(), s.words), s.d_out_rows, padded_rows, s.dv);
        multiply_transposed(as_columns(s.d_scores, num_rows, keys.columns(), s.words), s.q_rows, padded_rows, s.dk);
        multiply_by_scores(tiles, as_rows(s.d_scores, num_rows, 0, keys.columns(), s.words));
    }

    // out = rows keys^T where a tile sees any of a panel of keys. A panel stays in the L1 cache for all tiles.
    TARGET void multiply_by_keys(const Tiles& tiles, const float* rows, const float* transposed, float* out) {
        for (int64_t column = 0; column < keys.columns(); column += kPanel)
            for (int64_t tile = 0; tile < tiles.count; ++tile) {
                if (!s.seen[tile].has(column)) continue;
                const int64_t row = tiles.start(tile);
                multiply<kChunk, 1, kKeys, kSet>(
                    tiles.height(tile), {rows + row * kChunk, num_rows * kChunk, kChunk, transposed + column * depth,
                                         depth, out + row * kKeys + column, nullptr});
            }
    }

    // P and dS of one row, zero where it sees nothing.
    TARGET void differentiate(int64_t row, const Sight& seen) {
        const int64_t t = token + row / p.group(), head = kv_head * p.group() + row % p.group();
        const int64_t at = (batch * p.query_heads + head) * p.queries + t;
        float *scores = s.scores + row * kKeys, *d_scores = s.d_scores + row * kKeys;
        if (seen.partial) mask(p, keys, t, seen, scores);
        softmax_backward(scores, d_scores, seen, p.scaling * kLog2E, p.lse[at] * kLog2E, p.delta[at], p.scaling);
        for (float* all : {scores, d_scores}) {
            std::fill(all, all + seen.begin, 0.f);
            std::fill(all + seen.end, all + keys.columns(), 0.f);
        }
        // What comes next from memory: short pieces far apart, which processors do not foresee.
        prefetch_row(p.dq + at * p.head_dim);
        if (t + num_tokens < p.queries) {
            prefetch_row(query_rows<T>(p.q, p, batch, kv_head, token)[row + num_rows]);
            prefetch_row(query_rows<T>(p.d_out, p, batch, kv_head, token)[row + num_rows]);
        }
    }

    template <class Value>
    void prefetch_row(const Value* row) {
        prefetch(reinterpret_cast<const uint8_t*>(row), p.head_dim * sizeof(Value));
    }

    // dQ = dS K.
    TARGET void multiply_by_scores(const Tiles& tiles, const float* d_scores) {
        for (int64_t column = 0; column < columns; column += kPanel)
            for (int64_t tile = 0; tile < tiles.count; ++tile) {
                const Sight& seen = s.seen[tile];
                const int64_t row = tiles.start(tile), skipped = seen.begin / WORD_VALUES;
                const int64_t words = (seen.end - seen.begin) / WORD_VALUES;
                multiply<kKeyWords, 1, kPanel, kSet>(
                    tiles.height(tile), {d_scores + row * kKeyWords + skipped, 0, words,
                                         s.k_rows + column * kKeyWords + skipped * kPanel, words,
                                         s.dq + column * num_rows + row * kPanel, nullptr});
            }
    }

    // gradient += weights^T rows, for each tile of keys over the rows that may see it.
    TARGET void multiply_transposed(const float* weights, const float* rows, int64_t padded_rows, float* gradient) {
        const int64_t own = keys.first - p.position(token), words = padded_rows / WORD_VALUES;
        const Tiles tiles(keys.count);
        for (int64_t column = 0; column < columns; column += kPanel)
            for (int64_t tile = 0; tile < tiles.count; ++tile) {
                const int64_t key = tiles.start(tile), height = tiles.height(tile);
                const int64_t from = std::max<int64_t>(0, own + key) * p.group() / WORD_VALUES;
                const int64_t end_row = (own + key + height - 1 + p.window) * p.group();
                const int64_t to = std::min(words, ceil_div(end_row, WORD_VALUES));
                if (from < to)
                    multiply<1, kKeys, kPanel, kAdd>(
                        height, {weights + from * kKeys + key, 0, to - from, rows + column * words + from * kPanel,
                                 to - from, gradient + column * kKeys + key * kPanel, nullptr});
            }
    }

    TARGET void add_dq() {
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t t = token + row / p.group(), head = kv_head * p.group() + row % p.group();
            float* dq = p.dq + ((batch * p.query_heads + head) * p.queries + t) * p.head_dim;
            for (int64_t column = 0; column < p.head_dim; column += WIDTH) {
                const int64_t left = p.head_dim - column;
                const float* from = s.dq + (column / kPanel * num_rows + row) * kPanel + column % kPanel;
                store_some(dq + column, load_some(dq + column, left) + load(from), left);
            }
        }
    }

    const Attention& p;
    const BackwardScratch s;
    const int64_t batch, kv_head;
    const KeyBlock keys;
    const int64_t depth = p.head_dim / WORD_VALUES, columns = round_up(p.head_dim, kPanel);
    int64_t token = 0, num_tokens = 0, num_rows = 0;  // the current block of rows
};

template <class T>
TARGET static void backward(const Attention& p, int64_t item, Turn* turns, void* scratch) {
    BackwardBlock<T>(p, item, scratch).run(turns);
}
