// What a TensorRT 8.6 plan keeps of the plugins: written and read back, and refused in every other shape.
#include "v2/attention_blob.h"
#include "v2/linear_blob.h"
#include "v2/step_blob.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <tuple>
#include <vector>

using dijiang::trt::attention::Attributes;
using dijiang::trt::attention::kBlobSize;
using dijiang::trt::attention::read_blob;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
    std::printf("%s %s\n", right ? "ok  " : "FAIL", what);
    failures += right ? 0 : 1;
}

using Blob = std::array<unsigned char, kBlobSize>;

bool refused(const void* bytes, size_t size, const char* text) {
    Attributes attributes;
    return read_blob(bytes, size, attributes).find(text) != std::string::npos;
}

void linear() {
    namespace linear = dijiang::trt::linear;
    linear::Attributes attributes;
    attributes.terms = 3;
    attributes.outputs = 2;
    attributes.dtype = 1;
    attributes.term_output[1] = attributes.term_output[2] = 1;
    attributes.term_bias[0] = 1;
    attributes.output_activation[0] = 0x01020304;  // four different bytes: their order shows
    attributes.output_norm[0] = attributes.output_norm_bias[0] = attributes.output_residual[1] = 1;
    attributes.term_weight_format[2] = 2;
    attributes.output_width[1] = 50304;
    attributes.output_epsilon[0] = 1.0000001e-5f;
    attributes.workspace = linear::kReserved;
    std::array<unsigned char, linear::kBlobSize> blob{};
    linear::write_blob(attributes, blob.data());
    const unsigned char head[] = {'D', 'J', 'T', 'L', 3, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0};
    expect(std::memcmp(blob.data(), head, sizeof head) == 0 && blob[20] == 1 && blob[56] == 4 && blob[59] == 1,
        "linear: little-endian, with magic and format version");
    linear::Attributes read;
    expect(linear::read_blob(blob.data(), blob.size(), read).empty() &&
               std::memcmp(&read, &attributes, sizeof read) == 0,
        "linear: the same attributes");
    const auto refuses = [](const void* bytes, size_t size, const char* text) {
        linear::Attributes unused;
        return linear::read_blob(bytes, size, unused).find(text) != std::string::npos;
    };
    bool all = true;
    for (size_t size = 0; size < blob.size(); ++size) {
        const std::vector<unsigned char> part(blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(size));
        all = all && refuses(part.data(), size, "expected 168");
    }
    expect(all, "linear: every shorter blob is refused");
    for (const auto& [at, value, text] : {std::tuple<size_t, int, const char*>{0, 'X', "DJTL"}, {4, 2, "format 2"},
             {8, 5, "1 to 4"}, {12, 0, "1 to 4"}, {15, 0x80, "1 to 4"}}) {
        auto other = blob;
        other[at] = static_cast<unsigned char>(value);
        expect(refuses(other.data(), other.size(), text), text);
    }
}

void step() {
    namespace step = dijiang::trt::step;
    step::Attributes attributes;
    int32_t next = 0x01020304;  // four different bytes, another number for each: their order shows
    for (int32_t* value : step::integers(attributes).at) *value = next++;
    attributes.model.norm_epsilon = 1.0000001e-5f;
    attributes.model.group_norm_epsilon = 1.0000002e-6f;
    std::array<unsigned char, step::kBlobSize> blob{};
    step::write_blob(attributes, blob.data());
    const unsigned char head[] = {'D', 'J', 'T', 'S', 1, 0, 0, 0, 4, 3, 2, 1, 5, 3, 2, 1};
    expect(std::memcmp(blob.data(), head, sizeof head) == 0, "step: little-endian, with magic and format version");
    step::Attributes read;
    expect(step::read_blob(blob.data(), blob.size(), read).empty() &&
               std::memcmp(&read, &attributes, sizeof read) == 0 && attributes.model.layers == 0x01020304 &&
               attributes.blocks == 0x01020304 + 16,
        "step: the same attributes");
    const auto refuses = [](const void* bytes, size_t size, const char* text) {
        step::Attributes unused;
        return step::read_blob(bytes, size, unused).find(text) != std::string::npos;
    };
    bool all = true;
    for (size_t size = 0; size < blob.size(); ++size) {
        const std::vector<unsigned char> part(blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(size));
        all = all && refuses(part.data(), size, "expected 88");
    }
    expect(all, "step: every shorter blob is refused");
    std::vector<unsigned char> longer(blob.begin(), blob.end());
    longer.push_back(0);
    expect(refuses(longer.data(), longer.size(), "expected 88"), "step: a longer one too");
    expect(refuses(nullptr, step::kBlobSize, "expected 88"), "step: and none at all");
    for (const auto& [at, value, text] :
        {std::tuple<size_t, int, const char*>{0, 'X', "DJTS"}, {4, 2, "format 2"}, {76, 1, "expected 92"}}) {
        auto other = blob;
        other[at] = static_cast<unsigned char>(value);
        expect(refuses(other.data(), other.size(), text), text);
    }
}

void quantised_step() {
    namespace step = dijiang::trt::step;
    step::Attributes attributes;
    attributes.model.layers = 3;
    attributes.formats = 5;
    const int32_t formats[] = {1, 2, 0x14, 0, 0xff};  // the head's, the embedding's, and of each layer
    std::copy(std::begin(formats), std::end(formats), attributes.weight_formats);
    expect(step::take_formats(attributes).empty() && attributes.model.quantised == 1 &&
               attributes.model.head_format == 1 && attributes.model.embedding_format == 2 &&
               attributes.model.int8_matrices[0] == 0x14 && attributes.model.int8_matrices[2] == 0xff,
        "quantised step: the model has the formats");
    std::vector<unsigned char> blob(step::blob_size(attributes));
    step::write_blob(attributes, blob.data());
    expect(blob.size() == 108 && blob[4] == 1 + DIJIANG_STEP_PACKING && blob[76] == 5 && blob[88] == 1 && blob[92] == 2 && blob[96] == 0x14,
        "quantised step: 88 bytes and a word for each format");
    step::Attributes read;
    expect(step::read_blob(blob.data(), blob.size(), read).empty() &&
               std::memcmp(&read, &attributes, sizeof read) == 0,
        "quantised step: the same attributes");
    const auto refused_as = [](const std::vector<unsigned char>& bytes) {
        step::Attributes unused;
        return step::read_blob(bytes.data(), bytes.size(), unused);
    };
    bool all = true;
    for (size_t size = 0; size < blob.size(); ++size)
        all = all && !refused_as({blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(size)}).empty();
    auto longer = blob;
    longer.push_back(0);
    expect(all && !refused_as(longer).empty(), "quantised step: every other size is refused");
    for (const auto& [at, value, text] : {std::tuple<size_t, int, const char*>{4, 1, "format 1"}, {4, 2, "format 2"}, {8, 2, "2 layers"},
             {8, 0, "0 layers"}, {11, 0x80, "expected 2 and one for each layer"}, {76, 4, "expected 104"},
             {79, 0x80, "expected 0 to 130"}, {97, 1, "a bit for each"}, {107, 0x80, "a bit for each"}}) {
        auto other = blob;
        other[at] = static_cast<unsigned char>(value);
        expect(refused_as(other).find(text) != std::string::npos, text);
    }
}

}  // namespace

int main() {
    linear();
    step();
    quantised_step();
    Attributes attributes;
    attributes.num_heads = 12;
    attributes.num_kv_heads = 3;
    attributes.head_dim = 0x01020340;  // four different bytes: their order shows
    attributes.rotary_dim = 16;
    attributes.epsilon = 1.0000001e-5f;
    attributes.limits.include(8, 1);
    attributes.limits.include(2, 4096);
    Blob blob{};
    write_blob(attributes, blob.data());
    const unsigned char head[] = {
        'D', 'J', 'T', 'A', 1, 0, 0, 0, 12, 0, 0, 0, 3, 0, 0, 0, 0x40, 0x03, 0x02, 0x01};
    expect(std::memcmp(blob.data(), head, sizeof head) == 0, "little-endian, with magic and format version");

    Attributes read;
    expect(read_blob(blob.data(), blob.size(), read).empty(), "reads what was written");
    expect(read.num_heads == 12 && read.num_kv_heads == 3 && read.head_dim == attributes.head_dim &&
               read.rotary_dim == 16 && read.epsilon == attributes.epsilon,
        "the same attributes");
    expect(read.limits.max_batch == 8 && read.limits.max_length == 4096, "the same limits");

    bool all = true;
    for (size_t size = 0; size < kBlobSize; ++size) {
        // In memory of exactly this size, so that an address sanitizer sees a read beyond it.
        const std::vector<unsigned char> part(blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(size));
        all = all && refused(part.data(), size, "expected 36");
    }
    expect(all, "every shorter blob is refused");
    std::vector<unsigned char> longer(blob.begin(), blob.end());
    longer.push_back(0);
    expect(refused(longer.data(), longer.size(), "expected 36"), "a longer one too");
    expect(refused(nullptr, kBlobSize, "expected 36"), "and none at all");
    const auto changed = [&blob](size_t at, unsigned char value) {
        Blob other = blob;
        other[at] = value;
        return other;
    };
    expect(refused(changed(0, 'X').data(), kBlobSize, "DJTA"), "another magic");
    expect(refused(changed(4, 2).data(), kBlobSize, "format 2"), "a newer format");
    expect(refused(changed(31, 0x80).data(), kBlobSize, "negative"), "a negative limit");
    return failures == 0 ? 0 : 1;
}
