// Calls of dijiang_sample and dijiang_advance for compute-sanitizer: every filter, rows over one block and over several,
// more tokens in a bin than are compared with each other, masks, options of each row.
#include <algorithm>
#include <cstring>
#include <string>

#include "dijiang/sampling.h"
#include "sanitizer_tools.h"

using namespace sanitizer;

namespace {

struct Case {
    const char* name;
    int rows, vocabulary;
    dijiang_sampling_options options;
    bool masks, of_each_row;
    float width;  // of the logits
    bool in_order = false;  // the logits ascend, so that all tokens near a cut are one block's
};

dijiang_sampling_options options(double temperature, int top_k, double top_p, double min_p = 0, double penalty = 1) {
    return {temperature, top_p, min_p, penalty, 77, top_k, 0};
}

std::vector<uint32_t> bits(size_t count, uint32_t out_of) {
    std::vector<uint32_t> words(count);
    for (uint32_t& word : words)
        for (int bit = 0; bit < 32; ++bit) word |= (rng() % out_of == 0 ? 1u : 0u) << bit;
    return words;
}

bool run(const Case& c) {
    const size_t rows = static_cast<size_t>(c.rows), words = (static_cast<size_t>(c.vocabulary) + 31) / 32;
    std::vector<float> scores = normal(rows * static_cast<size_t>(c.vocabulary), c.width);
    if (c.in_order) std::sort(scores.begin(), scores.end());
    const Device logits(scores);
    std::vector<uint32_t> may = bits(rows * words, 3);
    for (size_t row = 0; row < rows; ++row) may[row * words] |= 1;
    const Device allowed(may), seen(bits(rows * words, 10)), draws(std::vector<int64_t>(rows, 5));
    const Device each(std::vector<dijiang_sampling_options>(rows, c.options));
    const Device tokens(rows * 8), status(rows * 4);
    dijiang_sample_buffers b{};
    b.logits = logits.as<float>();
    if (c.masks) {
        b.allowed = allowed.as<uint32_t>(), b.allowed_row_stride = static_cast<int64_t>(words);
        b.seen = seen.as<uint32_t>();
    }
    if (c.of_each_row) b.row_options = each.as<dijiang_sampling_options>();
    b.draws = draws.as<int64_t>();
    b.tokens = tokens.as(), b.row_status = status.as<int32_t>();
    b.batch = c.rows, b.vocabulary = c.vocabulary, b.integers = DIJIANG_INT64;
    std::vector<int64_t> first;
    bool good = true;
    for (int turn = 0; turn < 2; ++turn) {
        require(dijiang_sample(&c.options, &b, nullptr), "sample");
        const Device finished(std::vector<int32_t>(rows, 0)), ids(rows * 8);
        dijiang_advance_buffers a{};
        a.tokens = tokens.as(), a.row_status = status.as<int32_t>(), a.draws = nullptr, a.input_ids = ids.as();
        a.finished = finished.as<int32_t>();
        a.batch = c.rows, a.vocabulary = c.vocabulary, a.integers = DIJIANG_INT64;
        require(dijiang_advance(&a, nullptr), "advance");
        require(cudaDeviceSynchronize(), "synchronize");
        const auto chosen = tokens.copy<int64_t>();
        for (const int32_t of_row : status.copy<int32_t>()) good = good && of_row == DIJIANG_ROW_OK;
        for (const int64_t token : chosen) good = good && token >= 0 && token < c.vocabulary;
        good = good && ids.copy<int64_t>() == chosen && (turn == 0 || chosen == first);
        first = chosen;
    }
    std::printf("%-4s %-9s B %d V %d%s%s\n", good ? "ok" : "BAD", c.name, c.rows, c.vocabulary, c.masks ? " masks" : "",
                c.of_each_row ? " of each row" : "");
    return good;
}

}  // namespace

int main(int count, char** words) {
    // With "quick": few small cases, for racecheck, which takes 1000 times longer.
    const bool quick = count > 1 && std::strcmp(words[1], "quick") == 0;
    std::vector<Case> cases;
    for (const int vocabulary : quick ? std::vector<int>{5000} : std::vector<int>{7, 2049, 5000, 50304}) {
        cases.push_back({"greedy", 2, vocabulary, options(0, 0, 1), false, false, 1.0f});
        cases.push_back({"plain", 1, vocabulary, options(1, 0, 1), false, true, 1.0f});
        cases.push_back({"top-k", 1, vocabulary, options(0.9, 50, 1), false, false, 1.0f});
        cases.push_back({"top-p", 2, vocabulary, options(1.0, 0, 0.9), true, false, 1.0f});
        cases.push_back({"all", 1, vocabulary, options(0.7, 400, 0.95, 0.002, 1.3), true, true, 1.0f});
        cases.push_back({"few", 1, vocabulary, options(0.8, 40, 0.9, 0.01, 1.2), true, false, 1.0f});
        cases.push_back({"crowded", 1, vocabulary, options(1.0, 2000, 0.5), false, false, 1e-7f});
        cases.push_back({"no few", 1, vocabulary, options(1.0, 50, 0.5), false, false, 1e-7f});
    }
    // Sixteen blocks a row, where the GPU has them.
    for (const int vocabulary : quick ? std::vector<int>{33000} : std::vector<int>{33000, 128256}) {
        cases.push_back({"top-p", 1, vocabulary, options(1.0, 0, 0.9), false, false, 2.5f});
        cases.push_back({"all", 1, vocabulary, options(0.7, 400, 0.95, 0.002), false, false, 2.5f});
        cases.push_back({"in order", 1, vocabulary, options(1.0, 900, 0.9), false, false, 0.01f, true});
        cases.push_back({"few", 1, vocabulary, options(0.8, 40, 0.9), false, false, 2.5f});
        cases.push_back({"no few", 1, vocabulary, options(0.8, 40, 0.9), false, false, 0.01f, true});
    }
    if (!quick) {
        cases.push_back({"many rows", 140, 9000, options(0.7, 40, 0.9), false, false, 1.0f});
        cases.push_back({"top-p rows", 70, 50304, options(1.0, 0, 0.9), false, false, 2.5f});
        // Blocks of 1,024 threads, whose memory scores fill.
        cases.push_back({"rows of few", 70, 50304, options(0.7, 40, 0.9), false, false, 2.5f});
        cases.push_back({"no few left", 70, 50304, options(0.7, 40, 0.9), false, false, 1e-7f});
    }
    int bad = 0;
    for (const Case& c : cases) bad += !run(c);
    std::printf("%zu calls, %d bad\n", cases.size(), bad);
    return bad > 0;
}
