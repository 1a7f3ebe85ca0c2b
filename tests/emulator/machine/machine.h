// Executes one warp's instructions; the other headers have the instructions by subject.
#pragma once
#include "checks.h"

// What execute.py passes; every field has 8 bytes.
struct Launch {
  const Instruction* code;
  i64 code_size;
  const i32* operands;
  i64 register_count;
  const u64* initial_registers;
  i64 warp_count;
  i64 shared_bytes;
  i64 grid[3];
  const u64* ranges;
  i64 range_count;
  FindRange find_range;
  const u8* parameters;
  u8* reached;
  i64 order;
  i64 seed;
  i64 limit;
  i64 dependent;
  const char* name;
  char* reports;
  i64 report_bytes;
  u64* counts;
};

enum Order { FORWARD, SHUFFLED, BACKWARD };

// What `reached` has of an instruction. AT_EDGE: its guard excluded a lane; a cp.async copied less
// than its size; a setp compared equal operands; a selp chose its first operand;
// or a wait had something to wait for.
enum Reached : u8 { REACHED = 1, AT_EDGE = 2 };

struct Machine : Checks {
  const Launch& launch;
  int warp_count;
  bool has_wgmma = false;
  std::mt19937 random;
  u64 executed = 0;
  u64 executed_by_opcode[OPCODE_COUNT] = {};
  // The current instruction, its warp, and the lanes for which its guard holds.
  const Instruction* at = nullptr;
  int warp_number = 0;
  Warp* warp = nullptr;
  u32 active = 0;
  u64 flushed[4][32];

  explicit Machine(const Launch& launch);
  void run_program();
  bool run_warps(std::vector<int>& order);
  void release_barrier();
  void step(int number);
  void branch(u32 live, u32 next);
  void end_lanes();
  void execute();
  bool arithmetic();
  bool memory();
  bool warp_wide();
  void mma();
  void wgmma();
  void wgmma_commit();
  void wgmma_wait();
  void note_accesses();

  // Operands of the current instruction. Denormals are flushed where it says so.
  i32 destination_number(int i) { return launch.operands[at->destinations + i]; }
  i32 source_number(int i) { return launch.operands[at->sources + i]; }
  u64* destination(int i) { return warp->lanes(destination_number(i)); }
  bool is_sink(int i) { return i >= at->destination_count || destination_number(i) < 0; }
  u64* source(int i) { return warp->lanes(source_number(i)); }

  u64* operand(int i) {
    if (!at->flush) return source(i);
    u64* from = source(i);
    for (int lane = 0; lane < 32; lane++) {
      u64 value = from[lane];
      flushed[i][lane] = at->type == F32X2 ? flush_f32(value >> 32) << 32 | flush_f32((u32)value)
                                           : flush_f32(value);
    }
    return flushed[i];
  }

  void at_edge() { launch.reached[at - code] |= AT_EDGE; }

  void unsupported() {
    report("UNSUPPORTED instruction", *at, warp_number, 0, 0);
    stopped = true;
  }

  void check_converged(const char* kind) {
    if (active != warp->alive) report(kind, *at, warp_number, 0, 0);
  }
};
