#include "linear/many/run.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <memory>

#include "host/errors.h"
#include "linear/many/parts.h"
#include "linear/many/product.h"
#include "linear/quantized/quantized.h"

namespace dijiang {
namespace many {
namespace {

dijiang_status check(cudaError_t error) {
    return error == cudaSuccess ? DIJIANG_OK : fail_cuda(error, "a kernel of products of many rows");
}

// One call: how it is cut, and where its parts of the workspace are.
class Call {
public:
    Call(const dijiang_linear_call& call, void* workspace, bool overlap, cudaStream_t stream)
        : call_(call), plan_(plan(call)), overlap_(overlap), stream_(stream), library_(workspace) {
        inputs_ = static_cast<unsigned char*>(workspace) + kLibraryWorkspace;
        weights_ = inputs_ + plan_.inputs;
        biases_ = weights_ + plan_.weights;
        sums_ = biases_ + plan_.biases;
    }

    // Is there an algorithm for each product? Rows come in as many as possible, and then the rest.
    dijiang_status prepare_all(bool& good, std::string& why) const {
        good = false;
        std::shared_ptr<const Product> product;
        const int32_t rest = call_.rows % plan_.rows_at_once;
        for (const int32_t rows : {plan_.rows_at_once, rest == 0 ? plan_.rows_at_once : rest})
            for (const auto& group : plan_.groups)
                for (const Piece& piece : group)
                    for (int32_t t = 0; t < plan_.outputs[piece.output].terms; ++t) {
                        DIJIANG_TRY(prepare(shape_of(piece, t, rows), product, why));
                        if (product == nullptr) return DIJIANG_OK;
                    }
        good = true;
        return DIJIANG_OK;
    }

    dijiang_status enqueue() {
        bool first = true;
        for (int32_t row = 0; row < call_.rows; row += plan_.rows_at_once) {
            first_row_ = row;
            rows_ = std::min(plan_.rows_at_once, call_.rows - row);
            normalised_ = -1;
            for (const auto& group : plan_.groups) {
                DIJIANG_TRY(check(widen_all(group, first)));
                first = false;
                for (const Piece& piece : group) DIJIANG_TRY(enqueue(piece));
            }
        }
        return DIJIANG_OK;
    }

private:
    bool half() const { return call_.dtype == DIJIANG_FLOAT16; }
    bool gated(const Piece& piece) const { return call_.outputs[piece.output].activation == DIJIANG_SWIGLU; }
    const dijiang_linear_term& term(const Piece& piece, int32_t t) const {
        return call_.terms[plan_.outputs[piece.output].term + t];
    }

    Shape shape_of(const Piece& piece, int32_t t, int32_t rows) const {
        const dijiang_linear_output& out = call_.outputs[piece.output];
        const bool direct = plan_.outputs[piece.output].direct;
        Shape shape = {};
        shape.dtype = call_.dtype;
        shape.wide = direct ? 0 : 1;
        shape.biased = plan_.outputs[piece.output].bias >= 0;
        shape.relu = direct && out.activation == DIJIANG_RELU;
        shape.adds = direct ? out.residual != nullptr : t == 1 && !gated(piece);
        shape.rows = rows, shape.width = piece.columns, shape.inner = term(piece, t).inner;
        shape.result_stride = direct ? out.width : static_cast<int32_t>(sums_stride(piece.columns));
        return shape;
    }

    // Where the output's, or the residual's, element of the first row and the piece's first column is.
    template <typename Byte> Byte* of_output(const Piece& piece, Byte* data) const {
        if (data == nullptr) return nullptr;
        return data + 2 * (int64_t{first_row_} * call_.outputs[piece.output].width + piece.column);
    }
    unsigned char* result(const Piece& piece) const {
        return of_output(piece, static_cast<unsigned char*>(call_.outputs[piece.output].output));
    }
    const unsigned char* residual(const Piece& piece) const {
        return of_output(piece, static_cast<const unsigned char*>(call_.outputs[piece.output].residual));
    }

    // The group's weights, and with the first ones all biases that the library adds.
    cudaError_t widen_all(const std::vector<Piece>& group, bool biases) const {
        Widen it = {};
        for (int32_t o = 0; biases && o < call_.output_count; ++o) {
            if (plan_.outputs[o].bias < 0) continue;
            const int32_t width = call_.outputs[o].width;
            it.biases[it.bias_count++] = {call_.terms[plan_.outputs[o].term].bias, biases_ + plan_.outputs[o].bias, width,
                                          it.bias_blocks};
            it.bias_blocks += bias_blocks(width);
        }
        for (const Piece& piece : group)
            for (int32_t t = 0; t < plan_.outputs[piece.output].terms; ++t) {
                if (piece.weights[t] < 0) continue;
                const int32_t format = quantized::format_of(call_, plan_.outputs[piece.output].term + t);
                WidenJob& job = it.jobs[it.count++];
                job.format = format, job.rows = piece.columns, job.inner = term(piece, t).inner;
                job.chunks = (job.inner + quantized::chunk_elements(format) - 1) / quantized::chunk_elements(format);
                job.from = static_cast<const unsigned char*>(term(piece, t).weight) +
                           int64_t{piece.column / quantized::kTile} * job.chunks * quantized::chunk_bytes(format);
                job.to = weights_ + piece.weights[t];
                job.first_block = it.blocks;
                it.blocks += widen_blocks(job.rows, job.chunks);
            }
        if (it.count + it.bias_count == 0) return cudaSuccess;
        return half() ? widen<__half>(it, overlap_, stream_) : widen<__nv_bfloat16>(it, overlap_, stream_);
    }

    // The norm's rows, which several outputs of one input may share.
    dijiang_status input_of(const Piece& piece, int32_t t, const void*& input) {
        const dijiang_linear_output& out = call_.outputs[piece.output];
        const dijiang_linear_term& it = term(piece, t);
        input = static_cast<const unsigned char*>(it.input) + 2 * int64_t{first_row_} * it.inner;
        if (out.norm == DIJIANG_NORM_NONE) return DIJIANG_OK;
        if (normalised_ < 0 || !same_norm(normalised_, piece.output)) {
            const Normalise norm = {out, input, inputs_, rows_, it.inner};
            DIJIANG_TRY(check(half() ? normalise<__half>(norm, overlap_, stream_)
                                     : normalise<__nv_bfloat16>(norm, overlap_, stream_)));
            normalised_ = piece.output;
        }
        input = inputs_;
        return DIJIANG_OK;
    }
    bool same_norm(int32_t one, int32_t other) const {
        const dijiang_linear_output &a = call_.outputs[one], &b = call_.outputs[other];
        const dijiang_linear_term &x = call_.terms[plan_.outputs[one].term], &y = call_.terms[plan_.outputs[other].term];
        return x.input == y.input && x.inner == y.inner && a.norm == b.norm && a.norm_weight == b.norm_weight &&
               a.norm_bias == b.norm_bias && a.epsilon == b.epsilon;
    }

    dijiang_status enqueue(const Piece& piece) {
        const bool direct = plan_.outputs[piece.output].direct;
        for (int32_t t = 0; t < plan_.outputs[piece.output].terms; ++t) {
            std::shared_ptr<const Product> product;
            std::string why;
            DIJIANG_TRY(prepare(shape_of(piece, t, rows_), product, why));
            if (product == nullptr) return fail(DIJIANG_INTERNAL_ERROR, "a product has lost its algorithm");
            const void* input = nullptr;
            DIJIANG_TRY(input_of(piece, t, input));
            const void* const weight = piece.weights[t] >= 0
                                           ? weights_ + piece.weights[t]
                                           : static_cast<const unsigned char*>(term(piece, t).weight) +
                                                 2 * int64_t{piece.column} * term(piece, t).inner;
            unsigned char* const sums = sums_ + (t == 1 && gated(piece) ? plan_.sums : 0);
            const int64_t bias = plan_.outputs[piece.output].bias;
            DIJIANG_TRY(multiply(*product, input, weight, bias < 0 ? nullptr : biases_ + bias + 2 * int64_t{piece.column},
                                 direct ? residual(piece) : sums, direct ? result(piece) : sums, library_, stream_));
        }
        return direct ? DIJIANG_OK : check(finish_sums(piece));
    }

    cudaError_t finish_sums(const Piece& piece) const {
        const auto bias = [&](int32_t t) -> const float* {
            if (t >= plan_.outputs[piece.output].terms || term(piece, t).bias == nullptr) return nullptr;
            return term(piece, t).bias + piece.column;
        };
        const dijiang_linear_output& out = call_.outputs[piece.output];
        const Finish it = {reinterpret_cast<const float*>(sums_), reinterpret_cast<const float*>(sums_ + plan_.sums),
                           bias(0), bias(1), residual(piece), result(piece), rows_, piece.columns, out.width,
                           out.activation, sums_stride(piece.columns)};
        return half() ? finish<__half>(it, overlap_, stream_) : finish<__nv_bfloat16>(it, overlap_, stream_);
    }

    const dijiang_linear_call& call_;
    const Plan plan_;
    const bool overlap_;
    const cudaStream_t stream_;
    void* const library_;
    unsigned char *inputs_, *weights_, *biases_, *sums_;
    int32_t first_row_ = 0, rows_ = 0;
    int32_t normalised_ = -1;  // the output whose norm's rows are there
};

}  // namespace

dijiang_status run(const dijiang_linear_call& call, void* workspace, bool overlap, cudaStream_t stream, bool& done,
                   std::string& why) {
    Call it(call, workspace, overlap, stream);
    DIJIANG_TRY(it.prepare_all(done, why));
    return done ? it.enqueue() : DIJIANG_OK;
}

}  // namespace many
}  // namespace dijiang
