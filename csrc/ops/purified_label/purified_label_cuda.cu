// The loss of purified labels of CUDA tensors: arguments, launches, registration.
#include <cmath>
#include <tuple>

#include "ops/purified_label/checks.h"
#include "ops/purified_label/purified_label_kernels.cuh"
#include "wsss/cuda_tensor.h"

namespace wsss::purified_label {
namespace {

Shape shape_of(const Tensor& logit, const Tensor& label, int64_t ignore_index) {
  check_maps(logit, label);
  const int64_t pixels = logit.size(2) * logit.size(3), tiles = blocks_for(pixels, kTilePixels);
  WSSS_CHECK(logit.size(0) * tiles < (int64_t(1) << 31), "purified_label_loss: too many pixels");
  return {logit.size(0), logit.size(1), pixels, tiles, ignore_index};
}

// float32, and float64 for float64: of the loss and of all that is kept for a pixel.
ScalarType wide_type(const Tensor& logit) {
  return logit.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class P>
Tensor parts_of(const Tensor& like, const Shape& s) {
  return new_empty(like, {s.batch * s.tiles * int64_t(sizeof(P))}, ScalarType::Byte);
}
template <class P>
P* parts(const Tensor& t) {
  return static_cast<P*>(t.mutable_data_ptr());
}

template <class T>
void losses(const Shape& s, const Tensor& logit, const Tensor& label, const Tensor& result, const Tensor& weight,
            cudaStream_t stream) {
  using A = accumulator_t<T>;
  const Tensor loss = new_empty(weight, sizes_of(weight)), confidence = new_empty(weight, sizes_of(weight));
  const Tensor seen = parts_of<Seen>(logit, s), sums = parts_of<Sums>(logit, s);
  const dim3 grid(static_cast<unsigned>(s.batch * s.tiles)), block(kThreads);
  if (s.batch) {
    launch(find_losses<T, A>, grid, block, 0, stream, in<T>(logit), in<int64_t>(label), out<A>(loss),
           out<A>(confidence), parts<Seen>(seen), s);
    launch(sum_tiles<A>, grid, block, 0, stream, in<A>(loss), in<A>(confidence), parts<Seen>(seen), parts<Sums>(sums),
           s);
    launch(write_weights<A>, grid, block, 0, stream, in<A>(loss), in<A>(confidence), parts<Seen>(seen),
           parts<Sums>(sums), out<A>(weight), s);
  }
  launch(finish_loss<A>, dim3(1), block, 0, stream, s.batch ? parts<Seen>(seen) : nullptr,
         s.batch ? parts<Sums>(sums) : nullptr, out<A>(result), s);
}

std::tuple<Tensor, Tensor> fwd(const Tensor& logit, const Tensor& label, int64_t ignore_index) {
  const Shape s = shape_of(logit, label, ignore_index);
  const OnDevice device(logit);
  const Tensor x = dense(logit), y = dense(label);
  Tensor result = new_empty(logit, std::vector<int64_t>{}, wide_type(logit));
  Tensor weight = new_empty(logit, {s.batch, logit.size(2), logit.size(3)}, wide_type(logit));
  WSSS_PATH("purified_label.cuda.fwd");
  for_cuda_type("purified_label_loss", logit,
                [&](auto tag) { losses<decltype(tag)>(s, x, y, result, weight, device.stream()); });
  return {result, weight};
}

Tensor bwd(const Tensor& logit, const Tensor& label, const Tensor& weight, const Tensor& grad, int64_t ignore_index) {
  const Shape s = shape_of(logit, label, ignore_index);
  WSSS_CHECK(weight.numel() == label.numel() && grad.numel() == 1 && weight.scalar_type() == wide_type(logit) &&
                 grad.scalar_type() == wide_type(logit),
             "purified_label_loss: one weight per pixel, one gradient, in float32 or in float64 for float64 logits");
  const OnDevice device(logit);
  const Tensor x = dense(logit), y = dense(label), w = dense(weight), g = dense(grad);
  Tensor dlogit = new_empty(logit, sizes_of(logit));
  if (!s.batch) return dlogit;
  WSSS_PATH("purified_label.cuda.bwd");
  for_cuda_type("purified_label_loss", logit, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    launch(loss_gradient<T, A>, dim3(unsigned(s.batch * s.tiles)), dim3(kThreads), 0, device.stream(), in<T>(x),
           in<int64_t>(y), in<A>(w), in<A>(g), out<T>(dlogit), s);
  });
  return dlogit;
}

}  // namespace
}  // namespace wsss::purified_label

WSSS_CUDA_LIBRARY(m) {
  m.impl("purified_label_fwd", TORCH_BOX(&wsss::purified_label::fwd));
  m.impl("purified_label_bwd", TORCH_BOX(&wsss::purified_label::bwd));
}
