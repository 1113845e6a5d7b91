// The operators of the CPU kernels as torch sees them, for any processor: a linear layer with every token's own adapter, attention over KV blocks, a
// whole decoder layer of Llama's kind in one call, and draws. `table` describes a step's tokens, see linear.h.

#include <torch/library.h>

#include "attention.h"
#include "draw.h"
#include "thread_pool.h"
#include "linear.h"
#include "vectors.h"
#include "weights.h"

namespace {

using Tensors = at::TensorList;

void store(bf16* to, const Sums& sum) {
  narrow(to, sum[0]);
  narrow(to + kLanes, sum[1]);
}

// linear(x [1, T, in], packed, scales, bias [out] or empty, A, B, gate, ranks, table) -> [1, T, out]: shapes of the rest as in linear.h
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& bias, const at::Tensor& a,
                  const at::Tensor& b, const at::Tensor& gate, const at::Tensor& ranks, const at::Tensor& table) {
  const at::Tensor input = x.contiguous();
  const Linear l(packed, scales, bias, a, b, gate, ranks);
  const TokenAdapters adapters(table, input.numel() / l.in);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = l.out;
  at::Tensor y = at::empty(shape, x.options());
  bf16* out = y.mutable_data_ptr<bf16>();
  product<1>({&l}, adapters, input.const_data_ptr<bf16>(), false, {},
             [&](const Tile& tile, int64_t token, const Sums& sum) { store(out + token * l.out + tile.at * kTile, sum); });
  return y;
}

// Rotates the halves of one head by the position's angles (RoFormer, arXiv:2104.09864, as Llama's code pairs them).
void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t dim) {
  for (int64_t i = 0; i < dim / 2; i += kLanes) {
    const int64_t j = i + dim / 2;
    const Floats a = widen(x + i), b = widen(x + j);
    narrow(x + i, rounded(a * widen(cos + i)) - rounded(b * widen(sin + i)));
    narrow(x + j, rounded(b * widen(cos + j)) + rounded(a * widen(sin + j)));
  }
}

// A decoder layer's tensors: q, k, v, o, gate, up and down, seven tensors each; the norms before attention and before the MLP, and those of
// query and key heads, which may be empty.
struct Decoder {
  Linear q, k, v, o, gate, up, down;
  const bf16 *before, *after, *query_norm, *key_norm;
  float epsilon;

  static Linear at(const Tensors& t, int i) {
    return Linear(t[7 * i], t[7 * i + 1], t[7 * i + 2], t[7 * i + 3], t[7 * i + 4], t[7 * i + 5], t[7 * i + 6]);
  }
  static const bf16* norm(const at::Tensor& t) { return t.numel() ? t.const_data_ptr<bf16>() : nullptr; }

  Decoder(const Tensors& t, const Tensors& norms, double epsilon)
      : q(at(t, 0)), k(at(t, 1)), v(at(t, 2)), o(at(t, 3)), gate(at(t, 4)), up(at(t, 5)), down(at(t, 6)), before(norm(norms[0])),
        after(norm(norms[1])), query_norm(norm(norms[2])), key_norm(norm(norms[3])), epsilon(float(epsilon)) {}

  void normalized(const bf16* x, const bf16* weight, int64_t tokens, bf16* out) const {
    ThreadPool::shared().each(tokens, [&](int64_t t) { normalize(x + t * q.in, weight, epsilon, q.in, out + t * q.in); });
  }

  // Norms and rotates the heads of query and key, in place; `x` is one token's query, key and value.
  void turn(bf16* x, const bf16* cos, const bf16* sin, int64_t dim) const {
    for (int64_t at = 0; at < q.out + k.out; at += dim) {
      if (const bf16* weight = at < q.out ? query_norm : key_norm) normalize(x + at, weight, epsilon, dim, x + at);
      rotate(x + at, cos, sin, dim);
    }
  }

  // x + layer(input), rounded twice as transformers does.
  void added(const Linear& layer, const TokenAdapters& adapters, const bf16* input, const bf16* x, bf16* out) const {
    product<1>({&layer}, adapters, input, false, {}, [&](const Tile& tile, int64_t token, const Sums& sum) {
      const int64_t at = token * layer.out + tile.at * kTile;
      store(out + at, {widen(x + at) + rounded(sum[0]), widen(x + at + kLanes) + rounded(sum[1])});
    });
  }

  // act = silu(gate(x)) * up(x): the gate's tile is done, and still near, when the same thread comes to up's.
  void activated(const TokenAdapters& adapters, const bf16* x, const PrefetchList& prefetch, bf16* act) const {
    product<2>({&gate, &up}, adapters, x, true, prefetch, [&](const Tile& tile, int64_t token, const Sums& sum) {
      bf16* to = act + token * up.out + tile.at * kTile;
      if (tile.l == &gate) store(to, {silu(rounded(sum[0])), silu(rounded(sum[1]))});
      else store(to, {widen(to) * rounded(sum[0]), widen(to + kLanes) * rounded(sum[1])});
    });
  }
};

constexpr int64_t kFetched = 32;  // with more tokens than this, what comes next would leave the caches before it is read

// decoder(x [1, T, hidden], linears, norms, next, cos [1, T, dim], sin, keys, values, table, blocks, epsilon, scale, window) -> [1, T, hidden], all
// bf16; `next` are the following layer's linears, or none.
at::Tensor decoder(const at::Tensor& x, Tensors linears, Tensors norms, Tensors next, const at::Tensor& cos, const at::Tensor& sin,
                   at::Tensor keys, at::Tensor values, const at::Tensor& table, const at::Tensor& blocks, double epsilon, double scale, int64_t window) {
  const Decoder d(linears, norms, epsilon);
  const int64_t tokens = x.size(1), hidden = x.size(2), dim = keys.size(3), width = d.q.out + d.k.out + d.v.out;
  const TokenAdapters adapters(table, tokens);
  const bf16 *input = x.const_data_ptr<bf16>(), *c = cos.const_data_ptr<bf16>(), *s = sin.const_data_ptr<bf16>();
  at::Tensor normed = at::empty({tokens, hidden}, x.options()), heads = at::empty({1, tokens, width / dim, dim}, x.options());
  bf16 *n = normed.mutable_data_ptr<bf16>(), *qkv = heads.mutable_data_ptr<bf16>();

  PrefetchList own, later;
  if (tokens <= kFetched) {
    own.add(d.o, adapters);
    for (int i = 0; next.size() && i < 3; ++i) later.add(Decoder::at(next, i), adapters);
  }
  d.normalized(input, d.before, tokens, n);
  product<3>({&d.q, &d.k, &d.v}, adapters, n, false, own, [&](const Tile& tile, int64_t token, const Sums& sum) {
    const int64_t first = tile.l == &d.q ? 0 : tile.l == &d.k ? d.q.out : d.q.out + d.k.out;
    store(qkv + token * width + first + tile.at * kTile, sum);
  });
  ThreadPool::shared().each(tokens, [&](int64_t t) { d.turn(qkv + t * width, c + t * dim, s + t * dim, dim); });
  const int64_t query = d.q.out / dim, key = d.k.out / dim;
  auto part = [&](int64_t from, int64_t many) { return heads.narrow(2, from, many).transpose(1, 2); };
  at::Tensor mixed = attend(part(0, query), part(query, key), part(query + key, key), keys, values, table, blocks, {}, scale, window, 0);

  at::Tensor middle = at::empty_like(x), act = at::empty({tokens, d.up.out}, x.options()), out = at::empty_like(x);
  bf16 *m = middle.mutable_data_ptr<bf16>(), *a = act.mutable_data_ptr<bf16>();
  d.added(d.o, adapters, mixed.const_data_ptr<bf16>(), input, m);
  d.normalized(m, d.after, tokens, n);
  d.activated(adapters, n, later, a);
  d.added(d.down, adapters, a, m, out.mutable_data_ptr<bf16>());
  return out;
}

}  // namespace

TORCH_LIBRARY(adapterd, library) {
  library.def("pack(Tensor weight) -> Tensor", &pack);
  library.def("pack_nf4(Tensor codes) -> Tensor", &pack_nf4);
  library.def("pack_scales(Tensor scales) -> Tensor", &pack_scales);
  library.def("place(Tensor a, Tensor b, Tensor(a!) pool_a, Tensor(b!) pool_b, int start) -> ()", &place);
  library.def("linear(Tensor x, Tensor packed, Tensor scales, Tensor bias, Tensor a, Tensor b, Tensor gate, Tensor ranks, Tensor table) -> Tensor", &linear);
  library.def("attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor blocks, Tensor? sinks, "
              "float scale, int window, float softcap) -> Tensor", &attend);
  library.def("draw(Tensor logits, Tensor rules) -> Tensor", &draw);
  library.def("decoder(Tensor x, Tensor[] linears, Tensor[] norms, Tensor[] next, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor blocks, "
              "float epsilon, float scale, int window) -> Tensor", &decoder);
}
