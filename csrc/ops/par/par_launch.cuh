// Launches of the kernels of pixel-adaptive refinement; torch-free.
#pragma once
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "ops/par/par_tiles.cuh"
#include "wsss/path.h"

namespace wsss::par {

enum class Path { general, exact, stored, adjoint };

struct Size {
  int height, width, channels;
};

struct Options {
  std::vector<int64_t> dilations;
  int64_t iterations;
  bool pamr;
  double w1, w2, w3;
};

constexpr size_t kAdjointSharedBytes = 4 * Exact::floats * sizeof(float), kExactSharedBytes = kAdjointSharedBytes / 2;
constexpr size_t kStoredSharedBytes = 2 * Stored::floats * sizeof(float);
constexpr size_t kPrepareSharedBytes = 2 * Prepare::floats * sizeof(float);
constexpr double kStoredBytesPerPixel = 4 * (kNeighbours / 2 + 1);

inline int64_t padded_pixels(Size s) { return int64_t(s.height + 2 * kHalo) * (s.width + 2 * kHalo); }

inline bool is_released(const Options& o) {
  for (size_t i = 0; i < o.dilations.size(); ++i)
    if (i >= 6 || o.dilations[i] != released_dilation(int(i))) return false;
  return o.dilations.size() == 6;
}

// Position weights in double: softmax_k(−((d_k / (σ_d + 1e-8)) / w2)²), straight and diagonal, per dilation.
inline std::vector<double> position_weights(const Options& o) {
  std::vector<double> distance;
  for (const int64_t d : o.dilations)
    for (int k = 0; k < 8; ++k) distance.push_back(double(d) * (is_diagonal(k) ? std::sqrt(2.) : 1.));
  double mean = 0, squares = 0, largest = -INFINITY, sum = 0;
  for (const double d : distance) mean += d / double(distance.size());
  for (const double d : distance) squares += (d - mean) * (d - mean);
  const double scale = 1 / ((std::sqrt(squares / double(distance.size() - 1)) + 1e-8) * o.w2);
  for (double& d : distance) largest = std::max(largest, d = -(d * scale) * (d * scale));
  for (double& d : distance) sum += d = std::exp(d - largest);
  for (double& d : distance) d *= o.pamr ? 0. : o.w3 / sum;
  return distance;
}

template <class A>
Stencil<A> make_stencil(const Options& o, Size size) {
  const double log2_e = 1.4426950408889634;
  Stencil<A> s{};
  s.height = size.height;
  s.width = size.width;
  s.channels = size.channels;
  s.count = int(o.dilations.size());
  s.pamr = o.pamr;
  s.factor = A(o.pamr ? log2_e / size.channels : std::sqrt(log2_e / size.channels) / o.w1);
  const std::vector<double> position = position_weights(o);
  for (size_t i = 0; i < o.dilations.size(); ++i) {
    // Farther than the map is as far as its border; so coordinates cannot overflow.
    s.dilation[i] = int(std::min<int64_t>(o.dilations[i], std::max(size.height, size.width)));
    s.diagonal[i] = A(position[8 * i]);
    s.straight[i] = A(position[8 * i + 1]);
  }
  return s;
}

// planes: the buffers that pass through the tiles.
template <class A>
TileStencil tile_stencil(const Stencil<A>& s, std::initializer_list<const void*> planes) {
  TileStencil t{s.height, s.width, s.channels, s.width % 4 == 0, float(s.factor), {}, {}};
  for (const void* p : planes) t.vectors = t.vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (t.vectors && s.width >= kTile + kPitch - kHalo) WSSS_PATH("par.cuda.tiles.vectors");
  for (int i = 0; i < 6; ++i) {
    t.straight[i] = float(s.straight[i]);
    t.diagonal[i] = float(s.diagonal[i]);
  }
  return t;
}

inline unsigned parts(int64_t n, int64_t size) { return unsigned((n + size - 1) / size); }

template <class From, class To>
void convert_planes(View<const From> from, View<To> to, Size s, int planes, int images, cudaStream_t stream) {
  for (int first = 0; first < planes; first += 65535) {
    const dim3 grid(parts(int64_t(s.height) * s.width, 256), unsigned(std::min(planes - first, 65535)),
                    unsigned(images));
    launch(convert<From, To>, grid, dim3(256), 0, stream,
           View<const From>{from.at + first * from.plane, from.row, from.plane, from.image},
           View<To>{to.at + first * to.plane, to.row, to.plane, to.image}, s.height, s.width);
  }
}

template <class A>
void prepare_images(Path path, const Stencil<A>& s, const Options& o, const A* image, A* stats, int images,
                    cudaStream_t stream) {
  if constexpr (std::is_same<A, float>::value) {
    if (path != Path::general) {
      const unsigned across = parts(s.width, kTile);
      const dim3 grid(across * parts(s.height, Prepare::rows), 1, unsigned(images));
      const auto kernel = path == Path::stored ? (o.pamr ? prepare<true, true> : prepare<false, true>)
                                               : (o.pamr ? prepare<true, false> : prepare<false, false>);
      return launch(kernel, grid, dim3(Prepare::threads), kPrepareSharedBytes, stream, image, stats,
                    tile_stencil(s, {image}), int(across));
    }
  }
  (void)o;
  launch(statistics<A>, dim3(parts(int64_t(s.height) * s.width, 128), unsigned(images)), dim3(128), 0, stream, image,
         stats, s);
}

// One iteration over a block of classes of some images.
template <class A>
struct Step {
  Path path;
  bool transposed;
  const Stencil<A>* stencil;
  const Options& options;
  const A *image, *stats;
  int images, classes;
  cudaStream_t stream;

  void run(View<const A> from, View<A> to) const {
    if constexpr (std::is_same<A, float>::value)
      if (path != Path::general) return run_tiles(from, to);
    const dim3 grid(parts(int64_t(stencil->height) * stencil->width, 128), parts(classes, kClassesPerThread),
                    unsigned(images));
    launch(transposed ? step<A, true> : step<A, false>, grid, dim3(128), 0, stream, image, stats, from, to, *stencil,
           classes);
  }

 private:
  void run_tiles(View<const float> from, View<float> to) const {
    const int extra = path == Path::adjoint ? 2 * kHalo : 0;
    const unsigned across = parts(stencil->width + extra, kTile),
                   tiles = across * parts(stencil->height + extra, path == Path::stored ? Stored::rows : Exact::rows);
    // Where the tiles do not fill the GPU, blocks share the classes of a tile.
    const int64_t wanted =
        std::min<int64_t>(classes, std::max<int64_t>(1, multiprocessors() / (int64_t(tiles) * images)));
    const dim3 grid(tiles, parts(classes, parts(classes, wanted)), unsigned(images));
    const TileStencil s = tile_stencil(*stencil, {image, stats, from.at});
    const int columns = int(across);
    if (path == Path::stored)
      return launch(step_stored, grid, dim3(Stored::threads), kStoredSharedBytes, stream, stats, from, to, s, columns,
                    classes);
    if (path == Path::exact)
      return launch(options.pamr ? step_exact<true> : step_exact<false>, grid, dim3(Exact::threads), kExactSharedBytes,
                    stream, image, stats, from, to, s, columns, classes);
    launch(options.pamr ? step_adjoint<true> : step_adjoint<false>, grid, dim3(Exact::threads), kAdjointSharedBytes,
           stream, image, stats, from, to, s, columns, classes);
    const int64_t border = border_pixels(s.height, s.width);
    launch(fold_border, dim3(parts(border * kWarpSize, 256), unsigned(classes), unsigned(images)), dim3(256), 0, stream,
           to, s.height, s.width);
  }
};

}  // namespace wsss::par
