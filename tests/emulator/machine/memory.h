// Loads, stores, cp.async, and matrices in shared memory.
#pragma once
#include "machine.h"

constexpr u64 POISON = 0x7fc17fc1;  // what a load that is not allowed returns

// A value of a type as a register of 32 or 64 bits holds it after a load.
inline u64 loaded(int type, const void* from) {
  u64 value = 0;
  memcpy(&value, from, width(type));
  return is_signed(type) && width(type) < 4 ? extend(type, value) & 0xffffffff : value;
}

// cp.async: `a` is its size, `c` the source's offset; operands are addresses, and bytes to copy.
inline void begin_copy(Machine& m, int lane) {
  const Instruction& at = *m.at;
  u32 size = at.a;
  u64 from = m.source(1)[lane] + at.c;
  u32 copied = at.source_count > 2 ? (u32)m.source(2)[lane] : size;
  Copy copy{(u32)(m.source(0)[lane] + at.immediate), size, m.warp_number * 32 + lane, {}};
  if (!m.shared_bounds(at, m.warp_number, lane, copy.destination, size, size)) return;
  if (copied > size) {
    m.report("BAD cp.async size", at, m.warp_number, lane, copy.destination);
    copied = size;
  }
  if (from % size) {
    m.report("MISALIGNED cp.async source", at, m.warp_number, lane, from);
    return;
  }
  if (copied < size) m.at_edge();
  bool readable = copied == size && m.global_access(at, m.warp_number, lane, from, size, false);
  if (copied < size) {
    readable = true;
    for (u32 i = 0; i < copied && readable; i++)
      readable = m.global_access(at, m.warp_number, lane, from + i, 1, false);
  }
  if (readable) memcpy(copy.data, (void*)from, copied);
  m.start_copy(at, m.warp_number, lane, copy);
  m.warp->open_copies[lane].push_back(copy);
}

// cp.async.wait_group: `a` groups may stay in flight; -1 waits for copies of no group, too.
inline void wait_for_copies(Machine& m, int lane) {
  auto& groups = m.warp->copy_groups[lane];
  while ((int)groups.size() > std::max(m.at->a, 0)) {
    if (!groups.front().empty()) m.at_edge();
    for (const Copy& copy : groups.front()) m.finish_copy(*m.at, m.warp_number, copy);
    groups.erase(groups.begin());
  }
  if (m.at->a >= 0) return;
  for (const Copy& copy : m.warp->open_copies[lane]) m.finish_copy(*m.at, m.warp_number, copy);
  m.warp->open_copies[lane].clear();
}

// Row and column that element e of a lane's register has in an 8 x 8 matrix; `a`: 1 transposes.
inline std::pair<int, int> matrix_place(const Instruction& at, int lane, int e) {
  int row = lane / 4, column = 2 * (lane % 4) + e;
  return at.a ? std::pair(column, row) : std::pair(row, column);
}

// ldmatrix: lane 8 j + i has the address of row i of matrix j.
inline void load_matrices(Machine& m) {
  const Instruction& at = *m.at;
  u32 addresses[32];
  for (int lane = 0; lane < 8 * at.destination_count; lane++) {
    addresses[lane] = m.source(0)[lane] + at.immediate;
    if (!m.shared_bounds(at, m.warp_number, lane, addresses[lane], 16, 16)) {
      m.stopped = true;
      return;
    }
    m.shared_read(at, m.warp_number, lane, addresses[lane], 16);
  }
  for (int j = 0; j < at.destination_count; j++)
    for (int lane = 0; lane < 32; lane++) {
      u16 halves[2];
      for (int e = 0; e < 2; e++) {
        auto [row, column] = matrix_place(at, lane, e);
        memcpy(&halves[e], m.shared_at(addresses[8 * j + row] + 2 * column), 2);
      }
      m.destination(j)[lane] = (u32)halves[1] << 16 | halves[0];
    }
}

inline void store_matrices(Machine& m) {
  const Instruction& at = *m.at;
  for (int j = 0; j < at.source_count - 1; j++) {
    u16 matrix[8][8];
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < 2; e++) {
        auto [row, column] = matrix_place(at, lane, e);
        matrix[row][column] = m.source(1 + j)[lane] >> 16 * e;
      }
    for (int row = 0; row < 8; row++) {
      int lane = 8 * j + row;
      u32 address = m.source(0)[lane] + at.immediate;
      if (!m.shared_bounds(at, m.warp_number, lane, address, 16, 16)) {
        m.stopped = true;
        return;
      }
      m.shared_write(at, m.warp_number, lane, address, (u8*)matrix[row], 16);
    }
  }
}

// Loads and stores: the first operand is the address, `immediate` its offset.
inline bool Machine::memory() {
  const Instruction& I = *at;
  int type = I.type;
  int size = width(type);
  int w = warp_number;
  auto address = [&](int lane) { return source(0)[lane] + I.immediate; };
  switch (I.opcode) {
    case LD_PARAM:
      each_lane(active, [&](int lane) {
        u64 offset = address(lane);
        for (int i = 0; i < I.destination_count; i++)
          destination(i)[lane] = loaded(type, launch.parameters + offset + i * size);
      });
      return true;
    case LD_GLOBAL:
      each_lane(active, [&](int lane) {
        u64 from = address(lane);
        bool allowed = global_access(I, w, lane, from, size * I.destination_count, false);
        for (int i = 0; i < I.destination_count; i++) {
          if (is_sink(i)) continue;
          destination(i)[lane] = allowed ? loaded(type, (u8*)from + i * size) : POISON;
        }
      });
      return true;
    case ST_GLOBAL: {
      int count = I.source_count - 1;
      each_lane(active, [&](int lane) {
        u64 to = address(lane);
        if (!global_access(I, w, lane, to, size * count, true)) return;
        for (int i = 0; i < count; i++) memcpy((u8*)to + i * size, &source(1 + i)[lane], size);
      });
      return true;
    }
    case LD_SHARED: {
      u32 bytes = size * I.destination_count;
      u32 from[32];  // the address register may be a destination
      each_lane(active, [&](int lane) { from[lane] = address(lane); });
      each_lane(active, [&](int lane) {
        bool allowed = shared_bounds(I, w, lane, from[lane], bytes, bytes);
        if (allowed) shared_read(I, w, lane, from[lane], bytes);
        for (int i = 0; i < I.destination_count; i++) {
          if (is_sink(i)) continue;
          destination(i)[lane] = allowed ? loaded(type, shared_at(from[lane] + i * size)) : POISON;
        }
      });
      return true;
    }
    case ST_SHARED: {
      int count = I.source_count - 1;
      each_lane(active, [&](int lane) {
        u32 to = address(lane);
        if (!shared_bounds(I, w, lane, to, size * count, size * count)) return;
        u8 values[64];
        for (int i = 0; i < count; i++) memcpy(values + i * size, &source(1 + i)[lane], size);
        shared_write(I, w, lane, to, values, size * count);
      });
      return true;
    }
    case CP_ASYNC: each_lane(active, [&](int lane) { begin_copy(*this, lane); }); return true;
    case CP_ASYNC_COMMIT:
      each_lane(active, [&](int lane) {
        warp->copy_groups[lane].push_back(std::move(warp->open_copies[lane]));
        warp->open_copies[lane].clear();
      });
      return true;
    case CP_ASYNC_WAIT:
      each_lane(active, [&](int lane) { wait_for_copies(*this, lane); });
      return true;
    case LDMATRIX:
      check_converged("DIVERGENT ldmatrix");
      load_matrices(*this);
      return true;
    case STMATRIX:
      check_converged("DIVERGENT stmatrix");
      store_matrices(*this);
      return true;
    default: return false;
  }
}
