// Calls every family and size class of the attention kernels through the C ABI, for compute-sanitizer (sanitize.py).
//
// Output, new state and workspace are left as cudaMalloc gives them, so that initcheck sees a read of what nobody
// wrote. What the numbers are is the business of tests/kernels/test_kernels_gpu.py; here they must be finite.
#include <cctype>
#include <cstring>
#include <string>
#include <vector>

#include "dijiang/kernels.h"
#include "sanitizer_tools.h"

namespace {

using namespace sanitizer;

struct Case {
    int heads, kv_heads, d, rotary, dtype, rows, length;
    std::vector<int32_t> lens;
    bool in_place;
};

bool run(const Case& c) {
    const size_t batch = c.lens.size(), tokens = batch * c.length;
    const size_t channels = static_cast<size_t>(c.heads) * c.d;
    const size_t width = static_cast<size_t>(c.heads + 2 * c.kv_heads) * c.d, state = batch * channels * c.d;
    const dijiang_geometry geometry{c.heads, c.kv_heads, c.d, c.rotary, c.dtype, c.rows, 1e-5f, 0};

    char plan[256];
    require(dijiang_attention_plan(&geometry, batch, c.length, nullptr, plan, sizeof plan), "plan");
    size_t workspace_size = 0, sync_size = 0;
    require(dijiang_attention_workspace_size(&geometry, batch, c.length, nullptr, &workspace_size), "workspace");
    require(dijiang_attention_sync_size(&geometry, batch, c.length, nullptr, &sync_size), "sync");

    const Device qkv(typed(normal(tokens * width, 1), c.dtype)), gate(typed(normal(tokens * channels, 2), c.dtype));
    const Device past(normal(state, 0.5f)), proj(normal(static_cast<size_t>(c.d) * c.d, 2 / std::sqrt(c.d)));
    const Device weight(normal(channels, 1)), bias(normal(channels, 1));
    std::vector<int32_t> starts(batch);
    for (size_t b = 0; b < batch; ++b) starts[b] = static_cast<int32_t>(5 + 100 * b);
    const Device positions(starts), lens(c.lens);
    std::vector<float> frequencies(c.rotary > 0 ? c.rotary / 2 : 1);
    for (size_t i = 0; i < frequencies.size(); ++i)
        frequencies[i] = std::pow(10000.0f, -2.0f * i / std::max(c.rotary, 1));
    const Device inv_freq(frequencies);
    std::vector<float> decay = normal(static_cast<size_t>(std::max(c.rows, 1)) * c.heads, 0.05f);
    for (float& value : decay) value = -std::fabs(value);
    const Device log_decay(decay), gain(normal(static_cast<size_t>(c.rows) * c.heads, 1));
    const Device read_scale(normal(static_cast<size_t>(c.rows) * c.heads, 1));
    const size_t element = c.dtype == DIJIANG_FLOAT32 ? 4 : 2;
    const Device output(tokens * channels * element), present(c.in_place ? 0 : state * 4);
    const Device workspace(workspace_size), sync(sync_size);
    if (sync_size > 0) require(cudaMemset(sync.as(), 0, sync_size), "cudaMemset");

    dijiang_attention_buffers b{};
    b.qkv = qkv.as();
    b.gate = gate.as();
    b.past_state = past.as<float>();
    b.positions = positions.as<int32_t>();
    b.seq_lens = lens.as<int32_t>();
    b.proj = proj.as<float>();
    b.norm_weight = weight.as<float>();
    b.norm_bias = bias.as<float>();
    b.inv_freq = inv_freq.as<float>();
    b.log_decay = log_decay.as<float>();
    b.gain = gain.as<float>();
    b.read_scale = read_scale.as<float>();
    b.output = output.as();
    b.present_state = c.in_place ? past.as<float>() : present.as<float>();
    b.workspace = workspace.as();
    b.workspace_size = workspace_size;
    b.sync = sync.as();
    b.sync_size = sync_size;

    cudaStream_t stream = nullptr;
    require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (int repeat = 0; repeat < 2; ++repeat)  // the second call finds what the first one left in sync
        require(dijiang_attention(&geometry, batch, c.length, &b, reinterpret_cast<dijiang_stream>(stream)),
                "dijiang_attention");
    require(cudaStreamSynchronize(stream), plan);
    require(cudaStreamDestroy(stream), "cudaStreamDestroy");
    bool good = finite(output, c.dtype);
    for (float value : (c.in_place ? past : present).copy<float>()) good = good && std::isfinite(value);
    if (sync_size > 0)
        for (uint8_t byte : sync.copy<uint8_t>()) good = good && byte == 0;
    std::printf("%-4s %3dx%-3d kv %-2d r %-3d dtype %d rows %-3d B %zu L %-4d %s | %s\n", good ? "ok" : "BAD", c.heads,
                c.d, c.kv_heads, c.rotary, c.dtype, c.rows, batch, c.length, c.in_place ? "in place" : "copy    ", plan);
    std::fflush(stdout);
    return good;
}

}  // namespace

int main(int count, char** words) {
    // With "quick": few small cases, for racecheck, which takes 1000 times longer. With "prefill": those alone that
    // compute capability 9.0 has a kernel of its own for.
    const bool prefill = count > 1 && std::strcmp(words[1], "prefill") == 0;
    const bool quick = prefill || (count > 1 && std::strcmp(words[count - 1], "quick") == 0);
    std::vector<Case> cases;
    // With "decode": heads that have blocks of their own, kept apart where there is room for all and where there is not.
    const bool decode = count > 1 && std::strcmp(words[1], "decode") == 0;
    const int batches[][7] = {{16, 16, 64, 16, DIJIANG_FLOAT16, 70, 40},  {12, 4, 64, 64, DIJIANG_BFLOAT16, 9, 0},
                              {32, 32, 80, 20, DIJIANG_FLOAT16, 5, 0},   {32, 32, 128, 32, DIJIANG_BFLOAT16, 14, 40},
                              {8, 4, 128, 128, DIJIANG_FLOAT16, 3, 0},   {8, 8, 256, 64, DIJIANG_FLOAT16, 3, 40},
                              {8, 2, 256, 256, DIJIANG_BFLOAT16, 13, 0}};
    for (const auto& s : batches) {
        if (!decode) break;
        std::vector<int32_t> lens(static_cast<size_t>(s[5]), 1);
        lens[2] = 0;
        cases.push_back({s[0], s[1], s[2], s[3], s[4], s[6], 1, lens, s[6] == 0});
    }
    const int shapes[][4] = {{16, 16, 64, 16}, {12, 4, 64, 64},  {32, 32, 80, 20}, {4, 2, 128, 32}, {8, 8, 256, 64},
                             {13, 13, 16, 6},  {5, 5, 48, 0},    {1, 1, 64, 10},   {3, 1, 96, 96},  {2, 2, 112, 0},
                             {6, 2, 32, 8},    {40, 40, 128, 0}, {2, 1, 160, 80},  {2, 2, 208, 14}, {2, 1, 240, 30}};
    int turn = 0;
    for (const auto& s : shapes) {
        if (quick || decode) break;
        for (int dtype = 0; dtype < 3; ++dtype) {
            const bool tables = turn % 2 == 1, in_place = turn / 2 % 2 == 1;
            cases.push_back({s[0], s[1], s[2], s[3], dtype, tables ? 40 : 0, 1, {1, 0, 1}, in_place});
            cases.push_back({s[0], s[1], s[2], s[3], dtype, tables ? 0 : 40, 150, {150, 0, 65}, !in_place});
            cases.push_back({s[0], s[1], s[2], s[3], dtype, 0, 3, {3}, in_place});
            ++turn;
        }
    }
    const int small[][5] = {{3, 1, 64, 16, 1}, {8, 4, 64, 16, 1}, {2, 2, 80, 20, 2}, {1, 1, 128, 32, 1},
                            {1, 1, 256, 64, 1}, {3, 3, 48, 0, 2},  {3, 1, 64, 16, 0}, {1, 1, 208, 14, 0}};
    for (const auto& s : small) {
        if (!quick || decode || prefill) break;
        cases.push_back({s[0], s[1], s[2], s[3], s[4], 40, 1, {1, 0}, true});
        cases.push_back({s[0], s[1], s[2], s[3], s[4], 0, 70, {66}, false});
    }
    // Prefill on compute capability 9.0: one row in segments of a chunk; a row that none cuts, of more chunks than there
    // are stages or groups; segments of several spans. Rows without tokens fill the GPU at no cost.
    const auto one_of = [](int rows, int length) {
        std::vector<int32_t> lens(rows, 0);
        lens[rows / 2] = length;
        return lens;
    };
    for (const int dtype : {DIJIANG_FLOAT16, DIJIANG_BFLOAT16}) {
        if (decode) break;
        cases.push_back({8, 4, 64, 16, dtype, 0, 130, {130}, true});
        cases.push_back({8, 8, 64, 64, dtype, 0, 330, one_of(17, 330), false});
        cases.push_back({8, 8, 64, 16, dtype, 0, 600, one_of(8, 600), true});
        cases.push_back({8, 8, 128, 32, dtype, 0, 130, {130}, false});
        cases.push_back({8, 8, 128, 128, dtype, 0, 330, one_of(17, 330), true});
        cases.push_back({16, 16, 80, 20, dtype, 0, 270, one_of(9, 270), false});
        cases.push_back({8, 4, 256, 64, dtype, 0, 130, {130}, true});
        cases.push_back({8, 8, 256, 256, dtype, 0, 330, one_of(5, 330), false});
    }
    // Enough rows for the plans that a full GPU gets, and a long text.
    if (!quick && !decode) {
        cases.push_back({16, 16, 64, 16, DIJIANG_FLOAT16, 0, 1, std::vector<int32_t>(64, 1), true});
        cases.push_back({32, 32, 128, 32, DIJIANG_BFLOAT16, 0, 1, std::vector<int32_t>(16, 1), true});
        cases.push_back({16, 16, 64, 16, DIJIANG_FLOAT16, 0, 2048, {2048}, true});
        cases.push_back({8, 8, 256, 64, DIJIANG_FLOAT16, 0, 700, {700, 333}, true});
    }
    // A number: this case alone.
    if (count > 2 && std::isdigit(static_cast<unsigned char>(words[2][0]))) cases = {cases.at(std::strtoul(words[2], nullptr, 10))};
    int bad = 0;
    for (const Case& c : cases) bad += !run(c);
    std::printf("%zu calls, %d bad\n", cases.size(), bad);
    return bad > 0;
}
