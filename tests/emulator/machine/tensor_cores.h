// mma.sync and wgmma. Sums are taken in fp64 and rounded once.
#pragma once
#include "machine.h"

// Fills A [16, K] from the registers of a warp's fragment, `count` registers from operand `first`.
inline void load_fragment_a(Machine& m, int first, int count, double (*a)[32]) {
  int type = m.at->type;
  int per = type == TF32 ? 1 : type == E4M3X2 ? 4 : 2;
  for (int i = 0; i < count; i++) {
    u64* lanes = m.source(first + i);
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < per; e++)
        a[lane / 4 + 8 * (i & 1)][per * (lane % 4) + e + 4 * per * (i >> 1)] =
            element(type, lanes[lane], e);
  }
}

// mma.m16n8k: `a` is K, `b` and `c` count registers of A and B; `immediate`: 1 sums in fp16.
inline void Machine::mma() {
  if (active != ALL_LANES) report("DIVERGENT mma.sync", *at, warp_number, 0, 0);
  const Instruction& I = *at;
  int K = I.a;
  int per = I.type == TF32 ? 1 : I.type == E4M3X2 ? 4 : 2;
  double A[16][32], B[32][8], sums[16][8];
  load_fragment_a(*this, 0, I.b, A);
  for (int i = 0; i < I.c; i++)
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < per; e++)
        B[per * (lane % 4) + e + 4 * per * i][lane / 4] = element(I.type, source(I.b + i)[lane], e);
  int accumulators = I.b + I.c;
  auto place = [](int lane, int i) {
    return std::pair(lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
  };
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      auto [row, column] = place(lane, i);
      sums[row][column] = I.immediate ? element(F16, source(accumulators + i / 2)[lane], i % 2)
                                      : as_f32(source(accumulators + i)[lane]);
    }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sums[row][column] += A[row][k] * B[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      auto [row, column] = place(lane, i);
      float sum = sums[row][column];
      if (!I.immediate) {
        destination(i)[lane] = bits_of(sum);
        continue;
      }
      u64& pair = destination(i / 2)[lane];
      pair = i % 2 ? pair | (u64)float_to_half(sum) << 16 : float_to_half(sum);
    }
}

// A shared-memory descriptor of wgmma.
struct Descriptor {
  u64 start, leading, stride;
  int swizzle;  // 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
  bool has_base_offset;
  explicit Descriptor(u64 bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4), swizzle(bits >> 62), has_base_offset(bits >> 49 & 7) {}

  // Returns where 16 bytes of the operand lie. `mn` counts rows of A or columns of B, `k` is the
  // inner dimension, and `per` elements fill 16 bytes. The 16 bytes go along k, or along mn where
  // the operand is MN-major.
  u32 address(int mn, int k, bool mn_major, int per) const {
    int atom = swizzle ? 16 >> swizzle : 1;  // units of 16 bytes that a swizzled row has
    u64 offset;
    if (!mn_major && swizzle)
      offset = mn % 8 * atom * 16 + mn / 8 * stride + k / per * 16;
    else if (!mn_major)
      offset = mn % 8 * 16 + mn / 8 * stride + k / per * leading;
    else if (swizzle)
      offset = mn / per % atom * 16 + mn / (per * atom) * leading + k % 8 * atom * 16 +
               k / 8 * stride;
    else
      offset = mn / per * stride + k % 8 * 16 + k / 8 * leading;
    u64 place = start + offset;
    return swizzle ? place ^ (place >> 7 & (atom - 1)) << 4 : place;
  }
};

// Reads `count` rows of A or columns of B from shared memory into values[mn][k], which a wgmma in
// flight reads from here on. Returns false where an address is out of bounds.
inline bool read_operand(Machine& m, u64 bits, int first, int count, bool mn_major,
                         double (*values)[32]) {
  const Instruction& at = *m.at;
  Descriptor descriptor(bits);
  int size = at.type == TF32 ? 4 : at.type == E4M3X2 ? 1 : 2;
  int per = 16 / size;
  int K = at.c;
  if (descriptor.has_base_offset || (mn_major && size != 2)) {
    m.unsupported();
    return false;
  }
  for (int mn = 0; mn < count; mn += mn_major ? per : 1)
    for (int k = 0; k < K; k += mn_major ? 1 : per) {
      u32 address = descriptor.address(first + mn, k, mn_major, per);
      if (!m.shared_bounds(at, m.warp_number, 0, address, 16, 16)) {
        m.stopped = true;
        return false;
      }
      m.shared_read(at, m.warp_number, 0, address, 16, true);
      m.warp->open_reads.push_back({address, 16});
      for (int i = 0; i < 16; i++) m.state(address + i).in_flight++;
      for (int e = 0; e < per; e++) {
        u32 value = 0;
        memcpy(&value, m.shared_at(address + e * size), size);
        (mn_major ? values[mn + e][k] : values[mn][k + e]) = element(at.type, value);
      }
    }
  return true;
}

// wgmma.m64n: `a` is N, `c` is K; `b`: bit 0 A in registers, bit 1 A and bit 2 B are MN-major.
// Operands: the registers or the descriptor of A, the descriptor of B, and whether D is added.
inline void Machine::wgmma() {
  if (active != ALL_LANES) report("DIVERGENT wgmma", *at, warp_number, 0, 0);
  const Instruction& I = *at;
  static thread_local double A[16][32], B[256][32];
  bool in_registers = I.b & 1;
  int next = in_registers ? 4 : 1;
  if (in_registers) load_fragment_a(*this, 0, 4, A);
  else if (!read_operand(*this, source(0)[0], 16 * (warp_number % 4), 16, I.b & 2, A)) return;
  if (!read_operand(*this, source(next)[0], 0, I.a, I.b & 4, B)) return;
  bool accumulate = source(next + 1)[0];
  check_wgmma_fence(I, warp_number, launch.operands, in_registers ? 4 : 0);
  auto in_flight = [&](i32 number, u8 use) {
    warp->in_flight[number] |= use;
    warp->open_uses.push_back({number, use});
  };
  for (int i = 0; i < I.destination_count; i++) in_flight(destination_number(i), 2);
  for (int i = 0; in_registers && i < 4; i++) in_flight(source_number(i), 1);
  warp->wgmma_in_flight = true;
  for (int i = 0; i < I.a / 2; i++) {
    u64* d = destination(i);
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      double sum = accumulate ? as_f32(d[lane]) : 0.;
      for (int k = 0; k < I.c; k++) sum += A[row][k] * B[column][k];
      d[lane] = bits_of((float)sum);
    }
  }
}

inline void Machine::note_accesses() {
  for (int i = 0; i < at->destination_count; i++)
    if (!is_sink(i)) warp->accessed[destination_number(i)] = executed;
  for (int i = 0; i < at->source_count; i++) warp->accessed[source_number(i)] = executed;
}

inline void Machine::wgmma_commit() {
  warp->read_groups.push_back(std::move(warp->open_reads));
  warp->use_groups.push_back(std::move(warp->open_uses));
  warp->open_reads.clear();
  warp->open_uses.clear();
}

// `a` groups may stay in flight. What a wgmma reads is checked again when it has ended.
inline void Machine::wgmma_wait() {
  Warp& w = *warp;
  while ((int)w.read_groups.size() > at->a) {
    at_edge();
    for (auto [address, bytes] : w.read_groups.front()) {
      shared_read(*at, warp_number, 0, address, bytes, true);
      for (u32 i = 0; i < bytes; i++) state(address + i).in_flight--;
    }
    w.read_groups.erase(w.read_groups.begin());
    w.use_groups.erase(w.use_groups.begin());
  }
  std::fill(w.in_flight.begin(), w.in_flight.end(), 0);
  for (const Warp::Uses& uses : w.use_groups)
    for (auto [number, use] : uses) w.in_flight[number] |= use;
  for (auto [number, use] : w.open_uses) w.in_flight[number] |= use;
  w.wgmma_in_flight = !w.use_groups.empty() || !w.open_uses.empty();
}
