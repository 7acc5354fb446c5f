// What the shells of either TensorRT (v2/plugin.h, v3/plugin.h) ask of a plugin's layer. A layer is a copyable object
// with the plugin's own part of everything; a copy has the attributes, but no memory yet. TensorRT clones plugins per
// execution context and runs each clone in one thread at a time, so nothing in it is locked. Functions that return
// a string return "" or what is wrong.
//
//   kName                        what the registry knows the plugin by
//   Layer(attributes)            that are supported
//   outputs()                    how many there are
//   output_type, output_shape    of one output; refuse what cannot be a node of the plugin
//   supports                     supportsFormatCombination for the tensor at a place, which counts inputs, then
//                                outputs; `first` is the tensor at place 0
//   configure                    checks sizes that may be unknown (-1), and the largest that a profile allows
//   prepare                      checks a call's exact sizes, and reserves what it needs
//   run                          enqueues a call: no allocation, no synchronisation
//
// and what is below. The attributes' namespace has read_fields, field_place and describe, why_unsupported, and for 8.6
// read_blob, write_blob and blob_size.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "common/field_table.h"

namespace dijiang::trt {

// NodeFields: how many fields a node has; a plan has AllFields, those of a node first.
template <typename Given, int32_t NodeFields, int32_t AllFields>
class LayerBase {
public:
    using Attributes = Given;
    using Fields = trt::Fields<Given, NodeFields, AllFields>;

    explicit LayerBase(const Attributes& attributes) : attributes_(attributes) {}

    const Attributes& attributes() const { return attributes_; }

    // Of layers that have no memory of their own. reserve: what the largest call that the plan allows needs, on the GPU
    // at hand; allocates, so it is not for enqueue.
    std::string reserve() { return {}; }
    void release() noexcept {}

    // Of layers that need no workspace. Exact sizes, from 8.6, or those that a profile allows, from newer versions.
    template <typename Description>
    std::string workspace(const Description*, int32_t, const Description*, int32_t, size_t& bytes) const {
        bytes = 0;
        return {};
    }

protected:
    Attributes attributes_;
};

}  // namespace dijiang::trt
