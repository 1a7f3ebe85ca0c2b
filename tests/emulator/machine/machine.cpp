// Executes decoded PTX warp by warp on the memory of this process. Called by execute.py.
#include "arithmetic.h"
#include "memory.h"
#include "tensor_cores.h"
#include "warp.h"

Machine::Machine(const Launch& launch)
    : launch(launch), warp_count(launch.warp_count), random(launch.seed) {
  code = launch.code;
  shared_bytes = launch.shared_bytes;
  find_range = launch.find_range;
  for (i64 i = 0; i < launch.code_size; i++) has_wgmma |= code[i].opcode == WGMMA;
  for (i64 i = 0; i < launch.range_count; i++)
    ranges.push_back({launch.ranges[2 * i], launch.ranges[2 * i + 1], {}, {}, {}, {}});
}

void Machine::branch(u32 live, u32 next) {
  each_lane(live, [&](int lane) {
    warp->pc[lane] = active >> lane & 1 ? (u32)at->immediate : next;
  });
  if (active && active != live) warp->converged = false;
}

// Executes one instruction of a warp: of its lanes with the lowest program counter.
void Machine::step(int number) {
  warp_number = number;
  warp = &warps[number];
  u32 live = warp->alive;
  u32 pc = warp->pc[std::countr_zero(live)];
  if (!warp->converged) {
    each_lane(warp->alive, [&](int lane) { pc = std::min(pc, warp->pc[lane]); });
    live = 0;
    each_lane(warp->alive, [&](int lane) { live |= (u32)(warp->pc[lane] == pc) << lane; });
    if (live == warp->alive) warp->converged = true;
  }
  if (pc >= (u32)launch.code_size) {
    warp->alive &= ~live;
    return;
  }
  at = &code[pc];
  executed++;
  executed_by_opcode[at->opcode]++;
  active = live;
  if (at->guard >= 0) {  // twice the register's number, plus one for a negated guard
    u64* predicate = warp->lanes(at->guard >> 1);
    bool negated = at->guard & 1;
    u32 holds = 0;
    for (int lane = 0; lane < 32; lane++) holds |= (u32)((predicate[lane] != 0) != negated) << lane;
    active &= holds;
  }
  if (active) launch.reached[pc] |= REACHED;
  if (at->guard >= 0 && active != live) at_edge();
  if (at->opcode == BRA) return branch(live, pc + 1);
  if (at->opcode == RET) end_lanes();
  each_lane(live, [&](int lane) { warp->pc[lane] = pc + 1; });
  if (active && at->opcode != RET) execute();
}

// Ends the active lanes; what they copy or multiply must have been waited for.
void Machine::end_lanes() {
  warp->alive &= ~active;
  each_lane(active, [&](int lane) {
    bool copies = !warp->open_copies[lane].empty();
    for (const auto& group : warp->copy_groups[lane]) copies |= !group.empty();
    if (copies) report("PENDING cp.async at the end", *at, warp_number, lane, 0);
  });
  if (warp->wgmma_in_flight) report("PENDING wgmma at the end", *at, warp_number, 0, 0);
}

void Machine::execute() {
  if (warp->wgmma_in_flight && at->opcode != WGMMA)
    check_registers(*at, warp_number, launch.operands);
  if (has_wgmma && at->opcode != WGMMA && at->opcode != MOV) note_accesses();
  bool done = true;
  if (at->opcode < LAST_ARITHMETIC) {
    done = arithmetic();
    if (at->flush && (at->type == F32 || at->type == F32X2)) {
      u64* d = destination(0);
      each_lane(active, [&](int lane) {
        d[lane] = at->type == F32 ? flush_f32(d[lane])
                                  : flush_f32(d[lane] >> 32) << 32 | flush_f32((u32)d[lane]);
      });
    }
  } else if (at->opcode < LAST_MEMORY) {
    done = memory();
  } else if (at->opcode < LAST_WARP) {
    done = warp_wide();
  } else {
    switch (at->opcode) {
      case MMA: mma(); break;
      case WGMMA: wgmma(); break;
      case WGMMA_COMMIT: wgmma_commit(); break;
      case WGMMA_WAIT: wgmma_wait(); break;
      case WGMMA_FENCE: warp->wgmma_fence = executed; break;
      case PROXY_FENCE: proxy_fence(warp_number); break;
      case GRID_WAIT:
        if (before_grid_wait) at_edge();
        warp->at_grid_wait = before_grid_wait;
        break;
      case TRAP:
        report("TRAP", *at, warp_number, std::countr_zero(active), 0);
        stopped = true;
        break;
      default: break;  // NO_EFFECT, GRID_TRIGGER
    }
  }
  if (!done) unsupported();
}

static void reset(Warp& warp, const Launch& launch) {
  if (warp.registers.empty())
    warp.registers.assign(launch.initial_registers,
                          launch.initial_registers + (size_t)launch.register_count * 32);
  std::fill(warp.pc, warp.pc + 32, 0);
  for (int lane = 0; lane < 32; lane++) {
    warp.open_copies[lane].clear();
    warp.copy_groups[lane].clear();
  }
  warp.alive = ALL_LANES;
  warp.converged = true;
  warp.at_barrier = warp.at_grid_wait = warp.wgmma_in_flight = false;
  warp.epoch = 1;
  warp.fence_epoch = 0;
  warp.open_reads.clear();
  warp.read_groups.clear();
  warp.open_uses.clear();
  warp.use_groups.clear();
  warp.in_flight.assign(launch.register_count, 0);
  warp.accessed.assign(launch.register_count, 0);
  warp.wgmma_fence = 0;
  warp.unfenced.clear();
}

// Runs each warp up to its next barrier, its end, or a time slice; returns whether any could run.
bool Machine::run_warps(std::vector<int>& order) {
  if (launch.order == SHUFFLED) std::shuffle(order.begin(), order.end(), random);
  bool any = false;
  for (int number : order) {
    Warp& w = warps[number];
    auto runs = [&] { return w.alive && !w.at_barrier && !w.at_grid_wait && !stopped; };
    any |= runs();
    u64 slice = launch.order == SHUFFLED ? 1 + random() % 200 : ~0ull;
    while (runs() && slice--) {
      step(number);
      if (launch.limit && executed > (u64)launch.limit) {
        report("LIMIT of instructions is exceeded", *at, number, 0, 0);
        stopped = true;
      }
    }
  }
  return any;
}

// Lets all warps pass the barrier at which they wait.
void Machine::release_barrier() {
  u32 barrier = ~0u;
  for (int i = 0; i < warp_count; i++) {
    Warp& w = warps[i];
    if (!w.alive) {
      report("BARRIER some warps have exited, others wait", code[0], i, 0, 0);
      continue;
    }
    if (barrier != ~0u && barrier != w.barrier)
      report("BARRIER warps wait at different ones", code[w.barrier], i, 0, 0);
    barrier = w.barrier;
  }
  epoch++;
  for (Warp& w : warps) {
    w.at_barrier = false;
    w.epoch++;
  }
}

// Runs one program. A dependent runs up to `griddepcontrol.wait` on the memory from before the
// primary's launch, which is the earliest moment at which hardware may run it.
void Machine::run_program() {
  epoch++;
  last_fence = fence_before = 0;
  shared.assign(shared_bytes + 16, 0xA5);
  shared_bytes_state.assign(shared_bytes + 16, SharedByte{});
  warps.resize(warp_count);
  std::vector<int> order;
  for (int i = 0; i < warp_count; i++) {
    reset(warps[i], launch);
    order.push_back(launch.order == BACKWARD ? warp_count - 1 - i : i);
  }
  auto primary_ends = [&] {
    if (before_grid_wait) exchange_primary();
    before_grid_wait = false;
  };
  before_grid_wait = launch.dependent && primary;
  if (before_grid_wait) exchange_primary();
  while (!stopped) {
    if (run_warps(order)) continue;
    bool waits_for_grid = false, alive = false;
    for (Warp& w : warps) {
      waits_for_grid |= w.at_grid_wait;
      alive |= w.alive != 0;
      w.at_grid_wait = false;
    }
    if (!alive) break;
    if (waits_for_grid) primary_ends();
    else release_barrier();
  }
  primary_ends();
}

// The last launch that completed, for a dependent that follows.
static std::vector<GlobalRange> last_ranges;
static std::string last_name;
static Machine* current = nullptr;

#define NAMES_OF(...) #__VA_ARGS__
#define NAMES(list) NAMES_OF(list)

extern "C" {
const char* opcode_names() { return NAMES((OPCODES)); }
const char* type_names() { return NAMES((TYPES)); }

// Called by `find_range` while a launch runs.
void add_range(u64 low, u64 high) { current->ranges.push_back({low, high, {}, {}, {}, {}}); }

void clear_last_launch() { last_ranges.clear(); }

// Runs a launch; returns the number of reports. `counts`: instructions, then those of each opcode.
int run(const Launch* launch) {
  Machine machine(*launch);
  current = &machine;
  if (launch->dependent && !last_ranges.empty()) {
    machine.primary = &last_ranges;
    machine.primary_name = last_name;
  }
  u32 programs = launch->grid[0] * launch->grid[1] * launch->grid[2];
  std::vector<u32> order;
  for (u32 i = 0; i < programs; i++)
    order.push_back(launch->order == BACKWARD ? programs - 1 - i : i);
  if (launch->order == SHUFFLED) std::shuffle(order.begin(), order.end(), machine.random);
  for (u32 program : order) {
    machine.program = program;
    machine.program_ids[0] = program % launch->grid[0];
    machine.program_ids[1] = program / launch->grid[0] % launch->grid[1];
    machine.program_ids[2] = program / launch->grid[0] / launch->grid[1];
    machine.run_program();
    if (machine.stopped) break;
  }
  size_t size = std::min<size_t>(machine.reports.size(), launch->report_bytes - 1);
  memcpy(launch->reports, machine.reports.data(), size);
  launch->reports[size] = 0;
  launch->counts[0] = machine.executed;
  for (int i = 0; i < OPCODE_COUNT; i++) launch->counts[1 + i] = machine.executed_by_opcode[i];
  last_ranges = std::move(machine.ranges);
  last_name = launch->name;
  current = nullptr;
  return machine.report_count;
}
}
