// Which keys which rows see, for attention_impl.h.

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// The range of some positions' documents, depths or ends of sight.
struct Range {
    int32_t lowest, highest;

    bool one() const { return lowest == highest; }
    bool may_meet(const Range& other) const {
        return highest >= 0 && lowest <= other.highest && other.lowest <= highest;
    }
};

// `values` is [batch, keys], or null for zeros.
TARGET static Range range_of(const Attention& p, const int32_t* values, int64_t batch, int64_t first, int64_t count) {
    if (!values) return {0, 0};
    const int32_t* from = values + batch * p.keys + first;
    const auto range = std::minmax_element(from, from + count);
    return {*range.first, *range.second};
}

struct KeyBlock {
    int64_t first, count;
    Range documents, depths, visible_until;
    // Of every key, or null.
    const int32_t *each, *each_depth, *each_until;

    KeyBlock(const Attention& p, int64_t batch, int64_t first_key)
        : first(first_key),
          count(std::min(kKeys, p.keys - first_key)),
          documents(range_of(p, p.documents, batch, first, count)),
          depths(range_of(p, p.depths, batch, first, count)),
          visible_until(range_of(p, p.visible_until, batch, first, count)),
          each(p.documents ? p.documents + batch * p.keys + first : nullptr),
          each_depth(p.depths ? p.depths + batch * p.keys + first : nullptr),
          each_until(p.visible_until ? p.visible_until + batch * p.keys + first : nullptr) {}

    int64_t columns() const { return round_up(count, kPanel); }
};

// What the rows of some consecutive tokens see of a block of keys.
struct Sight {
    int64_t begin, end;  // whole panels of columns outside which no row sees any; equal if no row sees anything
    bool partial;        // some row does not see all of them

    bool has(int64_t column) const { return begin <= column && column < end; }
};

TARGET static Sight sight(const Attention& p, const KeyBlock& keys, int64_t batch, int64_t token, int64_t num_tokens) {
    const int64_t earliest = p.position(token) - keys.first, latest = earliest + num_tokens - 1;
    const int64_t first = std::max<int64_t>(0, earliest - p.window + 1), end = std::min(keys.count, latest + 1);
    const Range documents = range_of(p, p.documents, batch, p.position(token), num_tokens);
    if (first >= end || !documents.may_meet(keys.documents)) return {0, 0, false};
    const int64_t begin = first / kPanel * kPanel, rounded_end = round_up(end, kPanel);
    bool whole = documents.one() && keys.documents.one() && std::min(keys.count, earliest + 1) >= rounded_end &&
                 latest - p.window + 1 <= begin;
    if (p.visible_until) {
        const int64_t place = p.position(token);
        const Range depths = range_of(p, p.depths, batch, place, num_tokens);
        if (keys.visible_until.highest <= place || depths.lowest - keys.depths.highest >= p.reach) return {0, 0, false};
        whole &= keys.visible_until.lowest >= place + num_tokens && depths.highest - keys.depths.lowest < p.reach;
    }
    return {begin, rounded_end, !whole};
}

// Values of the keys from a column on; zeros behind the last key.
TARGET static ints of_keys(const int32_t* each, int64_t from, int64_t count) {
    int32_t values[WIDTH] = {};
    std::memcpy(values, each + from, std::max<int64_t>(0, std::min<int64_t>(WIDTH, count - from)) * sizeof(int32_t));
    ints loaded;
    std::memcpy(&loaded, values, sizeof loaded);
    return loaded;
}

// Set the scores of keys that the token does not see to minus infinity.
TARGET static void mask(const Attention& p, const KeyBlock& keys, int64_t token, const Sight& seen, float* scores) {
    const int64_t own = p.position(token) - keys.first;
    int64_t first = own - p.window + 1, end = std::min(keys.count, own + 1);
    const int32_t document = keys.each ? keys.each[own] : 0;
    const bool one_document = keys.documents.one() && keys.documents.lowest == document && !keys.each_until;
    if (document < 0) end = first;
    ints column = ints{};
    for (int lane = 0; lane < WIDTH; ++lane) column[lane] = lane;
    for (int64_t from = seen.begin; from < seen.end; from += WIDTH) {
        if (one_document && from >= first && from + WIDTH <= end) continue;
        const ints key = column + static_cast<int32_t>(from);
        ints visible = (key >= static_cast<int32_t>(std::max<int64_t>(first, 0))) &
                       (key < static_cast<int32_t>(std::max<int64_t>(end, 0)));
        if (keys.each) visible &= of_keys(keys.each, from, keys.count) == document;
        if (keys.each_until) {
            visible &= of_keys(keys.each_until, from, keys.count) > static_cast<int32_t>(own + keys.first);
            visible &= keys.each_depth[own] - of_keys(keys.each_depth, from, keys.count) < static_cast<int32_t>(p.reach);
        }
        store(scores + from, visible ? load(scores + from) : broadcast(-INFINITY));
    }
}

// Nearly equal tiles: with 8 rows, 4 and 4 keep the arithmetic busier than 6 and 2.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t num_rows) : rows(num_rows), count(ceil_div(num_rows, TILE_ROWS)) {}
    int64_t start(int64_t tile) const { return tile * rows / count; }
    int64_t height(int64_t tile) const { return start(tile + 1) - start(tile); }
};

// What one of the tiles of a block of rows that begins with `token` sees.
TARGET static Sight tile_sight(const Attention& p, const KeyBlock& keys, int64_t batch, int64_t token,
                               const Tiles& tiles, int64_t tile) {
    const int64_t first = tiles.start(tile) / p.group(), last = (tiles.start(tile + 1) - 1) / p.group();
    return sight(p, keys, batch, token + first, last - first + 1);
}

// Hands out pieces of a thread's scratch, each on its own cache lines; with null memory it only counts.
class Scratch {
public:
    explicit Scratch(void* memory) : memory_(static_cast<float*>(memory)) {}
    float* take(int64_t floats) {
        const int64_t at = used_;
        used_ += round_up(floats, 16);
        return memory_ ? memory_ + at : nullptr;
    }
    size_t bytes() const { return used_ * sizeof(float); }

private:
    float* memory_;
    int64_t used_ = 0;
};

// Scores, or what is made of them, as A operand: [row][word] of `columns` columns. With words of one value they are it.
TARGET static inline const float* as_rows(const float* scores, int64_t num_rows, int64_t begin, int64_t end,
                                          float* words) {
#if WORD_VALUES == 1
    (void)num_rows, (void)begin, (void)end, (void)words;
    return scores;
#else
    auto* out = reinterpret_cast<uint16_t*>(words);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t from = begin; from < end; from += WIDTH)
            store(out + row * kKeys + from, load(scores + row * kKeys + from));
    return words;
#endif
}

template <class T>
TARGET static Rows<T> query_rows(const View& view, const Attention& p, int64_t batch, int64_t kv_head, int64_t token) {
    const int64_t first = batch * view.batch + kv_head * p.group() * view.head + token * view.token;
    return {static_cast<const T*>(view.data) + first, view.head, view.token, p.group()};
}

template <class T>
TARGET static Rows<T> key_rows(const View& view, int64_t batch, int64_t kv_head, int64_t first) {
    const int64_t at = batch * view.batch + kv_head * view.head + first * view.token;
    return {static_cast<const T*>(view.data) + at, 0, view.token, 1};
}
