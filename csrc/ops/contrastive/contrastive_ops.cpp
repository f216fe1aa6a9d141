// The contrastive losses: labels, threads, sums in a fixed order, registration.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "ops/contrastive/contrastive_math.h"
#include "wsss/pair_loops.h"

namespace wsss {
namespace contrastive {

#define WSSS_CPU_KERNELS "ops/contrastive/contrastive_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(unit)
WSSS_PICK(pack)
WSSS_PICK(supcon_forward)
WSSS_PICK(supcon_backward)
WSSS_PICK(infonce_forward)
WSSS_PICK(infonce_weights)
WSSS_PICK(infonce_products)
WSSS_PICK(finish)

constexpr int64_t kGroups = 32;  // shares of the rows' statistics; fixed, so that their sum is
constexpr int64_t kUnitGrain = 256;

// One side of the pairs: normalised rows and their norms.
template <class T>
struct Side {
  Side(const T* x, int64_t count, int64_t depth)
      : memory(pair_size(pair_padded(count), depth)), norm(count), rows{memory.data(), pair_padded(count)} {
    parallel_for(0, rows.rows, kUnitGrain,
                 [&](int64_t b, int64_t e) { unit(T{})(x, b, e, count, depth, rows, norm.data()); });
  }
  Buffer<T> memory, norm;
  PairRows<T> rows;
};

// Labels as numbers 0, 1, ... and how many anchors have each.
template <class T>
struct Classes {
  Classes(const int64_t* label, const std::vector<int64_t>& order)
      : id(pair_padded(int64_t(order.size()))), size(id.size()) {
    std::vector<int64_t> names(order.size());
    for (size_t i = 0; i < order.size(); ++i) names[i] = label[order[i]];
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    std::vector<int64_t> count(names.size());
    for (int64_t i = 0; i < id.size(); ++i) {
      id[i] = T(-1);
      size[i] = 0;
    }
    for (size_t i = 0; i < order.size(); ++i) {
      const auto k = std::lower_bound(names.begin(), names.end(), label[order[i]]) - names.begin();
      id[int64_t(i)] = T(k);
      ++count[size_t(k)];
    }
    for (size_t i = 0; i < order.size(); ++i) size[int64_t(i)] = count[size_t(id[int64_t(i)])];
  }
  Buffer<T> id;
  Buffer<int64_t> size;
};

static double scalar(const Tensor& t) {
  WSSS_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Double, "a float64 tensor of one element expected");
  return *t.const_data_ptr<double>();
}

template <class T>
static double value(const Tensor& t) {
  WSSS_CHECK(t.numel() == 1, "a tensor of one element expected");
  return double(*t.const_data_ptr<T>());
}

using Size = std::vector<int64_t>;

static std::vector<int64_t> all_of(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t(0));
  return order;
}

// What a call of the supervised loss works on: the rows that are not ignored, gathered where some are.
template <class T>
struct Anchors {
  Anchors(const Tensor& z, const Tensor& label, int64_t ignore_index) : input(torch::stable::contiguous(z)) {
    const Tensor names = torch::stable::contiguous(label);
    WSSS_CHECK(z.dim() == 2 && label.dim() == 1 && label.size(0) == z.size(0) &&
                   label.scalar_type() == ScalarType::Long && z.size(1) > 0,
               "supervised_contrastive_loss: z N×d and int64 labels N expected");
    depth = z.size(1);
    const int64_t* given = in<int64_t>(names);
    for (int64_t i = 0; i < z.size(0); ++i)
      if (given[i] != ignore_index) order.push_back(i);
    count = int64_t(order.size());
    classes.emplace_back(given, order);
    const T* x = in<T>(input);
    if (count < z.size(0)) {
      gathered = Buffer<T>(count * depth);
      for (int64_t i = 0; i < count; ++i) std::copy_n(x + order[size_t(i)] * depth, depth, gathered.data() + i * depth);
      x = gathered.data();
    }
    side.emplace_back(x, count, depth);
    for (int64_t i = 0; i < count; ++i) active += has_positive(i);
  }
  bool has_positive(int64_t i) const { return classes[0].size[i] > 1; }
  double positives(int64_t i) const { return double(classes[0].size[i] - 1); }
  Pairs<T> pairs(double temperature) const {
    return {side[0].rows, side[0].rows, classes[0].id.data(), count, depth, T(1. / temperature)};
  }

  Tensor input;
  std::vector<int64_t> order;
  int64_t count = 0, depth = 0, active = 0;
  std::vector<Classes<T>> classes;
  Buffer<T> gathered;
  std::vector<Side<T>> side;
};

template <class T>
static double supcon_loss(const Anchors<T>& anchors, double temperature, bool mean, Tensor& stats) {
  const int64_t n = anchors.count, block = pair_block(n), padded = pair_padded(n);
  Buffer<T> top(padded), total(padded), positive(padded);
  const Scores<T> scores{top.data(), total.data(), positive.data()};
  const auto kernel = supcon_forward(T{});
  parallel_for(0, padded / block, 1, [&](int64_t b, int64_t e) {
    Buffer<T> strips(anchors.depth * block), tile(kPairRows * block);
    for (int64_t i = b; i < e; ++i)
      kernel(anchors.pairs(temperature), i * block, block, scores, strips.data(), tile.data());
  });
  std::copy_n(top.data(), n, out<T>(stats));
  std::copy_n(total.data(), n, out<T>(stats) + n);
  double sum = 0.;
  for (int64_t i = 0; i < n; ++i)
    if (anchors.has_positive(i))
      sum += (double(top[i]) - double(positive[i]) / anchors.positives(i)) / temperature + std::log(double(total[i]));
  return mean ? sum / double(anchors.active) : sum;
}

static std::tuple<Tensor, Tensor> supcon_fwd(const Tensor& z, const Tensor& label, const Tensor& temperature, bool mean,
                                             int64_t ignore_index) {
  Tensor loss = new_empty(z, Size{}), stats = new_empty(z, Size{2, z.size(0)});
  for_float_type("supervised_contrastive_loss", z, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("supcon.cpu");
    std::fill_n(out<T>(stats), stats.numel(), T(0));
    const Anchors<T> anchors(z, label, ignore_index);
    *out<T>(loss) = anchors.active ? T(supcon_loss(anchors, scalar(temperature), mean, stats)) : T(0);
  });
  return {loss, stats};
}

template <class T>
static double supcon_gradient(const Anchors<T>& anchors, double temperature, double factor, const T* stats, T* dz) {
  const int64_t n = anchors.count, d = anchors.depth, block = pair_block(n), padded = pair_padded(n);
  Buffer<T> top(padded), softmax(padded), positive(padded), compact(n < anchors.input.size(0) ? n * d : 0);
  Buffer<double> along(n);
  for (int64_t i = 0; i < padded; ++i) {
    const bool used = i < n && anchors.has_positive(i);
    top[i] = i < n ? stats[i] : T(0);
    softmax[i] = used ? T(1. / double(stats[n + i])) : T(0);
    positive[i] = used ? T(1. / anchors.positives(i)) : T(0);
  }
  const Weights<T> weights{top.data(), softmax.data(), positive.data()};
  T* dx = compact.size() ? compact.data() : dz;
  const auto kernel = supcon_backward(T{});
  parallel_for(0, padded / block, 1, [&](int64_t b, int64_t e) {
    Buffer<T> strips(d * block), tile(kPairRows * block), sums(pair_size(block, d)), row(d);
    for (int64_t i = b; i < e; ++i)
      kernel(anchors.pairs(temperature), i * block, block, weights, factor, anchors.side[0].norm.data(), strips.data(),
             tile.data(), sums.data(), row.data(), dx, along.data());
  });
  if (compact.size())
    for (int64_t i = 0; i < n; ++i) std::copy_n(dx + i * d, d, dz + anchors.order[size_t(i)] * d);
  return std::accumulate(along.data(), along.data() + n, 0.);
}

static std::tuple<Tensor, Tensor> supcon_bwd(const Tensor& z, const Tensor& label, const Tensor& temperature,
                                             const Tensor& stats, const Tensor& grad, bool mean, int64_t ignore_index) {
  const double tau = scalar(temperature);
  Tensor dtau = new_empty(temperature, Size{}), dz = new_empty(z, Size{z.size(0), z.size(1)});
  *out<double>(dtau) = 0.;
  for_float_type("supervised_contrastive_loss", z, [&](auto tag) {
    using T = decltype(tag);
    std::fill_n(out<T>(dz), dz.numel(), T(0));
    const Anchors<T> anchors(z, label, ignore_index);
    if (!anchors.active) return;
    WSSS_CHECK(stats.numel() == 2 * z.size(0), "supcon_bwd: stats of the forward pass expected");
    const double factor = value<T>(grad) / tau / (mean ? double(anchors.active) : 1.);
    const Tensor saved = torch::stable::contiguous(stats);
    *out<double>(dtau) = -supcon_gradient(anchors, tau, factor, in<T>(saved), out<T>(dz)) / (2. * tau);
  });
  return {dz, dtau};
}

// Both sides of info_nce.
template <class T>
struct Batch {
  Batch(const Tensor& x, const Tensor& y, const Tensor& label)
      : count(x.size(0)),
        depth(x.size(1)),
        a(in<T>(torch::stable::contiguous(x)), count, depth),
        b(in<T>(torch::stable::contiguous(y)), count, depth),
        classes(in<int64_t>(torch::stable::contiguous(label)), all_of(count)) {}
  Pairs<T> pairs(double temperature) const {
    return {a.rows, b.rows, classes.id.data(), count, depth, T(1. / temperature)};
  }
  int64_t count, depth;
  Side<T> a, b;
  Classes<T> classes;
};

static void check_batch(const Tensor& x, const Tensor& y, const Tensor& label) {
  WSSS_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1) && x.size(1) > 0 &&
                 x.scalar_type() == y.scalar_type() && label.numel() == x.size(0) &&
                 label.scalar_type() == ScalarType::Long,
             "info_nce: x and y of one shape N×d and int64 labels N expected");
}

// stats: largest cosine and sum of exponentials per row of x, then per row of y.
template <class T>
static double infonce_loss(const Batch<T>& batch, double temperature, T* stats) {
  const int64_t n = batch.count, block = pair_block(n), padded = pair_padded(n), blocks = padded / block;
  const int64_t groups = std::min(kGroups, blocks);
  Buffer<T> top(padded), total(padded), positive(padded), row_top(groups * n), row_total(groups * n);
  const Scores<T> scores{top.data(), total.data(), positive.data()};
  const auto kernel = infonce_forward(T{});
  parallel_for(0, groups, 1, [&](int64_t b, int64_t e) {
    Buffer<T> strips(batch.depth * block), tile(kPairRows * block);
    for (int64_t g = b; g < e; ++g)
      kernel(batch.pairs(temperature), g * blocks / groups * block, (g + 1) * blocks / groups * block, scores,
             row_top.data() + g * n, row_total.data() + g * n, strips.data(), tile.data());
  });
  double sum = 0.;
  for (int64_t i = 0; i < n; ++i) {
    double largest = double(row_top[i]), merged = 0.;
    for (int64_t g = 1; g < groups; ++g) largest = std::max(largest, double(row_top[g * n + i]));
    for (int64_t g = 0; g < groups; ++g)
      merged += double(row_total[g * n + i]) * std::exp((double(row_top[g * n + i]) - largest) / temperature);
    stats[i] = top[i], stats[n + i] = total[i], stats[2 * n + i] = T(largest), stats[3 * n + i] = T(merged);
    const double mean_positive = double(positive[i]) / double(batch.classes.size[i]);
    sum += ((double(top[i]) - mean_positive) + (largest - mean_positive)) / temperature;
    sum += std::log(double(total[i])) + std::log(merged);
  }
  return sum / 2.;
}

static std::tuple<Tensor, Tensor> infonce_fwd(const Tensor& x, const Tensor& y, const Tensor& label,
                                              const Tensor& temperature, bool mean) {
  check_batch(x, y, label);
  Tensor loss = new_empty(x, Size{}), stats = new_empty(x, Size{4, x.size(0)});
  for_float_type("info_nce", x, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("info_nce.cpu");
    *out<T>(loss) = T(0);
    if (x.size(0) == 0) return;
    const double sum = infonce_loss(Batch<T>(x, y, label), scalar(temperature), out<T>(stats));
    *out<T>(loss) = T(mean ? sum / double(x.size(0)) : sum);
  });
  return {loss, stats};
}

// One pass over chunks of x: their weights against all of y are kept for the chunk, and serve both gradients.
template <class T>
static void infonce_gradients(const Batch<T>& batch, double temperature, const T* stats, const PairRows<T>& dx,
                              const PairRows<T>& dy) {
  const int64_t n = batch.count, d = batch.depth, padded = pair_padded(n);
  Buffer<T> a(3 * padded), b(3 * padded), strips(d * kPairColumns), weights((pair_round(n) + kPairStrip) * kPairLine);
  for (int64_t i = 0; i < padded; ++i) {
    const bool used = i < n;
    a[i] = used ? stats[i] : T(0), a[padded + i] = used ? T(1. / double(stats[n + i])) : T(0);
    b[i] = used ? stats[2 * n + i] : T(0), b[padded + i] = used ? T(1. / double(stats[3 * n + i])) : T(0);
    a[2 * padded + i] = b[2 * padded + i] = used ? T(1. / double(batch.classes.size[i])) : T(0);
  }
  const Weights<T> columns{a.data(), a.data() + padded, a.data() + 2 * padded};
  const Weights<T> rows{b.data(), b.data() + padded, b.data() + 2 * padded};
  const Pairs<T> pairs = batch.pairs(temperature);
  for (int64_t chunk = 0; chunk < n; chunk += kPairColumns) {
    const int64_t width = std::min(kPairColumns, n - chunk);
    parallel_for(0, ceil_div(width, kPairStrip), 1, [&](int64_t s, int64_t e) {
      pack(T{})(pairs.x.from(chunk + s * kPairStrip), (e - s) * kPairStrip, d, strips.data() + s * kPairStrip * d);
    });
    parallel_for(0, ceil_div(n, kPairRows), 1, [&](int64_t t, int64_t e) {
      for (int64_t j = t * kPairRows; j < std::min(n, e * kPairRows); j += kPairRows)
        infonce_weights(T{})(pairs, j, std::min(kPairRows, n - j), chunk, width, rows, columns, strips.data(),
                             weights.data() + j * kPairLine);
    });
    for_products(d, [&](int64_t feature, int64_t end, int64_t part, int64_t parts) {
      infonce_products(T{})(pairs, chunk, width, feature, end, part, parts, weights.data(), dx, dy);
    });
  }
}

static std::tuple<Tensor, Tensor, Tensor> infonce_bwd(const Tensor& x, const Tensor& y, const Tensor& label,
                                                      const Tensor& temperature, const Tensor& stats,
                                                      const Tensor& grad, bool mean) {
  check_batch(x, y, label);
  const int64_t n = x.size(0), d = x.size(1);
  const double tau = scalar(temperature);
  Tensor da = new_empty(x, Size{n, d}), db = new_empty(x, Size{n, d}), dtau = new_empty(temperature, Size{});
  *out<double>(dtau) = 0.;
  for_float_type("info_nce", x, [&](auto tag) {
    using T = decltype(tag);
    if (n == 0) return;
    WSSS_CHECK(stats.numel() == 4 * n, "infonce_bwd: stats of the forward pass expected");
    const Batch<T> batch(x, y, label);
    Buffer<T> sums(2 * pair_size(pair_padded(n), d));
    const PairRows<T> dx{sums.data(), pair_padded(n)}, dy{sums.data() + sums.size() / 2, pair_padded(n)};
    Buffer<double> along(n);
    infonce_gradients(batch, tau, in<T>(torch::stable::contiguous(stats)), dx, dy);
    const double factor = value<T>(grad) / (2. * tau) / (mean ? double(n) : 1.);
    parallel_for(0, n, kUnitGrain, [&](int64_t b, int64_t e) {
      finish(T{})(batch.a.rows, dx, b, e, d, factor, batch.a.norm.data(), out<T>(da), along.data());
      finish(T{})(batch.b.rows, dy, b, e, d, factor, batch.b.norm.data(), out<T>(db), nullptr);
    });
    *out<double>(dtau) = -std::accumulate(along.data(), along.data() + n, 0.) / tau;
  });
  return {da, db, dtau};
}

}  // namespace contrastive
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("supcon_fwd(Tensor z, Tensor label, Tensor temperature, bool mean, int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "supcon_bwd(Tensor z, Tensor label, Tensor temperature, Tensor stats, Tensor grad, bool mean, int ignore_index) "
      "-> (Tensor, Tensor)");
  m.def("infonce_fwd(Tensor x, Tensor y, Tensor label, Tensor temperature, bool mean) -> (Tensor, Tensor)");
  m.def(
      "infonce_bwd(Tensor x, Tensor y, Tensor label, Tensor temperature, Tensor stats, Tensor grad, bool mean) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("supcon_fwd", TORCH_BOX(&wsss::contrastive::supcon_fwd));
  m.impl("supcon_bwd", TORCH_BOX(&wsss::contrastive::supcon_bwd));
  m.impl("infonce_fwd", TORCH_BOX(&wsss::contrastive::infonce_fwd));
  m.impl("infonce_bwd", TORCH_BOX(&wsss::contrastive::infonce_bwd));
}
