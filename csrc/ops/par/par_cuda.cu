// Pixel-adaptive refinement for CUDA tensors: which kernels run, on how many images and classes at a time.
#include "ops/par/par_launch.cuh"

#include "wsss/cuda_tensor.h"

namespace wsss::par {
namespace {

// Of a call: the options of the operator and the sizes.
struct Call {
  Options options;
  bool adjoint, exact;
  int64_t batch, channels, classes, height, width;
  int64_t pixels() const { return height * width; }
};

// What is left of the memory promise, 110 float16 planes an image (60 for exact=False), after fixed bytes a pixel.
int64_t classes_in_flight(const Call& call, double fixed_per_pixel, int64_t fixed_pixels, double per_class) {
  const double promise = (call.exact ? 220. : 120.) * double(call.pixels()),
               fixed = fixed_per_pixel * double(fixed_pixels);
  const double classes = std::floor((promise - fixed) / per_class);
  return std::min<int64_t>({call.classes, 65535, classes < 1 ? 1 : int64_t(classes)});
}

template <class A>
class Workspace {
 public:
  Workspace(const Tensor& like, std::vector<int64_t> size)
      : tensor_(new_empty(like, std::move(size), sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float)) {}
  A* data() const { return tensor_.numel() ? static_cast<A*>(tensor_.mutable_data_ptr()) : nullptr; }

 private:
  Tensor tensor_;
};

template <class T>
class Refinement {
 public:
  using A = accumulator_t<T>;
  static constexpr bool kHalf = !std::is_same<T, A>::value;

  Refinement(const Call& call, const Tensor& image, const Tensor& mask, const Tensor& result, cudaStream_t stream)
      : call_(call),
        image_(image),
        mask_(mask),
        result_(result),
        stream_(stream),
        stencil_(make_stencil<A>(call.options, size())) {}

  void run() {
    choose_path();
    const int64_t tiles = (call_.height + kTile - 1) / kTile * ((call_.width + kTile - 1) / kTile);
    // Enough images at a time to fill the GPU twice, and no more, so that what an iteration rereads stays in its cache.
    const int64_t together =
        std::min<int64_t>({call_.batch, std::max<int64_t>(1, 2 * multiprocessors() / tiles), 65535});
    for (int64_t b = 0; b < call_.batch; b += together) refine_images(b, std::min(together, call_.batch - b));
  }

 private:
  Size size() const { return {int(call_.height), int(call_.width), int(call_.channels)}; }

  void choose_path() {
    path_ = Path::general;
    const double planes_in_float = kHalf || call_.adjoint ? 2 : 1;
    double statistics = sizeof(A) * double(call_.channels + 2 + (kHalf ? call_.channels : 0));
    int64_t plane = call_.pixels();
    if constexpr (std::is_same<A, float>::value) {
      const bool tiles =
          is_released(call_.options) && max_shared_bytes() >= (call_.adjoint ? kAdjointSharedBytes : kExactSharedBytes);
      if (tiles && call_.adjoint) path_ = Path::adjoint, plane = padded_pixels(size());
      if (tiles && !call_.adjoint) path_ = Path::exact;
      // Stored weights pay where one block of classes shares them; a position weight beyond these bounds has no
      // float16.
      const bool storable = call_.options.w3 >= 0 && call_.options.w3 <= 100;
      if (path_ == Path::exact && (kHalf || !call_.exact) && storable &&
          classes_in_flight(call_, kStoredBytesPerPixel, plane, 4 * planes_in_float * double(plane)) == call_.classes)
        path_ = Path::stored, statistics = kStoredBytesPerPixel;
    }
    block_ = classes_in_flight(call_, statistics, call_.pixels(), sizeof(A) * planes_in_float * double(plane));
    switch (path_) {
      case Path::general: call_.adjoint ? report_general_adjoint() : report_general(); break;
      case Path::exact: WSSS_PATH("par.cuda.tiles"); break;
      case Path::stored: WSSS_PATH("par.cuda.tiles.half_weights"); break;
      case Path::adjoint: WSSS_PATH("par.cuda.tiles.adjoint"); break;
    }
  }
  static void report_general() { WSSS_PATH("par.cuda.general"); }
  static void report_general_adjoint() { WSSS_PATH("par.cuda.general.adjoint"); }

  void refine_images(int64_t first, int64_t images) {
    const int64_t planes = path_ == Path::stored ? kNeighbours / 2 + 1 : call_.channels + 2;
    const Workspace<A> stats(image_, {images, planes, call_.height, call_.width});
    const bool keeps_image = path_ != Path::stored;
    const Workspace<A> wide(image_, {kHalf && keeps_image ? images : 0, call_.channels, call_.height, call_.width});
    const A* image = wide.data();
    {
      const Workspace<A> early(image_, {kHalf && !keeps_image ? images : 0, call_.channels, call_.height, call_.width});
      image = as_accumulator(image_, first, images, keeps_image ? wide.data() : early.data());
      prepare_images<A>(path_, stencil_, call_.options, image, stats.data(), int(images), stream_);
    }
    const bool padded = path_ == Path::adjoint;
    const int64_t plane = padded ? padded_pixels(size()) : call_.pixels(), row = call_.width + (padded ? 2 * kHalo : 0);
    const bool two = kHalf || call_.adjoint;
    const Workspace<A> ping(image_, {images, block_, plane}), pong(image_, {two ? images : 0, block_, plane});
    const int64_t origin = padded ? kHalo * row + kHalo : 0;
    const auto scratch = [&](const Workspace<A>& w) {
      return View<A>{w.data() + origin, int(row), plane, block_ * plane};
    };
    for (int64_t c = 0; c < call_.classes; c += block_) {
      const int classes = int(std::min(block_, call_.classes - c));
      const Step<A> step{path_,        call_.adjoint, &stencil_, call_.options, image,
                         stats.data(), int(images),   classes,   stream_};
      iterate(step, planes_of<const T>(mask_, first, c), planes_of<T>(result_, first, c), scratch(ping),
              two ? scratch(pong) : View<A>{});
    }
  }

  // The image in the type of the sums; for half types a converted copy in `wide`.
  const A* as_accumulator(const Tensor& tensor, int64_t first, int64_t images, A* wide) {
    const View<const T> from{in<T>(tensor) + first * call_.channels * call_.pixels(), int(call_.width), call_.pixels(),
                             call_.channels * call_.pixels()};
    if constexpr (!kHalf) return from.at;
    convert_planes(from, View<A>{wide, from.row, from.plane, from.image}, size(), int(call_.channels), int(images),
                   stream_);
    return wide;
  }

  template <class U>
  View<U> planes_of(const Tensor& tensor, int64_t first, int64_t c) const {
    U* at = static_cast<U*>(tensor.mutable_data_ptr()) + (first * call_.classes + c) * call_.pixels();
    return {at, int(call_.width), call_.pixels(), call_.classes * call_.pixels()};
  }

  void iterate(const Step<A>& step, View<const T> mask, View<T> result, View<A> ping, View<A> pong) {
    const auto constant = [](const View<A>& v) { return View<const A>{v.at, v.row, v.plane, v.image}; };
    const auto convert = [&](auto from, auto to) {
      convert_planes(from, to, size(), step.classes, step.images, stream_);
    };
    const int iterations = int(call_.options.iterations);
    if constexpr (!kHalf) {
      if (!call_.adjoint) {  // float forward: the result is one of the two buffers, and the last to be written
        View<const A> from = mask;
        for (int t = iterations; t > 0; --t) {
          const View<A> to = t % 2 ? result : ping;
          step.run(from, to);
          from = constant(to);
        }
        return;
      }
    }
    View<A> from = pong;
    View<const A> first = constant(pong);
    if constexpr (kHalf)
      convert(mask, pong);
    else
      first = mask;
    for (int t = 0; t < iterations; ++t) {
      const View<A> to = t % 2 ? pong : ping;
      step.run(t ? constant(from) : first, to);
      from = to;
    }
    convert(constant(from), result);
  }

  const Call call_;
  const Tensor &image_, &mask_, &result_;
  const cudaStream_t stream_;
  const Stencil<A> stencil_;
  Path path_ = Path::general;
  int64_t block_ = 1;
};

Tensor refine(const Tensor& image, const Tensor& mask, const std::vector<int64_t>& dilations, int64_t num_iter,
              bool pamr, double w1, double w2, double w3, bool exact, bool adjoint) {
  WSSS_CHECK(image.dim() == 4 && mask.dim() == 4 && image.size(0) == mask.size(0) && image.size(2) == mask.size(2) &&
                 image.size(3) == mask.size(3) && image.size(1) > 0,
             "par: image B×Q×H×W and mask B×C×H×W expected");
  WSSS_CHECK(image.scalar_type() == mask.scalar_type(), "par: image and mask must have one dtype");
  WSSS_CHECK(!dilations.empty() && dilations.size() <= size_t(kMaxDilations), "par: 1 to ", kMaxDilations,
             " dilations expected, got ", dilations.size());
  for (const int64_t d : dilations) WSSS_CHECK(d >= 1, "par: every dilation must be at least 1, got ", d);
  WSSS_CHECK(num_iter >= 0 && num_iter < (int64_t(1) << 31), "par: num_iter must be from 0 to 2^31 - 1, got ",
             num_iter);
  WSSS_CHECK(image.size(1) < (1 << 24) && image.size(2) < (1 << 30) && image.size(3) < (1 << 30),
             "par: the map is too large");
  const Tensor own_image = torch::stable::contiguous(image), own_mask = torch::stable::contiguous(mask);
  Tensor result = new_empty(own_mask, std::vector<int64_t>{mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
  if (result.numel() == 0) return result;
  const OnDevice device(image);
  if (num_iter == 0) return torch::stable::clone(own_mask);
  const Call call{{dilations, num_iter, pamr, w1, w2, w3},
                  adjoint,
                  exact,
                  image.size(0),
                  image.size(1),
                  mask.size(1),
                  image.size(2),
                  image.size(3)};
  for_cuda_type("par", image, [&](auto tag) {
    using T = decltype(tag);
    Refinement<T>(call, own_image, own_mask, result, device.stream()).run();
  });
  return result;
}

Tensor par_fwd(const Tensor& image, const Tensor& mask, std::vector<int64_t> size, std::vector<int64_t> dilations,
               int64_t num_iter, bool pamr, double w1, double w2, double w3, bool exact) {
  WSSS_CHECK(size.empty(), "par: masks of the image's size expected");
  return refine(image, mask, dilations, num_iter, pamr, w1, w2, w3, exact, false);
}

Tensor par_bwd(const Tensor& image, const Tensor& grad, std::vector<int64_t> size, std::vector<int64_t> dilations,
               int64_t num_iter, bool pamr, double w1, double w2, double w3, bool exact) {
  WSSS_CHECK(size.empty(), "par: masks of the image's size expected");
  return refine(image, grad, dilations, num_iter, pamr, w1, w2, w3, exact, true);
}

}  // namespace
}  // namespace wsss::par

WSSS_CUDA_LIBRARY(m) {
  m.impl("par_fwd", TORCH_BOX(&wsss::par::par_fwd));
  m.impl("par_bwd", TORCH_BOX(&wsss::par::par_bwd));
}
