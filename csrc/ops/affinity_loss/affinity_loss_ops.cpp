// The affinity loss: labels, threads, sums in a fixed order, registration.
#include "ops/affinity_loss/affinity_loss_math.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "wsss/pair_loops.h"

namespace wsss {
namespace affinity_loss {

#define WSSS_CPU_KERNELS "ops/affinity_loss/affinity_loss_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(cell_rows)
WSSS_PICK(cell_columns)
WSSS_PICK(pack)
WSSS_PICK(band_losses)
WSSS_PICK(chunk_gradient)

// A call's tensors, contiguous, what it asks for, and its labels as numbers 0, 1, ... (-1: void).
struct Call {
  Call(const Tensor& feature_, const Tensor& label_, const std::string& kind_, int64_t radius_, int64_t ignore_index)
      : feature(dense(feature_)), kind(kind_ == "bce" ? Kind::kBce : Kind::kBalanced), radius(radius_) {
    WSSS_CHECK(feature.dim() == 4 && label_.dim() == 3 && label_.scalar_type() == ScalarType::Long &&
                   feature.size(0) == label_.size(0) && feature.size(2) == label_.size(1) &&
                   feature.size(3) == label_.size(2) && feature.size(1) > 0,
               "affinity_loss: feature B×d×h×w and int64 label B×h×w expected");
    const Tensor label = dense(label_);
    const int64_t* given = in<int64_t>(label);
    std::vector<int64_t> names(given, given + label.numel());
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    id.resize(size_t(label.numel()));
    for (size_t i = 0; i < id.size(); ++i)
      id[i] = given[i] == ignore_index
                  ? -1
                  : int32_t(std::lower_bound(names.begin(), names.end(), given[i]) - names.begin());
    classes = int64_t(names.size());
  }
  int64_t images() const { return feature.size(0); }
  int64_t depth() const { return feature.size(1); }
  int64_t height() const { return feature.size(2); }
  int64_t width() const { return feature.size(3); }
  int64_t cells() const { return height() * width(); }
  Tensor feature;
  Kind kind;
  int64_t radius, classes;
  std::vector<int32_t> id;
};

struct Counts {
  int64_t positive = 0, pairs = 0;
  double negative() const { return double(pairs - positive); }
};

// Ordered pairs of one image without a limit: squares of the numbers of cells of each label.
static Counts count_all(const int32_t* id, int64_t cells, int64_t classes) {
  std::vector<int64_t> size(size_t(classes), 0);
  for (int64_t i = 0; i < cells; ++i)
    if (id[i] >= 0) ++size[size_t(id[i])];
  Counts counts;
  int64_t used = 0;
  for (const int64_t n : size) counts.positive += n * n, used += n;
  counts.pairs = used * used;
  return counts;
}

// Pairs of one row of cells with those in reach.
static Counts count_row(const int32_t* id, int64_t height, int64_t width, int64_t y, int64_t radius) {
  Counts counts;
  for (int64_t x = 0; x < width; ++x) {
    const int32_t own = id[y * width + x];
    if (own < 0) continue;
    const int64_t first = std::max<int64_t>(0, x - radius), end = std::min(width, x + radius + 1);
    for (int64_t v = std::max<int64_t>(0, y - radius); v < std::min(height, y + radius + 1); ++v) {
      int32_t same = 0, used = 0;
      for (const int32_t *p = id + v * width + first, *stop = id + v * width + end; p < stop; ++p)
        same += *p == own, used += *p >= 0;
      counts.positive += same, counts.pairs += used;
    }
  }
  return counts;
}

static Counts count_pairs(const Call& call) {
  Counts total;
  std::vector<Counts> rows(size_t(call.height()));
  for (int64_t b = 0; b < call.images(); ++b) {
    const int32_t* id = call.id.data() + b * call.cells();
    if (call.radius < 0) {
      rows.assign(1, count_all(id, call.cells(), call.classes));
    } else {
      parallel_for(0, call.height(), 1, [&](int64_t y, int64_t e) {
        for (; y < e; ++y) rows[size_t(y)] = count_row(id, call.height(), call.width(), y, call.radius);
      });
    }
    for (const Counts& row : rows) total.positive += row.positive, total.pairs += row.pairs;
  }
  return total;
}

// One image in the layout of the kernels.
template <class T>
struct Image {
  Image(const Call& call, int64_t b)
      : count(call.cells()),
        depth(call.depth()),
        width(call.width()),
        radius(call.radius),
        memory(pair_size(pair_padded(count), depth)),
        id(pair_padded(count)),
        y(id.size()),
        x(id.size()),
        rows{memory.data(), pair_padded(count)} {
    const T* feature = in<T>(call.feature) + b * depth * count;
    parallel_for(0, pair_padded(count) / kPairStrip, 1, [&](int64_t s, int64_t e) {
      cell_rows(T{})(feature, count, depth, s * kPairStrip, e * kPairStrip, rows);
    });
    for (int64_t i = 0; i < id.size(); ++i) {
      id[i] = i < count ? T(call.id[size_t(b * count + i)]) : T(-1);
      y[i] = T(i / width), x[i] = T(i % width);
    }
  }
  Cells<T> cells() const { return {rows, id.data(), y.data(), x.data(), count, depth, T(radius)}; }
  // The rows behind the last one that may be in reach of a column before `end`.
  int64_t stop(int64_t end) const {
    return radius < 0 ? count : std::min(count, ((end - 1) / width + radius + 1) * width);
  }
  int64_t count, depth, width, radius;
  Buffer<T> memory, id, y, x;
  PairRows<T> rows;
};

// Adds the losses of positive and of negative pairs to sums[2]. Pairs are symmetric: a chunk of columns meets the rows
// from its own on. With weights[2] also the gradient, whose chunks of weights are kept while both of their cells read
// them.
template <class T>
static void add_image(const Image<T>& image, Kind kind, const T* weights, double* sums, T* gradient) {
  const int64_t n = image.count, d = image.depth, bands = ceil_div(n, kPairRows);
  const Cells<T> cells = image.cells();
  Buffer<T> strips(d * kPairColumns), kept(weights ? n * kPairLine : 0), added(weights ? pair_size(n, d) : 0);
  Buffer<double> parts(2 * bands);
  std::fill_n(added.data(), added.size(), T(0));
  const PairRows<T> rows{added.data(), n};
  for (int64_t chunk = 0; chunk < n; chunk += kPairColumns) {
    const int64_t width = std::min(kPairColumns, n - chunk), stop = image.stop(chunk + width);
    parallel_for(0, ceil_div(width, kPairStrip), 1, [&](int64_t s, int64_t e) {
      pack(T{})(cells.rows.from(chunk + s * kPairStrip), (e - s) * kPairStrip, d, strips.data() + s * kPairStrip * d);
    });
    parallel_for(chunk / kPairRows, ceil_div(stop, kPairRows), 1, [&](int64_t b, int64_t e) {
      Buffer<T> tile(weights ? 0 : kPairRows * kPairLine);
      for (; b < e; ++b) {
        const int64_t row = b * kPairRows;
        band_losses(T{})(cells, kind, row, std::min(kPairRows, stop - row), chunk, width, weights, strips.data(),
                         weights ? kept.data() + (row - chunk) * kPairLine : tile.data(), parts.data() + 2 * b);
      }
    });
    for (int64_t b = chunk / kPairRows; b < ceil_div(stop, kPairRows); ++b)
      for (int64_t i = 0; i < 2; ++i) sums[i] += (b * kPairRows < chunk + width ? 1. : 2.) * parts[2 * b + i];
    if (!weights) continue;
    for_products(d, [&](int64_t feature, int64_t end, int64_t part, int64_t of) {
      chunk_gradient(T{})(cells, chunk, width, stop, feature, end, part, of, kept.data(), rows);
    });
  }
  parallel_for(0, weights ? ceil_div(n, kPairStrip) : 0, 1,
               [&](int64_t s, int64_t e) { cell_columns(T{})(rows, n, d, s * kPairStrip, e * kPairStrip, gradient); });
}

// The loss, and with `differentiate` its gradient, which costs less beside the loss than in a pass of its own.
static std::tuple<Tensor, Tensor> fwd(const Tensor& feature, const Tensor& label, std::string kind, int64_t radius,
                                      int64_t ignore_index, bool differentiate) {
  const Call call(feature, label, kind, radius, ignore_index);
  Tensor loss = new_empty(feature, std::vector<int64_t>{});
  Tensor gradient = new_empty(feature, differentiate ? sizes_of(feature) : std::vector<int64_t>{0});
  for_float_type("affinity_loss", feature, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("affinity_loss.cpu");
    const bool bce = call.kind == Kind::kBce;
    const Counts counts = count_pairs(call);
    const double positive = bce ? std::max(1., double(counts.pairs)) : 2. * (double(counts.positive) + 1.);
    const double negative = bce ? positive : 2. * (counts.negative() + 1.);
    // An inner product belongs to both of its cells, and every pair counts in both orders.
    const T weights[2] = {T(2. / positive), T(2. / negative)};
    double sums[2] = {};
    for (int64_t b = 0; b < call.images(); ++b)
      add_image(Image<T>(call, b), call.kind, differentiate ? weights : nullptr, sums,
                differentiate ? out<T>(gradient) + b * call.depth() * call.cells() : nullptr);
    *out<T>(loss) = T(sums[0] / positive + sums[1] / negative);
  });
  return {loss, gradient};
}

}  // namespace affinity_loss
}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "affinity_loss_fwd(Tensor feature, Tensor label, str kind, int radius, int ignore_index, bool differentiate) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("affinity_loss_fwd", TORCH_BOX(&wsss::affinity_loss::fwd)); }
