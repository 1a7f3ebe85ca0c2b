// Instructions that exchange values between lanes, and barriers.
#pragma once
#include "machine.h"

// The lane that `shfl` reads, and whether it is in range; `a`: 0 up, 1 down, 2 bfly, 3 idx.
inline std::pair<int, bool> shuffle_source(int mode, int lane, u64 b, u64 c) {
  int distance = b & 31;
  int segment = c >> 8 & 31;
  int clamp = c & 31;
  int last = (lane & segment) | (clamp & ~segment);
  int from = 0;
  switch (mode) {
    case 0: from = lane - distance; break;
    case 1: from = lane + distance; break;
    case 2: from = lane ^ distance; break;
    default: from = (lane & segment) | (distance & ~segment);
  }
  bool in_range = mode == 0 ? from >= last : from <= last;
  return {in_range ? from : lane, in_range};
}

// `a`: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor.
inline u64 reduced(int operation, int type, u64 a, u64 b) {
  bool less = type == S32 ? (i32)a < (i32)b : (u32)a < (u32)b;
  switch (operation) {
    case 0: return (u32)(a + b);
    case 1: return less ? a : b;
    case 2: return less ? b : a;
    case 3: return a & b;
    case 4: return a | b;
    default: return a ^ b;
  }
}

inline bool Machine::warp_wide() {
  switch (at->opcode) {
    case SHFL: {
      u64 values[32];
      memcpy(values, source(0), sizeof values);
      u64 *b = source(1), *c = source(2), *members = source(3);
      if (active != warp->alive || (u32)members[std::countr_zero(active)] != active)
        report("DIVERGENT shfl.sync", *at, warp_number, 0, 0);
      each_lane(active, [&](int lane) {
        auto [from, in_range] = shuffle_source(at->a, lane, b[lane], c[lane]);
        if (!is_sink(0)) destination(0)[lane] = values[from & 31];
        if (!is_sink(1)) destination(1)[lane] = in_range;
      });
      return true;
    }
    case REDUX: {
      check_converged("DIVERGENT redux.sync");
      u64 *d = destination(0), *a = source(0);
      int first = std::countr_zero(active);
      u64 result = a[first];
      each_lane(active & ~(1u << first), [&](int lane) {
        result = reduced(at->a, at->type, result, a[lane]);
      });
      each_lane(active, [&](int lane) { d[lane] = result; });
      return true;
    }
    case BAR_SYNC:
      if (active != ALL_LANES) report("DIVERGENT bar.sync", *at, warp_number, 0, 0);
      if (at->source_count > 1 && source(1)[0] != (u64)warp_count * 32) unsupported();
      warp->at_barrier = true;
      warp->barrier = at - code;
      warp->epoch++;
      return true;
    case BAR_WARP_SYNC:
      check_converged("DIVERGENT bar.warp.sync");
      warp->epoch++;
      return true;
    default: return false;
  }
}
