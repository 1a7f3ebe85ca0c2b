// Memory, and the checks of every access to it.
#pragma once
#include "types.h"

enum Access : u8 { READ = 1, WRITTEN = 2 };

// A tensor's storage. The vectors have one entry per byte, and are empty until the first access.
// `writer` and `reader` hold the number of a program plus one; `reader` is SEVERAL after two.
struct GlobalRange {
  u64 low, high;
  // Without address + bytes, which overflows near the end of the address space.
  bool contains(u64 address, u32 bytes) const {
    return address >= low && address < high && bytes <= high - address;
  }
  std::vector<u32> writer, reader;
  std::vector<u8> access;
  std::vector<u8> before;  // what bytes held before the launch wrote them
};
constexpr u32 SEVERAL = ~0u;

enum Proxy : u8 { ASYNC, GENERIC, CP_ASYNC_PROXY };

// What the checks know of a byte of shared memory. An epoch ends at each barrier of the program,
// a warp's epoch also at each `bar.warp.sync`.
struct SharedByte {
  u32 write_epoch, write_thread, write_warp_epoch;
  u32 read_epoch, read_warps, read_thread, read_warp_epoch;
  u8 written, pending, proxy;
  u16 in_flight;  // wgmma instructions that read it and were not waited for
};

// A `cp.async` that was not waited for.
struct Copy {
  u32 destination, bytes;
  int thread;
  u8 data[16];
};

struct Warp {
  std::vector<u64> registers;  // 32 lanes for each
  u32 pc[32];
  u32 alive;
  bool converged, at_barrier, at_grid_wait;
  u32 barrier, epoch;
  std::vector<Copy> open_copies[32];
  std::vector<std::vector<Copy>> copy_groups[32];
  // Shared memory (address, bytes) and registers (number, use) of wgmma groups in flight.
  using Reads = std::vector<std::pair<u32, u32>>;
  using Uses = std::vector<std::pair<i32, u8>>;
  Reads open_reads;
  Uses open_uses;
  std::vector<Reads> read_groups;
  std::vector<Uses> use_groups;
  std::vector<u8> in_flight;  // of each register: 1 an input, 2 a result of a wgmma in flight
  bool wgmma_in_flight;
  std::vector<u64> accessed;  // when each register was accessed, but for moves; see wgmma_fence
  u64 wgmma_fence;            // when the last one was executed; 0 for never
  std::vector<u32> unfenced;  // bytes that this warp wrote since its last fence
  u32 fence_epoch;
  u64* lanes(int number) { return &registers[(size_t)number * 32]; }
};

// Looks for a tensor that has an address; returns whether it called `add_range`.
using FindRange = int (*)(u64 address, u32 bytes);

struct Checks {
  const Instruction* code = nullptr;
  u32 shared_bytes = 0;
  FindRange find_range = nullptr;
  std::vector<GlobalRange> ranges;
  size_t last_range = 0;
  std::vector<u8> shared;
  std::vector<SharedByte> shared_bytes_state;
  std::vector<Warp> warps;
  u32 epoch = 1;
  u32 program = 0;
  u32 program_ids[3] = {};
  u32 last_fence = 0, fence_before = 0;  // epochs of the last two epochs with a proxy fence
  std::string reports;
  std::unordered_map<u64, int> reported;
  int report_count = 0;
  bool stopped = false;
  // The launch before, while a program of its dependent has not waited for it.
  std::vector<GlobalRange>* primary = nullptr;
  std::string primary_name;
  bool before_grid_wait = false;

  SharedByte& state(u32 address) { return shared_bytes_state[address - SHARED_BASE]; }
  u8* shared_at(u32 address) { return &shared[address - SHARED_BASE]; }

  // Adds a report; one of each kind for each instruction.
  void report(const char* kind, const Instruction& at, int warp, int lane, u64 address,
              const char* more = "") {
    report_count++;
    u64 key = (u64)(&at - code) << 8 ^ std::hash<std::string>()(kind);
    if (reported[key]++) return;
    char text[512];
    const u32* ids = program_ids;
    const char* format = "%s|%d:%d|%d|program (%u, %u, %u) warp %d lane %d address %#llx%s\n";
    snprintf(text, sizeof text, format, kind, at.file, at.line, (int)(&at - code), ids[0], ids[1],
             ids[2], warp, lane, (unsigned long long)address, more);
    reports += text;
  }

  static GlobalRange* find_in(std::vector<GlobalRange>& ranges, u64 address, u32 bytes) {
    for (GlobalRange& range : ranges)
      if (range.contains(address, bytes)) return &range;
    return nullptr;
  }

  GlobalRange* range_of(u64 address, u32 bytes) {
    if (last_range < ranges.size()) {
      GlobalRange& last = ranges[last_range];
      if (last.contains(address, bytes)) return &last;
    }
    GlobalRange* found = find_in(ranges, address, bytes);
    if (!found && find_range && find_range(address, bytes))
      found = find_in(ranges, address, bytes);
    if (found) last_range = found - ranges.data();
    return found;
  }

  // Checks and notes an access to global memory; returns whether it may take place.
  bool global_access(const Instruction& at, int warp, int lane, u64 address, u32 bytes,
                     bool write) {
    if (address % bytes) {
      report("MISALIGNED global", at, warp, lane, address);
      return false;
    }
    GlobalRange* range = range_of(address, bytes);
    // A word with a byte of a storage may be read, as kernels read bytes: memory comes in words.
    if (!range && !write && bytes == 4) range = range_of(address, 1);
    if (!range && !write && bytes == 4) range = range_of(address + 3, 1);
    if (!range) {
      report(write ? "OOB global write" : "OOB global read", at, warp, lane, address);
      return false;
    }
    if (before_grid_wait) check_primary(at, warp, lane, address, bytes, write);
    if (range->access.empty()) {
      size_t size = range->high - range->low;
      range->writer.assign(size, 0);
      range->reader.assign(size, 0);
      range->access.assign(size, 0);
      range->before.resize(size);
    }
    for (u32 i = 0; i < bytes; i++) {
      size_t k = address - range->low + i;
      if (k >= range->access.size()) continue;
      if (write && !(range->access[k] & WRITTEN)) range->before[k] = *(u8*)(address + i);
      range->access[k] |= write ? WRITTEN : READ;
      check_programs(at, warp, lane, address, write, range->writer[k], range->reader[k]);
    }
    return true;
  }

  // Reports accesses of two programs of one launch to one byte, unless both read.
  void check_programs(const Instruction& at, int warp, int lane, u64 address, bool write,
                      u32& writer, u32& reader) {
    u32 self = program + 1;
    if (!write) {
      if (writer && writer != self)
        report("RACE global write/read of two programs", at, warp, lane, address);
      reader = reader == 0 || reader == self ? self : SEVERAL;
      return;
    }
    if (writer && writer != self)
      report("RACE global write/write of two programs", at, warp, lane, address);
    if (reader && reader != self)
      report("RACE global read/write of two programs", at, warp, lane, address);
    writer = self;
  }

  // Reports an access before `griddepcontrol.wait` that conflicts with the launch before.
  void check_primary(const Instruction& at, int warp, int lane, u64 address, u32 bytes,
                     bool write) {
    GlobalRange* range = find_in(*primary, address, 1);
    if (!range) return;
    u8 seen = 0;
    for (size_t k = address - range->low; k < address - range->low + bytes; k++)
      if (k < range->access.size()) seen |= range->access[k];
    std::string more = " primary " + primary_name;
    if (!write && (seen & WRITTEN))
      report("PDL read before griddepcontrol.wait of what the primary writes", at, warp, lane,
             address, more.c_str());
    if (write && (seen & WRITTEN))
      report("PDL write before griddepcontrol.wait onto what the primary writes", at, warp, lane,
             address, more.c_str());
    else if (write && (seen & READ))
      report("PDL write before griddepcontrol.wait onto what the primary reads", at, warp, lane,
             address, more.c_str());
  }

  // Exchanges what the primary wrote for what was there before, or back.
  void exchange_primary() {
    for (GlobalRange& range : *primary)
      for (size_t k = 0; k < range.access.size(); k++)
        if (range.access[k] & WRITTEN) std::swap(*(u8*)(range.low + k), range.before[k]);
  }

  bool shared_bounds(const Instruction& at, int warp, int lane, u32 address, u32 bytes,
                     u32 alignment) {
    if (address % alignment) {
      report("MISALIGNED shared", at, warp, lane, address);
      return false;
    }
    if (address < SHARED_BASE || (u64)address + bytes > SHARED_BASE + shared_bytes) {
      report("OOB shared", at, warp, lane, address);
      return false;
    }
    return true;
  }

  // Checks and notes a read of shared memory; `wgmma` says that a wgmma reads, by the async proxy.
  void shared_read(const Instruction& at, int warp, int lane, u32 address, u32 bytes,
                   bool wgmma = false) {
    u32 self = warp * 32 + lane;
    u32 warp_epoch = warps[warp].epoch;
    for (u32 i = 0; i < bytes; i++) {
      SharedByte& byte = state(address + i);
      if (byte.pending) report("RACE shared read of a pending cp.async", at, warp, lane, address);
      if (!byte.written) {
        report("UNINIT shared read", at, warp, lane, address);
        continue;
      }
      if (byte.write_epoch == epoch && byte.write_thread / 32 != (u32)warp)
        report("RACE shared read after write, no barrier", at, warp, lane, address);
      else if (byte.write_epoch == epoch && byte.write_thread != self && !wgmma &&
               byte.write_warp_epoch == warp_epoch)
        report("WARP shared read after write within a warp, no bar.warp.sync", at, warp, lane,
               address);
      if (wgmma && byte.proxy != ASYNC) check_proxy(at, warp, lane, address, byte);
      if (byte.read_epoch != epoch) {
        byte.read_epoch = epoch;
        byte.read_warps = 0;
        byte.read_thread = self;
        byte.read_warp_epoch = warp_epoch;
      }
      byte.read_warps |= 1u << warp;
      if (byte.read_thread != self) byte.read_thread = SEVERAL;
      byte.read_warp_epoch = std::max(byte.read_warp_epoch, warp_epoch);
    }
  }

  // A fence orders the proxies by the writer, or by anybody in an epoch behind the barrier.
  void check_proxy(const Instruction& at, int warp, int lane, u32 address, const SharedByte& byte) {
    u32 fence_behind_barrier = last_fence < epoch ? last_fence : fence_before;
    if (warps[warp].fence_epoch > byte.write_epoch || fence_behind_barrier > byte.write_epoch)
      return;
    report(byte.proxy == CP_ASYNC_PROXY
               ? "PROXY wgmma reads what cp.async wrote, no fence.proxy.async"
               : "PROXY wgmma reads what generic stores wrote, no fence.proxy.async",
           at, warp, lane, address);
  }

  // Checks a write to one byte; `lands` is false for a `cp.async` that only begins.
  void check_shared_write(const Instruction& at, int warp, int lane, u32 address,
                          const SharedByte& byte, bool same, bool lands) {
    bool other_writer = byte.write_thread / 32 != (u32)warp;
    bool read_here = byte.read_epoch == epoch;
    if (byte.write_epoch == epoch && other_writer && byte.written && !same)
      report("RACE shared write after write, no barrier", at, warp, lane, address);
    if (read_here && (byte.read_warps & ~(1u << warp)))
      report("RACE shared write after read, no barrier", at, warp, lane, address);
    else if (read_here && lands && (byte.read_warps >> warp & 1) &&
             byte.read_warp_epoch == warps[warp].epoch &&
             byte.read_thread != (u32)(warp * 32 + lane))
      report("WARP shared write after read within a warp, no bar.warp.sync", at, warp, lane,
             address);
    if (byte.in_flight)
      report("RACE shared write while a wgmma in flight reads", at, warp, lane, address);
    if (byte.pending)
      report("RACE shared write onto a pending cp.async", at, warp, lane, address);
  }

  // Writes shared memory. Two warps that write the same values are no race: Triton does that.
  void shared_write(const Instruction& at, int warp, int lane, u32 address, const u8* values,
                    u32 bytes, Proxy proxy = GENERIC) {
    for (u32 i = 0; i < bytes; i++) {
      SharedByte& byte = state(address + i);
      u8& cell = *shared_at(address + i);
      check_shared_write(at, warp, lane, address, byte, byte.written && values[i] == cell, true);
      cell = values[i];
      byte.write_epoch = epoch;
      byte.write_thread = warp * 32 + lane;
      byte.write_warp_epoch = warps[warp].epoch;
      byte.written = 1;
      if (byte.proxy == ASYNC) warps[warp].unfenced.push_back(address + i);
      byte.proxy = proxy;
    }
  }

  // A `cp.async` may write its destination from its issue on.
  void start_copy(const Instruction& at, int warp, int lane, const Copy& copy) {
    for (u32 i = 0; i < copy.bytes; i++) {
      SharedByte& byte = state(copy.destination + i);
      check_shared_write(at, warp, lane, copy.destination, byte, false, false);
      byte.pending = 1;
    }
  }

  // It has written its destination when it was waited for: here, at the latest moment.
  void finish_copy(const Instruction& at, int warp, const Copy& copy) {
    for (u32 i = 0; i < copy.bytes; i++) state(copy.destination + i).pending = 0;
    shared_write(at, warp, copy.thread & 31, copy.destination, copy.data, copy.bytes,
                 CP_ASYNC_PROXY);
  }

  void proxy_fence(int warp) {
    warps[warp].fence_epoch = epoch;
    if (last_fence < epoch) fence_before = last_fence;
    last_fence = epoch;
    for (u32 address : warps[warp].unfenced) state(address).proxy = ASYNC;
    warps[warp].unfenced.clear();
  }

  // Reports a wgmma whose registers were accessed since the last `wgmma.fence`. Another wgmma's
  // accesses do not count, nor do moves: LLVM puts copies there, which ptxas removes.
  void check_wgmma_fence(const Instruction& at, int warp, const i32* operands, int inputs) {
    const Warp& w = warps[warp];
    bool ordered = w.wgmma_fence;
    for (int i = 0; i < at.destination_count; i++)
      ordered &= w.accessed[operands[at.destinations + i]] <= w.wgmma_fence;
    for (int i = 0; i < inputs; i++)
      ordered &= w.accessed[operands[at.sources + i]] <= w.wgmma_fence;
    if (!ordered) report("REGISTER of a wgmma, no wgmma.fence since its access", at, warp, 0, 0);
  }

  // Reports accesses to registers that a wgmma in flight reads or writes.
  void check_registers(const Instruction& at, int warp, const i32* operands) {
    const std::vector<u8>& in_flight = warps[warp].in_flight;
    for (int i = 0; i < at.destination_count; i++) {
      i32 number = operands[at.destinations + i];
      if (number < 0 || !in_flight[number]) continue;
      report(in_flight[number] & 1 ? "REGISTER of a wgmma's A is written before its wait"
                                   : "REGISTER of a wgmma's result is written before its wait",
             at, warp, 0, 0);
    }
    for (int i = 0; i < at.source_count; i++)
      if (in_flight[operands[at.sources + i]] & 2)
        report("REGISTER of a wgmma's result is read before its wait", at, warp, 0, 0);
  }
};
