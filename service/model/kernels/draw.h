// Draws a token from a row of logits: temperature, then top-k, top-p and min-p, in transformers' order. Nothing is sorted: the least weight
// that is kept is found ten bits at a time, for the bits of positive floats are in their own order.

#pragma once

#include <cfloat>
#include <numeric>
#include <vector>

#include "thread_pool.h"
#include "vectors.h"

constexpr int64_t kNoToken = -1;  // where numbers are not finite or nothing is allowed

// The columns of a row's numbers. A top-p of 1 and a min-p of 0 keep all, as does a top-k of the vocabulary.
struct DrawRule {
  double uniform, top_k, temperature, top_p, min_p, typical_p;
};

inline Floats load_logits(const float* p) { return load(p); }
inline Floats load_logits(const bf16* p) { return widen(p); }

// A row's probabilities divided by the greatest, and zeros up to a multiple of kStrip.
class DrawWeights {
 public:
  // False where a logit is NaN or infinite, or none is over -inf.
  template <typename T>
  bool fill(const T* logits, int64_t n, float temperature) {
    T last[kLanes];  // of a vocabulary that is no multiple of 16
    std::fill_n(last, kLanes, T(-INFINITY));
    std::copy_n(logits + n / kLanes * kLanes, n % kLanes, last);
    weights_.resize((n + kStrip - 1) / kStrip * kStrip);
    std::fill(weights_.begin() + n, weights_.end(), -FLT_MAX);
    const Floats none = all(-FLT_MAX);  // for -inf, which times 0 would be NaN
    Floats most = none, zeros;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats x = larger(none, load_logits(i + kLanes <= n ? logits + i : last) / temperature);
      put(i, x);
      most = larger(most, x);
      zeros += x * 0.0f;
    }
    const float best = largest_of(most);
    if (best == -FLT_MAX || sum_of(zeros) != 0) return false;
    weigh(best);
    listed_.clear();
    return true;
  }

  // Keeps the k greatest and those that equal the last of them.
  void keep_best(double k) {
    list_weights(k <= double(maxima_.size()) ? find_least<false>(maxima_, k).value : 0);
    keep_listed(find_least<false>(listed_, k).value);
  }

  // Keeps the fewest of the greatest whose sum reaches the share of all; of equal ones the first.
  void keep_nucleus(double share) {
    const double whole = sum(), wanted = share * whole;
    if (listed_.empty()) list_weights(bound_nucleus(whole, wanted));
    const Least least = find_least<true>(listed_, wanted);
    keep_listed(least.value);
    double room = std::ceil(least.wanted / least.value);
    if (room >= double(std::count(listed_.begin(), listed_.end(), least.value))) return;
    for (float& weight : weights_)
      if (weight == least.value && room-- < 1) weight = 0;
  }

  void keep_from(float least) {
    for (int64_t i = 0; i < size(); i += kLanes) put(i, where_negative(get(i) - all(least), Floats{}, get(i)));
  }

  // The place at which the sum passes the share of all.
  int64_t find_share(double share) const {
    const double wanted = share * sum();
    double before = 0;
    int64_t at = 0;
    for (; at + kLanes < size() && before + sum_of(get(at)) <= wanted; at += kLanes) before += sum_of(get(at));
    int64_t last = at;
    for (int64_t i = at; i < at + kLanes && before <= wanted; ++i) {
      if (weights_[i] > 0) last = i;
      before += weights_[i];
    }
    return last;
  }

 private:
  // The least weight that is kept, and what of the sum, or number, wanted is left to those that equal it.
  struct Least {
    float value;
    double wanted;
  };

  static constexpr int64_t kStrip = 16 * kLanes;

  int64_t size() const { return int64_t(weights_.size()); }
  Floats get(int64_t i) const { return load(weights_.data() + i); }
  void put(int64_t i, const Floats& v) { store(weights_.data() + i, v); }

  double sum() const {
    double sum = 0;
    for (int64_t i = 0; i < size(); i += kLanes) sum += sum_of(get(i));
    return sum;
  }

  // Makes weights of the scaled logits, and the greatest of every 16 that lie 16 apart.
  void weigh(float best) {
    maxima_.resize(weights_.size() / kLanes);
    for (int64_t strip = 0; strip < size(); strip += kStrip) {
      Floats most;
      for (int64_t i = strip; i < strip + kStrip; i += kLanes) {
        const Floats below = get(i) - all(best);
        put(i, where_negative(below + 80.0f, Floats{}, exponential(below)));
        most = larger(most, get(i));
      }
      store(maxima_.data() + strip / kLanes, most);
    }
  }

  // What the least of a nucleus is not under: all those that are under it come to less than the rest, or the maxima alone are enough.
  float bound_nucleus(double whole, double wanted) const {
    const double sum = std::accumulate(maxima_.begin(), maxima_.end(), 0.0);
    return sum < wanted ? float((whole - wanted) / double(size())) : find_least<true>(maxima_, wanted).value;
  }

  void keep_listed(float least) {
    keep_from(least);
    std::erase_if(listed_, [least](float weight) { return weight < least; });
  }

  // Lists the weights that are at least so great.
  void list_weights(float least) {
    listed_.clear();
    for (int64_t i = 0; i < int64_t(maxima_.size()); ++i) {
      if (maxima_[i] < least) continue;
      const float* first = weights_.data() + i / kLanes * kStrip + i % kLanes;
      for (const float* weight = first; weight < first + kStrip; weight += kLanes)
        if (*weight >= least) listed_.push_back(*weight);
    }
  }

  // From the greatest on, until their sum, or number, is what is wanted.
  template <bool OF_SUM>
  static Least find_least(const std::vector<float>& weights, double wanted) {
    uint32_t found = 0;  // its bits so far
    for (int shift : {20, 10, 0}) {
      double amounts[1024]{};
      for (float weight : weights) {
        uint32_t bits;
        std::memcpy(&bits, &weight, sizeof bits);
        if (bits >> shift >> 10 == found) amounts[bits >> shift & 1023] += OF_SUM ? weight : 1;
      }
      uint32_t digit = 1023, lowest = 0;
      while (amounts[lowest] == 0 && lowest < digit) ++lowest;
      while (digit > lowest && amounts[digit] < wanted) wanted -= amounts[digit--];
      found = found << 10 | digit;
    }
    Least least{0, wanted};
    std::memcpy(&least.value, &found, sizeof found);
    return least;
  }

  std::vector<float> weights_, maxima_, listed_;
};

template <typename T>
int64_t draw_token(const T* logits, int64_t n, const DrawRule& rule) {
  static thread_local DrawWeights weights;
  if (!weights.fill(logits, n, float(rule.temperature))) return kNoToken;
  if (rule.top_k < double(n)) weights.keep_best(rule.top_k);
  if (rule.top_p < 1) weights.keep_nucleus(rule.top_p);
  if (rule.min_p > 0) weights.keep_from(float(rule.min_p));
  return weights.find_share(rule.uniform);
}

// draw(logits [m, vocabulary] bf16 or float32, rules [m, 6] float64) -> int64 [m]
inline at::Tensor draw(const at::Tensor& logits, const at::Tensor& rules) {
  const at::Tensor input = logits.contiguous(), numbers = rules.contiguous();
  at::Tensor tokens = at::empty(input.size(0), input.options().dtype(at::kLong));
  const auto* rule = reinterpret_cast<const DrawRule*>(numbers.const_data_ptr<double>());
  const int64_t n = input.size(1);
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  const auto draw_all = [&](const auto* row) {
    ThreadPool::shared().each(input.size(0), [&](int64_t i) { out[i] = draw_token(row + i * n, n, rule[i]); });
  };
  if (input.scalar_type() == at::kBFloat16) draw_all(input.const_data_ptr<bf16>());
  else draw_all(input.const_data_ptr<float>());
  return tokens;
}
