// One block of rows of the forward pass, for attention_impl.h.
// Rows carry the largest logit so far, the sum of weights relative to it, and the weighted sum of values.

// Tiles whose scores are computed together: a panel of keys stays in the L1 cache for all of them.
constexpr int64_t kScoreTiles = 8;

struct ForwardScratch : Scratch {
    float *q, *k, *v, *scores, *words, *top, *total, *rescale, *out;

    ForwardScratch(const Attention& p, void* memory) : Scratch(memory) {
        const int64_t rows = p.block_tokens(kForwardRows) * p.group();
        const int64_t depth = round_up(p.head_dim / WORD_VALUES, kChunk), columns = round_up(p.head_dim, kPanel);
        q = take(rows * depth);
        k = take(kKeys * depth);
        v = take(kKeyWords * columns);
        scores = take(kScoreTiles * TILE_ROWS * kKeys);
        words = take(kScoreTiles * TILE_ROWS * kKeyWords);
        top = take(rows);
        total = take(rows * WIDTH);
        rescale = take(kScoreTiles * TILE_ROWS);
        out = take(rows * columns);
    }
};

static size_t forward_bytes(const Attention& p) { return ForwardScratch(p, nullptr).bytes(); }

// Turn the scores of a row into weights relative to its new largest logit. `scale` makes logits of scores.
TARGET static inline float update_softmax(float* scores, const Sight seen, float scale, float& top, float* total) {
    vec largest_seen = load(scores + seen.begin);
    for (int64_t from = seen.begin + WIDTH; from < seen.end; from += WIDTH)
        largest_seen = maximum(load(scores + from), largest_seen);
    const float before = top, now = std::max(before, largest(largest_seen) * scale);
    vec added = vec{};
    for (int64_t from = seen.begin; from < seen.end; from += WIDTH) {
        const vec weight = exp2(load(scores + from) * scale - now);
        store(scores + from, weight);
        added += weight;
    }
    top = now;
    const float rescale = exp2(broadcast(before - now))[0];
    store(total, load(total) * rescale + added);
    return rescale;
}

template <class T>
class ForwardBlock {
public:
    TARGET ForwardBlock(const Attention& attention, int64_t item, void* memory)
        : p(attention),
          s(attention, memory),
          batch(item % p.kv_items() / p.kv_heads),
          kv_head(item % p.kv_heads),
          token(item / p.kv_items() * p.block_tokens(kForwardRows)),
          num_tokens(std::min(p.block_tokens(kForwardRows), p.queries - token)) {}

    TARGET void run() {
        pack_a(query_rows<T>(p.q, p, batch, kv_head, token), num_rows, p.head_dim, s.q);
        std::memset(s.out, 0, num_rows * columns * sizeof(float));
        std::memset(s.total, 0, num_rows * WIDTH * sizeof(float));
        for (int64_t row = 0; row < num_rows; ++row) {
            // The sink is the first logit: it adds to the total and not to the output. Minus infinity means no sink.
            const float sink = p.sinks[kv_head * group + row % group] * kLog2E;
            s.top[row] = std::max(sink, -1e30f);
            s.total[row * WIDTH] = sink < -1e30f ? 0.f : 1.f;
        }
        const int64_t last_key = p.position(token + num_tokens - 1);
        for (int64_t key = std::max<int64_t>(0, p.position(token) - p.window + 1); key <= last_key; key += kKeys) {
            const KeyBlock keys(p, batch, key);
            if (sight(p, keys, batch, token, num_tokens).end == 0) continue;
            pack_transposed(key_rows<T>(p.k, batch, kv_head, key), keys.count, p.head_dim, s.k);
            pack_b(key_rows<T>(p.v, batch, kv_head, key), keys.count, kKeys, p.head_dim, s.v);
            // Few queries wait for memory: the next keys arrive while these are multiplied.
            for (int64_t next = key + kKeys; next <= std::min(last_key, key + 2 * kKeys - 1); ++next)
                for (const View* view : {&p.k, &p.v})
                    prefetch(reinterpret_cast<const uint8_t*>(key_rows<T>(*view, batch, kv_head, next)[0]),
                             p.head_dim * sizeof(T));
            for (int64_t tile = 0; tile < tiles.count; tile += kScoreTiles)
                add_keys(keys, tile, std::min(tile + kScoreTiles, tiles.count));
        }
        for (int64_t row = 0; row < num_rows; ++row) finish(row);
    }

private:
    TARGET void add_keys(const KeyBlock& keys, int64_t first_tile, int64_t end_tile) {
        const int64_t first_row = tiles.start(first_tile);
        Sight seen[kScoreTiles];
        for (int64_t tile = first_tile; tile < end_tile; ++tile)
            seen[tile - first_tile] = tile_sight(p, keys, batch, token, tiles, tile);
        for (int64_t column = 0; column < keys.columns(); column += kPanel)
            for (int64_t tile = first_tile; tile < end_tile; ++tile) {
                if (!seen[tile - first_tile].has(column)) continue;
                const int64_t row = tiles.start(tile);
                multiply<kChunk, 1, kKeys, kSet>(
                    tiles.height(tile), {s.q + row * kChunk, num_rows * kChunk, kChunk, s.k + column * depth, depth,
                                         s.scores + (row - first_row) * kKeys + column, nullptr});
            }
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            const Sight& own = seen[tile - first_tile];
            for (int64_t row = tiles.start(tile); own.end > 0 && row < tiles.start(tile + 1); ++row) {
                float* scores = s.scores + (row - first_row) * kKeys;
                if (own.partial) mask(p, keys, token + row / group, own, scores);
                s.rescale[row - first_row] =
                    update_softmax(scores, own, p.scaling * kLog2E, s.top[row], s.total + row * WIDTH);
            }
        }
        const float* weights = as_rows(s.scores, tiles.start(end_tile) - first_row, 0, keys.columns(), s.words);
        for (int64_t column = 0; column < columns; column += kPanel)
            for (int64_t tile = first_tile; tile < end_tile; ++tile) {
                const Sight& own = seen[tile - first_tile];
                if (own.end == 0) continue;
                const int64_t row = tiles.start(tile), words = (own.end - own.begin) / WORD_VALUES;
                const int64_t skipped = own.begin / WORD_VALUES;
                multiply<kKeyWords, 1, kPanel, kRescaleAndAdd>(
                    tiles.height(tile), {weights + (row - first_row) * kKeyWords + skipped, 0, words,
                                         s.v + column * kKeyWords + skipped * kPanel, words,
                                         s.out + column * num_rows + row * kPanel, s.rescale + row - first_row});
            }
    }

    TARGET void finish(int64_t row) {
        const int64_t head = kv_head * group + row % group, t = token + row / group;
        const float total = sum(load(s.total + row * WIDTH)), inverse = 1 / total;
        T* out = static_cast<T*>(p.out.data) + batch * p.out.batch + head * p.out.head + t * p.out.token;
        for (int64_t column = 0; column < p.head_dim; column += WIDTH) {
            const float* from = s.out + (column / kPanel * num_rows + row) * kPanel + column % kPanel;
            store_some(out + column, load(from) * inverse, p.head_dim - column);
        }
        p.lse[(batch * p.query_heads + head) * p.queries + t] = s.top[row] * kLn2 + std::log(total);
    }

    const Attention& p;
    const ForwardScratch s;
    const int64_t batch, kv_head, token, num_tokens;
    const int64_t group = p.group(), num_rows = num_tokens * group;
    const int64_t depth = p.head_dim / WORD_VALUES, columns = round_up(p.head_dim, kPanel);
    const Tiles tiles{num_rows};
};

template <class T>
TARGET static void forward(const Attention& p, int64_t item, void* scratch) {
    ForwardBlock<T>(p, item, scratch).run();
}
