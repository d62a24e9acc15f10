// Lets mlx compute an array by a compiled function of ours, on a CPU.
//
// mlx.fast.metal_kernel makes operations from source code for Metal, and raises an error where there
// is no Metal. `mlx_operations.py` lets it call `make_operation`, which makes an operation of a
// source that is "compiled" and three numbers, and passes any other source on. The operation is as
// lazy as any other of mlx. No other part of mlx changes. The three numbers are:
//
// - Whether the function gets the numbers of each input as they lie in memory, if those of the last
//   axis are side by side, and the steps of the other axes: a slice of a large array is not copied.
//   Otherwise, and of an array of more axes, it gets the numbers side by side.
// - How many inputs, from the second one on, the function changes. The output of the same place is
//   the changed input. It lies in the input's memory unless somebody else may read that.
// - The address of the function.

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/primitives.h"
#include "mlx/version.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

namespace mlx::core {

namespace {

constexpr int MOST = 70, MOST_OUTPUTS = 4, MOST_NUMBERS = 32, STEPS = 3;
constexpr size_t LARGE = 1 << 16;
using Function = void (*)(const void* const* inputs, void* const* outputs, const int64_t* numbers);

struct Arguments {
    const void* inputs[MOST];
    void* outputs[MOST_OUTPUTS];
    // The numbers of the caller, then the steps of each input along the axes before its last.
    int64_t numbers[MOST_NUMBERS + MOST * STEPS];
};

// Where the numbers of an array lie that are not side by side.
struct Spread {
    Shape shape;
    Strides strides;
    size_t itemsize;

    void copy(const char* from, char*& to, size_t axis = 0) const {
        // The rest lies side by side if it is one number, or a row of them.
        bool is_row = axis + 1 == shape.size() && strides[axis] == 1;
        if (is_row || axis == shape.size()) {
            size_t bytes = is_row ? shape[axis] * itemsize : itemsize;
            std::memcpy(to, from, bytes);
            to += bytes;
            return;
        }
        const auto step = strides[axis] * static_cast<int64_t>(itemsize);
        if (axis + 1 == shape.size() && itemsize == 4) {
            for (int i = 0; i < shape[axis]; i++, to += 4) std::memcpy(to, from + i * step, 4);
            return;
        }
        for (int i = 0; i < shape[axis]; i++) copy(from + i * step, to, axis + 1);
    }
};

void copy(const array& x, array& made, cpu::CommandEncoder& encoder) {
    made.set_data(allocator::malloc(made.nbytes()));
    const char* from = x.data<char>();
    char* to = made.data<char>();
    encoder.dispatch([spread = Spread{x.shape(), x.strides(), x.itemsize()}, from, to] {
        char* next = to;
        spread.copy(from, next);
    });
}

// The address of an array's numbers, side by side, copied first if need be. mlx's own operation for
// this takes some microseconds, even of an array that is as it should be.
const void* side_by_side(const array& x, cpu::CommandEncoder& encoder) {
    encoder.set_input_array(x);
    if (x.flags().row_contiguous) return x.data<void>();
    array made(x.shape(), x.dtype(), nullptr, {});
    copy(x, made, encoder);
    encoder.add_temporary(made);
    return made.data<void>();
}

// Lets an array begin with the numbers of another one, which its operation changes. While a step is
// computed, mlx holds its results, so a step that begins before its end copies what it changes.
void begin_with(const array& x, array& made, cpu::CommandEncoder& encoder) {
    encoder.set_input_array(x);
    if (x.is_donatable() && x.flags().row_contiguous)
        made.copy_shared_buffer(x);
    else
        copy(x, made, encoder);
}

// The address of an array's numbers as they are stored, and the steps from one to the next along each
// axis but the last: 0 along an axis of length 1. They are copied if the last axis has steps too.
const void* as_stored(const array& x, cpu::CommandEncoder& encoder, int64_t* steps) {
    if (x.ndim() == 0 || x.ndim() > STEPS + 1) return side_by_side(x, encoder);
    // Matrices are given side by side: a BLAS refuses some steps.
    const bool is_stored = x.ndim() > 2 && x.strides().back() == 1;
    int64_t step = x.shape(-1);
    for (int axis = x.ndim() - 2, to = STEPS - 1; axis >= 0; axis--, to--) {
        if (x.shape(axis) > 1) steps[to] = is_stored ? x.strides(axis) : step;
        step *= x.shape(axis);
    }
    if (!is_stored) return side_by_side(x, encoder);
    encoder.set_input_array(x);
    return x.data<void>();
}

class Compiled : public Primitive {
  public:
    Compiled(Stream stream, Function function, bool stored, size_t changed,
             const Arguments& arguments)
        : Primitive(stream), function(function), stored(stored), changed(changed),
          arguments(arguments) {}

    void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
        auto& encoder = cpu::get_command_encoder(stream());
        // Every output holds the inputs. One is enough, or no input could be changed where it lies.
        auto holds = [&](array& one) { return &one.inputs() == &inputs; };
        if (changed && std::any_of(outputs.begin(), outputs.end(), holds))
            for (auto& one : outputs)
                if (!holds(one) && !one.is_tracer()) one.inputs().clear();
        // Threads may compute with one compiled graph at once.
        Arguments all = arguments;
        for (size_t i = 0; i < inputs.size(); i++) {
            if (is_changed(i)) continue;
            int64_t* steps = all.numbers + MOST_NUMBERS + i * STEPS;
            all.inputs[i] = stored ? as_stored(inputs[i], encoder, steps)
                                   : side_by_side(inputs[i], encoder);
        }
        size_t bytes = 0;
        for (size_t i = 0; i < outputs.size(); i++) {
            if (is_changed(i)) {
                begin_with(inputs[i], outputs[i], encoder);
            } else {
                outputs[i].set_data(allocator::malloc(outputs[i].nbytes()));
                bytes += outputs[i].nbytes();
            }
            encoder.set_output_array(outputs[i]);
            all.outputs[i] = outputs[i].data<void>();
        }
        encoder.dispatch([function = function, all] {
            function(all.inputs, all.outputs, all.numbers);
        });
        // mlx begins operations, and allocates their results, until a hundred of them wait. One of
        // ours does the work of several, so one with a large result counts as several.
        for (int i = 1; bytes >= LARGE && i < cpu::DISPATCHES_PER_TASK; i++) encoder.dispatch([] {});
    }

    void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
        throw std::runtime_error("a compiled function of TextPolicy computes on CPUs only");
    }

    const char* name() const override { return "TextPolicyCompiled"; }

  private:
    bool is_changed(size_t number) const { return number && number <= changed; }

    Function function;
    bool stored;
    size_t changed;
    Arguments arguments;
};

fast::CustomKernelFunction make_operation(
    const std::string& name, const std::vector<std::string>& input_names,
    const std::vector<std::string>& output_names, const std::string& source,
    const std::string& header, bool row_contiguous, bool atomic, const CompileOptions& options) {
    int stored;
    size_t changed;
    uintptr_t address;
    if (std::sscanf(source.c_str(), "compiled %d %zu %" SCNuPTR, &stored, &changed, &address) != 3)
        return fast::metal_kernel(
            name, input_names, output_names, source, header, row_contiguous, atomic, options);
    auto function = reinterpret_cast<Function>(address);
    return [function, stored, changed, count = input_names.size()](
               const std::vector<array>& inputs, const std::vector<Shape>& given,
               const std::vector<Dtype>& dtypes, std::tuple<int, int, int>,
               std::tuple<int, int, int>, std::vector<std::pair<std::string, fast::TemplateArg>>,
               std::optional<float>, bool, StreamOrDevice where) {
        // The numbers come last.
        bool fits = inputs.size() == count && count <= MOST && dtypes.size() <= MOST_OUTPUTS &&
                    given.size() == dtypes.size() + 1 && given.back().size() <= MOST_NUMBERS;
        for (size_t i = 1; fits && i <= changed; i++)
            fits = i < count && i < dtypes.size() && inputs[i].shape() == given[i] &&
                   inputs[i].dtype() == dtypes[i];
        if (!fits)
            throw std::invalid_argument("a compiled function got other arrays than it takes");
        Stream stream = to_stream(where);
        std::vector<Shape> shapes(given.begin(), given.end() - 1);
        Arguments arguments{};
        std::copy(given.back().begin(), given.back().end(), arguments.numbers);
        auto primitive = std::make_shared<Compiled>(stream, function, stored, changed, arguments);
        return array::make_arrays(shapes, dtypes, primitive, inputs);
    };
}

}  // namespace
}  // namespace mlx::core

VISIBLE void* textpolicy_make_operation() {
    return reinterpret_cast<void*>(mlx::core::make_operation);
}
VISIBLE const char* textpolicy_running_mlx() { return mlx::core::version(); }
VISIBLE int textpolicy_compiled_for() { return MLX_VERSION_NUMERIC; }
