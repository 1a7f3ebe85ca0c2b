// The decoded form of a kernel, and conversions between bit patterns and numbers.
#pragma once
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

// decode.py asks the library for these names, in this order.
#define OPCODES                                                                                  \
  MOV, SREG, PACK, UNPACK, ADD, SUB, MUL, MULHI, MULWIDE, MAD, MADHI, MADWIDE, FMA, DIV, REM,    \
  MIN, MAX, ABS, NEG, AND, OR, XOR, NOT, SHL, SHR, SHF_L, SHF_R, BFE, POPC, CLZ, PRMT,           \
  SELP, SETP, CVT, CVT_PACK, CVT_E4M3, RCP, SQRT, RSQRT, EX2, LG2, TANH,                         \
  CREATE_POLICY, LAST_ARITHMETIC,                                                                \
  LD_PARAM, LD_GLOBAL, ST_GLOBAL, LD_SHARED, ST_SHARED, CP_ASYNC, CP_ASYNC_COMMIT,               \
  CP_ASYNC_WAIT, LDMATRIX, STMATRIX, LAST_MEMORY,                                                \
  SHFL, REDUX, BAR_SYNC, BAR_WARP_SYNC, LAST_WARP, MMA, WGMMA, WGMMA_COMMIT,                     \
  WGMMA_WAIT, WGMMA_FENCE, PROXY_FENCE, GRID_WAIT, GRID_TRIGGER, NO_EFFECT, TRAP, BRA, RET,      \
  OPCODE_COUNT
enum Opcode { OPCODES };

#define TYPES                                                                                    \
  PRED, U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, F32, F64, F16X2, BF16X2, TF32, E4M3X2,  \
  F32X2
enum Type { TYPES };

// Rounding modes of `rounding`, in the order of decode.py.
enum Rounding { NEAREST, ZERO, DOWN, UP };

// `destinations` and `sources` are places in the operand list; an operand is a register's number,
// or -1 for the sink `_`. `a`, `b` and `c` are modifiers: each opcode says which.
struct Instruction {
  i32 opcode, type, a, b, c, rounding, flush, guard;
  i32 destinations, destination_count, sources, source_count, line, file;
  i64 immediate;
};

constexpr u32 ALL_LANES = ~0u;
constexpr u64 SHARED_BASE = 1024;

inline int width(int type) {
  switch (type) {
    case PRED: case U8: case S8: return 1;
    case U16: case S16: case F16: case BF16: case E4M3X2: return 2;
    case U64: case S64: case F64: case F32X2: return 8;
    default: return 4;
  }
}

inline u64 mask_of(int type) {
  return width(type) == 8 ? ~0ull : (1ull << 8 * width(type)) - 1;
}

inline bool is_signed(int type) {
  return type == S8 || type == S16 || type == S32 || type == S64;
}

// Returns an integer of a type, extended to 64 bits.
inline u64 extend(int type, u64 value) {
  switch (type) {
    case S8: return (i64)(int8_t)value;
    case S16: return (i64)(int16_t)value;
    case S32: return (i64)(i32)value;
    default: return value & mask_of(type);
  }
}

inline float as_f32(u64 bits) { return std::bit_cast<float>((u32)bits); }
inline u64 bits_of(float value) { return std::bit_cast<u32>(value); }
inline double as_f64(u64 bits) { return std::bit_cast<double>(bits); }
inline u64 bits_of(double value) { return std::bit_cast<u64>(value); }
inline float half_to_float(u16 bits) { return (float)std::bit_cast<_Float16>(bits); }
inline u16 float_to_half(float value) { return std::bit_cast<u16>((_Float16)value); }
inline float bf16_to_float(u16 bits) { return as_f32((u64)bits << 16); }

inline u16 float_to_bf16(float value, int rounding = NEAREST) {
  u32 bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  if (rounding == NEAREST) bits += 0x7fff + (bits >> 16 & 1);
  return bits >> 16;
}

inline float e4m3_to_float(u8 bits) {
  int exponent = bits >> 3 & 15;
  int mantissa = bits & 7;
  float value = exponent ? std::ldexp(1 + mantissa / 8.f, exponent - 7)
                         : std::ldexp(mantissa / 8.f, -6);
  if (exponent == 15 && mantissa == 7) value = NAN;
  return bits >> 7 ? -value : value;
}

// Replaces a denormal fp32 number by zero of its sign.
inline u64 flush_f32(u64 bits) {
  return bits & 0x7f800000 ? bits : bits & 0x80000000;
}

// One element of a tensor core's operand; `place` counts elements within a 32-bit register.
inline double element(int type, u64 bits, int place = 0) {
  switch (type) {
    case F16: return half_to_float(bits >> 16 * place);
    case BF16: return bf16_to_float(bits >> 16 * place);
    case TF32: return as_f32(bits & ~0x1fffull);
    default: return e4m3_to_float(bits >> 8 * place);
  }
}

// A scalar of any type as a number.
inline double number(int type, u64 bits) {
  switch (type) {
    case F16: return half_to_float(bits);
    case BF16: return bf16_to_float(bits);
    case F32: case TF32: return as_f32(bits);
    case F64: return as_f64(bits);
    default: return is_signed(type) ? (double)(i64)extend(type, bits) : (double)extend(type, bits);
  }
}

template <class F> void each_lane(u32 active, F&& f) {
  if (active == ALL_LANES) {
    for (int lane = 0; lane < 32; lane++) f(lane);
  } else {
    for (u32 rest = active; rest; rest &= rest - 1) f(std::countr_zero(rest));
  }
}
