// Wasserstein distance, similarity and loss: centring, threads, sums in a fixed order, registration.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "ops/wasserstein/wasserstein_math.h"
#include "wsss/pair_loops.h"

namespace wsss {
namespace wasserstein {

#define WSSS_CPU_KERNELS "ops/wasserstein/wasserstein_cpu.inc"
#include "wsss/cpu_kernels.h"

WSSS_PICK(add_rows)
WSSS_PICK(centred)
WSSS_PICK(unit)
WSSS_PICK(pack)
WSSS_PICK(pairwise)
WSSS_PICK(loss_forward)
WSSS_PICK(gradient_weights)
WSSS_PICK(gradient_products)
WSSS_PICK(column_sums)
WSSS_PICK(finish_gaussians)
WSSS_PICK(finish_semantic)

using Size = std::vector<int64_t>;
constexpr int64_t kGroups = 32;  // shares of the rows' statistics; fixed, so that their sum is
constexpr int64_t kGrain = 64;

// The tensors of one side. `sem` has no columns where only distances are wanted.
struct Side {
  Side(const Tensor& sem_, const Tensor& mu_, const Tensor& sigma_)
      : sem(torch::stable::contiguous(sem_)),
        mu(torch::stable::contiguous(mu_)),
        sigma(torch::stable::contiguous(sigma_)) {
    WSSS_CHECK(sem.dim() == 2 && mu.dim() == 2 && sigma.dim() == 2 && mu.size(0) == sigma.size(0) &&
                   mu.size(1) == sigma.size(1) && sem.size(0) == mu.size(0) && mu.size(1) > 0 &&
                   sem.scalar_type() == mu.scalar_type() && sigma.scalar_type() == mu.scalar_type(),
               "wasserstein: semantic rows N×D, mu and sigma N×d of one dtype expected");
  }
  int64_t count() const { return mu.size(0); }
  int64_t depth() const { return mu.size(1); }
  int64_t semantic_depth() const { return sem.size(1); }
  Tensor sem, mu, sigma;
};

// [mu, sigma] and semantic features of `count` rows in the layout of the kernels.
template <class T>
struct Features {
  Features(const Side& side, int64_t count)
      : gaussians(pair_size(count, 2 * side.depth())),
        semantics(pair_size(count, side.semantic_depth())),
        rows{gaussians.data(), count},
        semantic{semantics.data(), count} {}
  Buffer<T> gaussians, semantics;
  PairRows<T> rows, semantic;
};

// A side as the kernels read it.
template <class T>
struct Prepared {
  explicit Prepared(const Side& side)
      : count(side.count()), features(side, padded()), norm(padded()), length(padded()), unit_length(padded()) {}
  void fill(const Side& side, const T* centre, int64_t b, int64_t e) {
    centred(T{})(in<T>(side.mu), in<T>(side.sigma), b, e, count, side.depth(), centre, features.rows, norm.data());
    if (!side.semantic_depth()) return;
    unit(T{})(in<T>(side.sem), b, e, count, side.semantic_depth(), features.semantic, length.data());
    for (int64_t i = b; i < e; ++i) unit_length[i] = i < count && length[i] != T(0) ? T(1) : T(0);
  }
  int64_t padded() const { return pair_padded(count); }
  int64_t count;
  Features<T> features;
  Buffer<T> norm, length, unit_length;
};

// The mean of both sides' rows [mu, sigma].
template <class T>
static Buffer<T> centre_of(const Side& x, const Side& y) {
  const int64_t d = x.depth();
  Buffer<double> total(2 * d);
  Buffer<T> centre(2 * d);
  parallel_for(0, ceil_div(d, kGrain), 1, [&](int64_t b, int64_t e) {
    b *= kGrain, e = std::min(d, e * kGrain);
    for (int64_t c = 0; c < 2; ++c) {
      double* sums = total.data() + c * d;
      for (int64_t k = b; k < e; ++k) sums[k] = 0.;
      add_rows(T{})(in<T>(c ? x.sigma : x.mu), x.count(), d, b, e, sums);
      add_rows(T{})(in<T>(c ? y.sigma : y.mu), y.count(), d, b, e, sums);
      for (int64_t k = b; k < e; ++k)
        centre[c * d + k] = T(sums[k] / double(std::max<int64_t>(1, x.count() + y.count())));
    }
  });
  return centre;
}

template <class T>
struct Problem {
  Problem(const Side& a, const Side& b) : x(a), y(b) {
    const Buffer<T> centre = centre_of<T>(a, b);
    const int64_t strips = x.padded() / kPairStrip;
    parallel_for(0, strips + y.padded() / kPairStrip, 1, [&](int64_t from, int64_t to) {
      if (from < strips) x.fill(a, centre.data(), from * kPairStrip, std::min(strips, to) * kPairStrip);
      if (to > strips)
        y.fill(b, centre.data(), std::max<int64_t>(0, from - strips) * kPairStrip, (to - strips) * kPairStrip);
    });
    sides = {x.features.rows, y.features.rows, x.features.semantic,  y.features.semantic,
             x.norm.data(),   y.norm.data(),   x.unit_length.data(), y.unit_length.data(),
             x.count,         y.count,         2 * a.depth(),        a.semantic_depth()};
  }
  int64_t total_depth() const { return sides.depth + sides.semantic_depth; }
  Prepared<T> x, y;
  Sides<T> sides;
};

static void check_pair(const Side& x, const Side& y) {
  WSSS_CHECK(
      x.depth() == y.depth() && x.semantic_depth() == y.semantic_depth() && x.mu.scalar_type() == y.mu.scalar_type(),
      "wasserstein: both sides must have the same number of features and dtype");
}

template <class T>
static Constants<T> constants_of(const Tensor& t) {
  WSSS_CHECK(t.scalar_type() == ScalarType::Double && (t.numel() == 3 || t.numel() == 4),
             "wasserstein: constants a, b, lambda expected");
  const Tensor c = torch::stable::contiguous(t);
  const double* v = c.const_data_ptr<double>();
  return {T(v[0]), T(v[1]), T(v[2]), t.numel() == 4 ? T(1. / v[3]) : T(0)};
}

// `kept`, if it has cells, gets both products of all pairs.
static Tensor pairwise_matrix(const char* op, const Side& x, const Side& y, const Tensor* constants,
                              const Tensor& kept) {
  check_pair(x, y);
  Tensor result = new_empty(x.mu, Size{x.count(), y.count()});
  if (!result.numel()) return result;
  for_float_type(op, x.mu, [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> problem(x, y);
    const Constants<T> k = constants ? constants_of<T>(*constants) : Constants<T>{};
    const int64_t block = pair_block(y.count());
    parallel_for(0, ceil_div(y.count(), block), 1, [&](int64_t b, int64_t e) {
      Buffer<T> strips(problem.total_depth() * block), tiles(2 * kPairRows * block);
      for (int64_t i = b; i < e; ++i)
        pairwise(T{})(problem.sides, k, i * block, block, strips.data(), tiles.data(), out<T>(result), out<T>(kept));
    });
  });
  return result;
}

static Tensor nothing(const Tensor& like) { return new_empty(like, Size{like.size(0), 0}); }

static Tensor wasserstein_fwd(const Tensor& mu_x, const Tensor& sigma_x, const Tensor& mu_y, const Tensor& sigma_y) {
  WSSS_PATH("wasserstein.distance");
  return pairwise_matrix("wasserstein2", Side(nothing(mu_x), mu_x, sigma_x), Side(nothing(mu_y), mu_y, sigma_y),
                         nullptr, new_empty(mu_x, Size{0}));
}

// The products of all pairs are kept for the backward pass if the caller wants that: where they are smaller than the
// inputs.
static std::tuple<Tensor, Tensor> uncertainty_fwd(const Tensor& sem_x, const Tensor& mu_x, const Tensor& sigma_x,
                                                  const Tensor& sem_y, const Tensor& mu_y, const Tensor& sigma_y,
                                                  const Tensor& constants, bool keep) {
  WSSS_PATH("wasserstein.similarity");
  WSSS_CHECK(sem_x.dim() == 2 && sem_x.size(1) > 0, "uncertainty_similarity: semantic rows expected");
  const Side x(sem_x, mu_x, sigma_x), y(sem_y, mu_y, sigma_y);
  const Tensor kept = new_empty(mu_x, keep ? Size{2, x.count(), y.count()} : Size{0});
  return {pairwise_matrix("uncertainty_similarity", x, y, &constants, kept), kept};
}

// The gradient of one side, and the sums that it is made from: weighted sums of the other side's rows.
template <class T>
struct Gradient {
  Gradient(const Side& side, int64_t padded)
      : sem(new_empty(side.sem, Size{side.count(), side.semantic_depth()})),
        mu(new_empty(side.mu, Size{side.count(), side.depth()})),
        sigma(new_empty(side.mu, Size{side.count(), side.depth()})),
        sums(side, padded),
        weight(padded) {}
  // `prepared` rows [from, from + count) lie at `first` in the sums.
  void finish(const Prepared<T>& prepared, const Side& side, int64_t from, int64_t count, double factor) {
    const int64_t d = side.depth(), ds = side.semantic_depth();
    parallel_for(0, count, kGrain, [&](int64_t b, int64_t e) {
      finish_gaussians(T{})(prepared.features.rows.from(from), sums.rows, weight.data(), b, e, d, factor,
                            out<T>(mu) + from * d, out<T>(sigma) + from * d);
      if (ds)
        finish_semantic(T{})(prepared.features.semantic.from(from), sums.semantic, b, e, ds, factor,
                             prepared.length.data() + from, out<T>(sem) + from * ds);
    });
  }
  Tensor sem, mu, sigma;
  Features<T> sums;
  Buffer<double> weight;
};

// Statistics of the forward pass as the weights of the gradient; `positive` numbers the pairs.
template <class T>
struct Softmax {
  Softmax(const T* top_, const T* total_, int64_t count)
      : top(pair_padded(count)), inverse(top.size()), number(top.size()) {
    for (int64_t i = 0; i < top.size(); ++i) {
      top[i] = top_ && i < count ? top_[i] : T(0);
      inverse[i] = top_ && i < count ? T(1. / double(total_[i])) : T(0);
      number[i] = T(i);
    }
  }
  Weights<T> weights() const { return {top.data(), inverse.data(), number.data()}; }
  Buffer<T> top, inverse, number;
};

// One pass over chunks of columns: the weights of a chunk are kept while both sides' gradients read them. Returns the
// sums over all pairs that the gradients of a, b, lambda and the temperature need.
template <class T>
static std::vector<double> gradients(const Problem<T>& problem, const Constants<T>& k, Target target, const T* given,
                                     const T* kept, const Softmax<T>& rows, const Softmax<T>& columns, const Side& y,
                                     double factor, Gradient<T>& dx, Gradient<T>& dy) {
  const Sides<T>& s = problem.sides;
  const int64_t bands = ceil_div(s.rows, kPairRows);
  const int64_t weights = bands * kPairRows * kPairLine;
  const bool recompute = target != Target::kDistance && !kept;
  Buffer<T> strips(recompute ? problem.total_depth() * kPairColumns : 0), alpha(weights),
      beta(s.semantic_depth ? weights : 0);
  Buffer<double> scalars(4 * bands);
  std::fill_n(scalars.data(), scalars.size(), 0.);
  for (int64_t chunk = 0; chunk < s.columns; chunk += kPairColumns) {
    const int64_t width = std::min(kPairColumns, s.columns - chunk);
    parallel_for(0, recompute ? ceil_div(width, kPairStrip) : 0, 1, [&](int64_t b, int64_t e) {
      const int64_t first = b * kPairStrip, many = (e - b) * kPairStrip;
      pack(T{})(s.y.from(chunk + first), many, s.depth, strips.data() + first * s.depth);
      pack(T{})(s.sy.from(chunk + first), many, s.semantic_depth,
                strips.data() + s.depth * kPairColumns + first * s.semantic_depth);
    });
    parallel_for(0, bands, 1, [&](int64_t b, int64_t e) {
      for (; b < e; ++b) {
        const int64_t row = b * kPairRows, at = row * kPairLine;
        gradient_weights(T{})(s, k, target, row, std::min(kPairRows, s.rows - row), chunk, width, given, kept,
                              rows.weights(), columns.weights(), strips.data(), alpha.data() + at,
                              beta.data() + (beta.size() ? at : 0), dx.weight.data(), scalars.data() + 4 * b);
      }
    });
    for_products(s.depth, [&](int64_t feature, int64_t end, int64_t part, int64_t parts) {
      gradient_products(T{})(s, chunk, width, false, feature, end, part, parts, alpha.data(), dx.sums.rows,
                             dy.sums.rows);
    });
    for_products(s.semantic_depth, [&](int64_t feature, int64_t end, int64_t part, int64_t parts) {
      gradient_products(T{})(s, chunk, width, true, feature, end, part, parts, beta.data(), dx.sums.semantic,
                             dy.sums.semantic);
    });
    parallel_for(0, ceil_div(width, kPairStrip), 1, [&](int64_t b, int64_t e) {
      column_sums(T{})(alpha.data(), s.rows, b * kPairStrip, std::min(width, e * kPairStrip), dy.weight.data());
    });
    dy.finish(problem.y, y, chunk, width, factor);
  }
  std::vector<double> sums(4);
  for (int64_t b = 0; b < bands; ++b)
    for (int64_t i = 0; i < 4; ++i) sums[size_t(i)] += scalars[4 * b + i];
  return sums;
}

struct Gradients {
  Tensor sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y;
  std::vector<double> sums;
};

static void clear(const Tensor& t) {
  if (t.numel()) torch::stable::zero_(const_cast<Tensor&>(t));
}

// stats: largest score and sum of exponentials per row of x, then per row of y (loss only).
template <class T>
static Gradients backward(const Side& x, const Side& y, const Constants<T>& k, Target target, const T* given,
                          const T* stats, const T* kept, double factor) {
  const int64_t n = x.count(), m = y.count();
  Gradient<T> dx(x, pair_padded(n)), dy(y, kPairColumns);
  Gradients result{dx.sem, dx.mu, dx.sigma, dy.sem, dy.mu, dy.sigma, std::vector<double>(4)};
  if (n == 0 || m == 0) {
    for (const Tensor& t : {dx.sem, dx.mu, dx.sigma, dy.sem, dy.mu, dy.sigma}) clear(t);
    return result;
  }
  const Problem<T> problem(x, y);
  const Softmax<T> rows(stats, stats ? stats + n : nullptr, n),
      columns(stats ? stats + 2 * n : nullptr, stats ? stats + 3 * n : nullptr, m);
  result.sums = gradients(problem, k, target, given, kept, rows, columns, y, factor, dx, dy);
  dx.finish(problem.x, x, 0, n, factor);
  return result;
}

static void check_gradient(const Tensor& grad, const Side& x, const Side& y) {
  WSSS_CHECK(grad.dim() == 2 && grad.size(0) == x.count() && grad.size(1) == y.count() &&
                 grad.scalar_type() == x.mu.scalar_type(),
             "wasserstein: a gradient N×M of the inputs' dtype expected");
}

static void check_kept(const char* op, const Tensor& kept, const Side& x, const Side& y) {
  WSSS_CHECK(
      kept.numel() == 0 || (kept.numel() == 2 * x.count() * y.count() && kept.scalar_type() == x.mu.scalar_type()), op,
      ": the products of the forward pass expected");
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> wasserstein_bwd(const Tensor& mu_x, const Tensor& sigma_x,
                                                                  const Tensor& mu_y, const Tensor& sigma_y,
                                                                  const Tensor& grad) {
  const Side x(nothing(mu_x), mu_x, sigma_x), y(nothing(mu_y), mu_y, sigma_y);
  check_pair(x, y);
  check_gradient(grad, x, y);
  const Tensor given = torch::stable::contiguous(grad);
  Gradients g;
  for_float_type("wasserstein2", mu_x, [&](auto tag) {
    using T = decltype(tag);
    g = backward<T>(x, y, {}, Target::kDistance, in<T>(given), nullptr, nullptr, 1.);
  });
  return {g.mu_x, g.sigma_x, g.mu_y, g.sigma_y};
}

using SixAndConstants = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static SixAndConstants uncertainty_bwd(const Tensor& sem_x, const Tensor& mu_x, const Tensor& sigma_x,
                                       const Tensor& sem_y, const Tensor& mu_y, const Tensor& sigma_y,
                                       const Tensor& constants, const Tensor& kept, const Tensor& grad) {
  const Side x(sem_x, mu_x, sigma_x), y(sem_y, mu_y, sigma_y);
  check_pair(x, y);
  check_gradient(grad, x, y);
  check_kept("uncertainty_bwd", kept, x, y);
  const Tensor given = torch::stable::contiguous(grad), products = torch::stable::contiguous(kept);
  Tensor dk = new_empty(constants, Size{3});
  Gradients g;
  for_float_type("uncertainty_similarity", mu_x, [&](auto tag) {
    using T = decltype(tag);
    g = backward<T>(x, y, constants_of<T>(constants), Target::kSimilarity, in<T>(given), nullptr, in<T>(products), 1.);
  });
  std::copy_n(g.sums.data(), 3, out<double>(dk));
  return {g.sem_x, g.mu_x, g.sigma_x, g.sem_y, g.mu_y, g.sigma_y, dk};
}

// ½ Σ over both directions; `stats` as in backward.
template <class T>
static double loss_of(const Problem<T>& problem, const Constants<T>& k, double temperature, T* stats, T* kept) {
  const int64_t n = problem.sides.rows, block = pair_block(n), padded = pair_padded(n), blocks = padded / block;
  const int64_t groups = std::min(kGroups, blocks);
  Buffer<T> top(padded), total(padded), positive(padded), row_top(groups * n), row_total(groups * n), id(padded);
  for (int64_t i = 0; i < padded; ++i) id[i] = T(i);
  const Scores<T> columns{top.data(), total.data(), positive.data()};
  parallel_for(0, groups, 1, [&](int64_t b, int64_t e) {
    Buffer<T> strips(problem.total_depth() * block), tiles(2 * kPairRows * block);
    for (int64_t g = b; g < e; ++g)
      loss_forward(T{})(problem.sides, k, g * blocks / groups * block, (g + 1) * blocks / groups * block, id.data(),
                        columns, row_top.data() + g * n, row_total.data() + g * n, strips.data(), tiles.data(), kept);
  });
  double sum = 0.;
  for (int64_t i = 0; i < n; ++i) {
    double largest = double(row_top[i]), merged = 0.;
    for (int64_t g = 1; g < groups; ++g) largest = std::max(largest, double(row_top[g * n + i]));
    for (int64_t g = 0; g < groups; ++g)
      merged += double(row_total[g * n + i]) * std::exp((double(row_top[g * n + i]) - largest) / temperature);
    stats[i] = T(largest), stats[n + i] = T(merged), stats[2 * n + i] = top[i], stats[3 * n + i] = total[i];
    sum += ((double(top[i]) - double(positive[i])) + (largest - double(positive[i]))) / temperature;
    sum += std::log(double(total[i])) + std::log(merged);
  }
  return sum / 2.;
}

static double temperature_of(const Tensor& constants) {
  WSSS_CHECK(constants.numel() == 4 && constants.scalar_type() == ScalarType::Double,
             "uncertainty_info_nce: constants a, b, lambda, temperature expected");
  return torch::stable::contiguous(constants).const_data_ptr<double>()[3];
}

static void check_square(const Side& x, const Side& y) {
  check_pair(x, y);
  WSSS_CHECK(x.count() == y.count() && x.semantic_depth() > 0,
             "uncertainty_info_nce: as many rows of x as of y expected");
}

static std::tuple<Tensor, Tensor, Tensor> uncertainty_infonce_fwd(const Tensor& sem_x, const Tensor& mu_x,
                                                                  const Tensor& sigma_x, const Tensor& sem_y,
                                                                  const Tensor& mu_y, const Tensor& sigma_y,
                                                                  const Tensor& constants, bool keep) {
  const Side x(sem_x, mu_x, sigma_x), y(sem_y, mu_y, sigma_y);
  check_square(x, y);
  const double temperature = temperature_of(constants);
  Tensor loss = new_empty(mu_x, Size{}), stats = new_empty(mu_x, Size{4, x.count()});
  Tensor kept = new_empty(mu_x, keep ? Size{2, x.count(), x.count()} : Size{0});
  for_float_type("uncertainty_info_nce", mu_x, [&](auto tag) {
    using T = decltype(tag);
    WSSS_PATH("wasserstein.loss");
    *out<T>(loss) = T(0);
    if (x.count() == 0) return;
    const double sum = loss_of(Problem<T>(x, y), constants_of<T>(constants), temperature, out<T>(stats), out<T>(kept));
    *out<T>(loss) = T(sum / double(x.count()));
  });
  return {loss, stats, kept};
}

static SixAndConstants uncertainty_infonce_bwd(const Tensor& sem_x, const Tensor& mu_x, const Tensor& sigma_x,
                                               const Tensor& sem_y, const Tensor& mu_y, const Tensor& sigma_y,
                                               const Tensor& constants, const Tensor& stats, const Tensor& kept,
                                               const Tensor& grad) {
  const Side x(sem_x, mu_x, sigma_x), y(sem_y, mu_y, sigma_y);
  check_square(x, y);
  WSSS_CHECK(stats.numel() == 4 * x.count() && stats.scalar_type() == mu_x.scalar_type() && grad.numel() == 1,
             "uncertainty_infonce_bwd: stats of the forward pass and a gradient of one element expected");
  const double temperature = temperature_of(constants);
  check_kept("uncertainty_infonce_bwd", kept, x, y);
  const Tensor saved = torch::stable::contiguous(stats), products = torch::stable::contiguous(kept);
  Tensor dk = new_empty(constants, Size{4});
  Gradients g;
  for_float_type("uncertainty_info_nce", mu_x, [&](auto tag) {
    using T = decltype(tag);
    const double factor =
        double(*grad.const_data_ptr<T>()) / (2. * temperature * double(std::max<int64_t>(1, x.count())));
    g = backward<T>(x, y, constants_of<T>(constants), Target::kLoss, nullptr, in<T>(saved), in<T>(products), factor);
    for (int64_t i = 0; i < 4; ++i) out<double>(dk)[i] = factor * g.sums[size_t(i)] * (i == 3 ? -1. / temperature : 1.);
  });
  return {g.sem_x, g.mu_x, g.sigma_x, g.sem_y, g.mu_y, g.sigma_y, dk};
}

}  // namespace wasserstein
}  // namespace wsss

#define WSSS_ARGUMENTS \
  "(Tensor sem_x, Tensor mu_x, Tensor sigma_x, Tensor sem_y, Tensor mu_y, Tensor sigma_y, Tensor constants"

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("wasserstein_fwd(Tensor mu_x, Tensor sigma_x, Tensor mu_y, Tensor sigma_y) -> Tensor");
  m.def(
      "wasserstein_bwd(Tensor mu_x, Tensor sigma_x, Tensor mu_y, Tensor sigma_y, Tensor grad) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("uncertainty_fwd" WSSS_ARGUMENTS ", bool keep) -> (Tensor, Tensor)");
  m.def("uncertainty_bwd" WSSS_ARGUMENTS
        ", Tensor kept, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("uncertainty_infonce_fwd" WSSS_ARGUMENTS ", bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("uncertainty_infonce_bwd" WSSS_ARGUMENTS
        ", Tensor stats, Tensor kept, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("wasserstein_fwd", TORCH_BOX(&wsss::wasserstein::wasserstein_fwd));
  m.impl("wasserstein_bwd", TORCH_BOX(&wsss::wasserstein::wasserstein_bwd));
  m.impl("uncertainty_fwd", TORCH_BOX(&wsss::wasserstein::uncertainty_fwd));
  m.impl("uncertainty_bwd", TORCH_BOX(&wsss::wasserstein::uncertainty_bwd));
  m.impl("uncertainty_infonce_fwd", TORCH_BOX(&wsss::wasserstein::uncertainty_infonce_fwd));
  m.impl("uncertainty_infonce_bwd", TORCH_BOX(&wsss::wasserstein::uncertainty_infonce_bwd));
}
