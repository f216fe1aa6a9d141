// Operators of window_attention: arguments, one thread per window, the bias table's gradient in fixed parts,
// registration.
#include "wsss/tensor.h"
#include "ops/window_attention/window_attention_math.h"

namespace wsss {
namespace window_attention {
namespace {

// One attention: its maps and, in the backward pass, their gradients.
template <class T>
struct Branch {
  const T *query, *key, *value, *grad;
  T *out, *dquery, *dkey, *dvalue;
};

#define WSSS_CPU_KERNELS "ops/window_attention/window_attention_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(window_forward)
WSSS_PICK(window_backward)

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
constexpr int64_t kParts = 16;  // of the windows, whose bias gradients are summed apart and then in order

Geometry geometry(const Tensor& map, int64_t heads, const Ints& window, const Ints& shift, double scale) {
  WSSS_CHECK(map.dim() == 4 && map.size(1) > 0 && map.size(2) > 0, "window_attention: maps of B×H×W×C expected");
  WSSS_CHECK(heads > 0 && map.size(3) > 0 && map.size(3) % heads == 0,
             "window_attention: the channels must be a multiple of num_heads");
  WSSS_CHECK(window.size() == 2 && shift.size() == 2 && window[0] > 0 && window[1] > 0 && shift[0] >= 0 &&
                 shift[1] >= 0 && shift[0] < window[0] && shift[1] < window[1],
             "window_attention: window of at least 1×1 and a shift below it expected");
  WSSS_CHECK(map.numel() / map.size(3) < (int64_t(1) << 31), "window_attention: more pixels than 2^31");
  return {map.size(0), map.size(1), map.size(2), map.size(3), heads, window[0], window[1], shift[0], shift[1], scale};
}

Tensors dense_maps(const Tensors& maps) {
  Tensors all;
  for (const Tensor& map : maps) {
    WSSS_CHECK(sizes_of(map) == sizes_of(maps[0]) && map.scalar_type() == maps[0].scalar_type(),
               "window_attention: all maps must have one shape and dtype");
    all.push_back(dense(map));
  }
  return all;
}

// log2(e) times [heads][key slot][query slot] from the table, or nothing.
template <class T>
Buffer<T> expanded_bias(const Geometry& g, const Tensor& bias) {
  if (!bias.numel()) return Buffer<T>();
  WSSS_CHECK(bias.dim() == 2 && bias.size(0) == g.offsets() && bias.size(1) == g.heads,
             "window_attention: bias must be ", g.offsets(), "×", g.heads);
  const Tensor given = dense(bias);
  const T* table = in<T>(given);
  Buffer<T> all(g.heads * g.slots() * g.stride());
  const int64_t last = difference(g.slots() - 1, g.window_width);
  for (int64_t h = 0; h < g.heads; ++h)
    for (int64_t k = 0; k < g.slots(); ++k) {
      T* row = all.data() + (h * g.slots() + k) * g.stride();
      const int64_t offset = last - difference(k, g.window_width);
      for (int64_t v = 0; v < g.window_height; ++v)
        for (int64_t u = 0; u < g.window_width; ++u)
          *row++ = T(base::kLog2E * table[(offset + v * (2 * g.window_width - 1) + u) * g.heads + h]);
      std::fill_n(row, g.stride() - g.slots(), T(0));
    }
  return all;
}

template <class T>
int64_t work_cells(const Geometry& g, int64_t matrices) {
  return g.stride() * g.depth() + 2 * g.stride() + matrices * g.slots() * g.stride();
}

// maps: query, key, value of each branch.
Tensors forward(const Tensors& maps, const Tensor& bias, const Geometry& g) {
  const Tensors given = dense_maps(maps);
  Tensors results;
  for (size_t i = 0; i < maps.size(); i += 3) results.push_back(torch::stable::empty_like(given[i]));
  WSSS_PATH("window_attention.fwd");
  for_float_type("window_attention", maps[0], [&](auto tag) {
    using T = decltype(tag);
    const Buffer<T> table = expanded_bias<T>(g, bias);
    std::vector<Branch<T>> branches;
    for (size_t i = 0; i < results.size(); ++i)
      branches.push_back({in<T>(given[3 * i]), in<T>(given[3 * i + 1]), in<T>(given[3 * i + 2]), nullptr,
                          out<T>(results[i]), nullptr, nullptr, nullptr});
    const auto kernel = window_forward(tag);
    parallel_for(0, int64_t(branches.size()) * g.windows(), 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> slots(6 * g.slots());
      Buffer<T> work(work_cells<T>(g, 1));
      for (int64_t i = begin; i < end; ++i)
        kernel(g, i % g.windows(), std::min(i + 1, end - 1) % g.windows(), table.data(),
               branches[size_t(i / g.windows())], slots.data(), work.data());
    });
  });
  return results;
}

// total[offset] = Σ of what a head's windows collected by slots.
template <class T>
void fold_bias(const Geometry& g, const T* slots, double* total) {
  const int64_t width = 2 * g.window_width - 1, last = difference(g.slots() - 1, g.window_width);
  std::fill_n(total, g.offsets(), 0.);
  for (int64_t k = 0; k < g.slots(); ++k)
    for (int64_t v = 0; v < g.window_height; ++v) {
      const T* from = slots + k * g.stride() + v * g.window_width;
      double* to = total + last - difference(k, g.window_width) + v * width;
      for (int64_t u = 0; u < g.window_width; ++u) to[u] += double(from[u]);
    }
}

// maps: query, key, value of each branch; returns their gradients in the same order, then the table's.
Tensors backward(const Tensors& maps, const Tensors& grads, const Tensor& bias, const Geometry& g) {
  Tensors all = maps;
  all.insert(all.end(), grads.begin(), grads.end());
  const Tensors given = dense_maps(all);
  Tensors results;
  for (size_t i = 0; i < maps.size(); ++i) results.push_back(torch::stable::empty_like(given[i]));
  results.push_back(torch::stable::empty_like(dense(bias)));
  WSSS_PATH("window_attention.bwd");
  for_float_type("window_attention", maps[0], [&](auto tag) {
    using T = decltype(tag);
    const Buffer<T> table = expanded_bias<T>(g, bias);
    std::vector<Branch<T>> branches;
    for (size_t i = 0; i < grads.size(); ++i)
      branches.push_back({in<T>(given[3 * i]), in<T>(given[3 * i + 1]), in<T>(given[3 * i + 2]),
                          in<T>(given[maps.size() + i]), nullptr, out<T>(results[3 * i]), out<T>(results[3 * i + 1]),
                          out<T>(results[3 * i + 2])});
    const int64_t total = int64_t(branches.size()) * g.windows(),
                  size = std::max<int64_t>(1, (total + kParts - 1) / kParts);
    const int64_t parts = (total + size - 1) / size, cells = g.slots() * g.stride();
    Buffer<double> folded(table.size() ? parts * g.heads * g.offsets() : 0);
    const auto kernel = window_backward(tag);
    parallel_for(0, parts * g.heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> slots(6 * g.slots());
      Buffer<T> work(work_cells<T>(g, 2)), collected(table.size() ? cells : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i % g.heads, first = i / g.heads * size, last = std::min(first + size, total) - 1;
        const int64_t after = std::min(i + 1, end - 1);
        std::fill_n(collected.data(), collected.size(), T(0));
        for (int64_t w = first; w <= last; ++w)
          kernel(g, w % g.windows(), head, (w < last ? w + 1 : after / g.heads * size) % g.windows(),
                 w < last ? head : after % g.heads, table.size() ? table.data() + head * cells : nullptr,
                 branches[size_t(w / g.windows())], table.size() ? collected.data() : nullptr, slots.data(),
                 work.data());
        if (table.size()) fold_bias(g, collected.data(), folded.data() + i * g.offsets());
      }
    });
    T* dbias = table.size() ? out<T>(results.back()) : nullptr;
    for (int64_t o = 0; dbias && o < g.offsets(); ++o)
      for (int64_t h = 0; h < g.heads; ++h) {
        double sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += folded[(p * g.heads + h) * g.offsets() + o];
        dbias[o * g.heads + h] = T(sum);
      }
  });
  return results;
}

Tensor window_fwd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, int64_t heads,
                  Ints window, Ints shift, double scale) {
  return forward({query, key, value}, bias, geometry(query, heads, window, shift, scale))[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_bwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                      const Tensor& bias, const Tensor& grad, int64_t heads,
                                                      Ints window, Ints shift, double scale) {
  const Tensors d = backward({query, key, value}, {grad}, bias, geometry(query, heads, window, shift, scale));
  return {d[0], d[1], d[2], d[3]};
}

// p: primary, t: structural; the result of a branch has the other one's query.
std::tuple<Tensor, Tensor> exchange_fwd(const Tensor& query_p, const Tensor& key_p, const Tensor& value_p,
                                        const Tensor& query_t, const Tensor& key_t, const Tensor& value_t,
                                        const Tensor& bias, int64_t heads, Ints window, Ints shift, double scale) {
  const Tensors z =
      forward({query_t, key_p, value_p, query_p, key_t, value_t}, bias, geometry(query_p, heads, window, shift, scale));
  return {z[0], z[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_bwd(
    const Tensor& query_p, const Tensor& key_p, const Tensor& value_p, const Tensor& query_t, const Tensor& key_t,
    const Tensor& value_t, const Tensor& bias, const Tensor& grad_p, const Tensor& grad_t, int64_t heads, Ints window,
    Ints shift, double scale) {
  const Tensors d = backward({query_t, key_p, value_p, query_p, key_t, value_t}, {grad_p, grad_t}, bias,
                             geometry(query_p, heads, window, shift, scale));
  return {d[3], d[1], d[2], d[0], d[4], d[5], d[6]};
}

}  // namespace
}  // namespace window_attention
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "window_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor bias, int heads, int[] window, int[] shift, "
      "float scale) -> Tensor");
  m.def(
      "window_attention_bwd(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor grad, int heads, int[] window, "
      "int[] shift, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "exchange_attention_fwd(Tensor query_p, Tensor key_p, Tensor value_p, Tensor query_t, Tensor key_t, Tensor "
      "value_t, "
      "Tensor bias, int heads, int[] window, int[] shift, float scale) -> (Tensor, Tensor)");
  m.def(
      "exchange_attention_bwd(Tensor query_p, Tensor key_p, Tensor value_p, Tensor query_t, Tensor key_t, Tensor "
      "value_t, "
      "Tensor bias, Tensor grad_p, Tensor grad_t, int heads, int[] window, int[] shift, float scale) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&wsss::window_attention::window_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&wsss::window_attention::window_bwd));
  m.impl("exchange_attention_fwd", TORCH_BOX(&wsss::window_attention::exchange_fwd));
  m.impl("exchange_attention_bwd", TORCH_BOX(&wsss::window_attention::exchange_bwd));
}
