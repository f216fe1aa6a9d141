// From tensors to RefineInput: shapes, strides, dtypes. Shared by the refining map and the walk that streams it.
#pragma once
#include <cmath>
#include <limits>

#include "ops/affinity/refine.h"

namespace wsss {

inline bool is_half(ScalarType t) { return t == ScalarType::Half || t == ScalarType::BFloat16; }

// The decoder's features B×d×N (or none) and the encoder's, B×L×C×N, or its maps, B×L×N×N. Features are float32 or
// float64; maps may be half-precision beside float32, and are read in place if their rows have unit stride.
struct RefineTensors {
  const char* op;
  std::optional<Tensor> decoder;
  Tensor encoder;
  bool maps, is_signed;
  int64_t first, batch, layers, channels, n;
  std::optional<double> clamp_min;
  ScalarType compute;

  RefineTensors(const char* op, const std::optional<Tensor>& decoder_in, const Tensor& encoder_in, bool maps,
                int64_t first, bool is_signed, std::optional<double> clamp_min)
      : op(op), encoder(encoder_in), maps(maps), is_signed(is_signed), first(first), clamp_min(clamp_min) {
    WSSS_CHECK(encoder.dim() == 4, op, ": encoder must be B×L×C×N or B×L×N×N");
    batch = encoder.size(0), layers = encoder.size(1), channels = encoder.size(2), n = encoder.size(3);
    WSSS_CHECK(!maps || channels == n, op, ": encoder must be B×L×N×N");
    WSSS_CHECK(first >= 0 && first < layers, op, ": first_layer must be in [0, ", layers, "), got ", first);
    compute = is_half(encoder.scalar_type()) ? ScalarType::Float : encoder.scalar_type();
    WSSS_CHECK(maps || compute == encoder.scalar_type(), op, ": float32 or float64 features expected");
    if (!maps || encoder.stride(3) != 1) encoder = dense(encoder);
    if (!decoder_in) return;
    decoder = dense(*decoder_in);
    WSSS_CHECK(
        decoder->dim() == 3 && decoder->size(0) == batch && decoder->size(2) == n && decoder->scalar_type() == compute,
        op, ": decoder_feature must be B×d×N of the computing dtype");
  }

  template <class T>
  RefineInput<T> input(int64_t b, bool backward) const {
    RefineInput<T> r;
    r.n = n, r.first = first, r.layers = layers, r.is_signed = is_signed;
    if (clamp_min) r.minimum = T(*clamp_min);
    if (decoder) {
      const int64_t d = decoder->size(1);
      r.decoder.emplace(in<T>(*decoder) + b * d * n, d, n, false, backward);
    }
    for (int64_t l = first; !maps && l < layers; ++l)
      r.encoder.emplace_back(in<T>(encoder) + (b * layers + l) * channels * n, channels, n, true, backward);
    if (maps) {
      const int64_t bytes = is_half(encoder.scalar_type()) ? 2 : int64_t(sizeof(T));
      r.maps = static_cast<const char*>(encoder.const_data_ptr()) + b * encoder.stride(0) * bytes;
      r.map_type = encoder.scalar_type();
      r.layer_stride = encoder.stride(1), r.row_stride = encoder.stride(2);
    }
    return r;
  }

  // Gradient tensors, of extent 0 where they are not wanted.
  std::pair<Tensor, Tensor> gradients(bool need_decoder, bool need_encoder) const {
    const int64_t d = decoder ? decoder->size(1) : 0;
    return {wsss::new_empty(encoder, {need_decoder && decoder ? batch : 0, d, n}, compute),
            wsss::new_empty(encoder, {need_encoder ? batch : 0, layers, channels, n}, compute)};
  }
  template <class T>
  RefineGradients<T> targets(int64_t b, const Tensor& to_decoder, const Tensor& to_encoder) const {
    RefineGradients<T> r;
    if (to_decoder.numel()) r.decoder = out<T>(to_decoder) + b * to_decoder.size(1) * n;
    if (to_encoder.numel()) r.encoder = out<T>(to_encoder) + b * layers * channels * n;
    return r;
  }
};

// Gate and deviation of all layers; returns the gate of the candidates. `stored` and `kept` as in `deviations`.
template <class T>
bool* choose(const RefineInput<T>& input, T* stored, T* kept, bool* gate, T* deviation) {
  std::fill(gate, gate + input.first, false);
  std::fill(gate + input.first, gate + input.layers, true);
  std::fill(deviation, deviation + input.layers, std::numeric_limits<T>::quiet_NaN());
  if (input.decoder) {
    deviations(input, stored, kept, deviation + input.first);
    select(deviation + input.first, input.candidates(), gate + input.first);
  }
  return gate + input.first;
}

}  // namespace wsss
