// Instructions that compute each lane's result from its own registers.
#pragma once
#include "machine.h"

// Applies f to the lanes' operands, which are 64-bit patterns.
template <class F> void map1(Machine& m, F f) {
  u64 *d = m.destination(0), *a = m.operand(0);
  each_lane(m.active, [&](int lane) { d[lane] = f(a[lane]); });
}
template <class F> void map2(Machine& m, F f) {
  u64 *d = m.destination(0), *a = m.operand(0), *b = m.operand(1);
  each_lane(m.active, [&](int lane) { d[lane] = f(a[lane], b[lane]); });
}
template <class F> void map3(Machine& m, F f) {
  u64 *d = m.destination(0), *a = m.operand(0), *b = m.operand(1), *c = m.operand(2);
  each_lane(m.active, [&](int lane) { d[lane] = f(a[lane], b[lane], c[lane]); });
}

template <class T, class F> void integers_of(Machine& m, F f) {
  using Unsigned = std::make_unsigned_t<T>;
  map2(m, [&](u64 a, u64 b) -> u64 { return (Unsigned)(T)f((T)a, (T)b); });
}

// Applies f to two integers of the instruction's type; false for another type.
template <class F> bool integers(Machine& m, F f) {
  switch (m.at->type) {
    case U16: integers_of<u16>(m, f); return true;
    case S16: integers_of<int16_t>(m, f); return true;
    case U32: integers_of<u32>(m, f); return true;
    case S32: integers_of<i32>(m, f); return true;
    case U64: integers_of<u64>(m, f); return true;
    case S64: integers_of<i64>(m, f); return true;
    default: return false;
  }
}

// Applies f to two halves of each operand.
template <int BITS, class F> u64 packed(F f, u64 a, u64 b, u64 c) {
  u64 low = (1ull << BITS) - 1;
  u64 upper = f(a >> BITS & low, b >> BITS & low, c >> BITS & low);
  return upper << BITS | f(a & low, b & low, c & low);
}

// Applies f to numbers of the instruction's floating-point type; false for another type. f takes
// three numbers, of which an instruction of two operands ignores the last. The result of a 16-bit
// type is rounded from fp64 where f returns one, else from fp32.
template <class F> bool floats(Machine& m, int operands, F f) {
  auto half = [&](u64 a, u64 b, u64 c) -> u64 {
    return float_to_half((float)f(half_to_float(a), half_to_float(b), half_to_float(c)));
  };
  auto bf16 = [&](u64 a, u64 b, u64 c) -> u64 {
    return float_to_bf16((float)f(bf16_to_float(a), bf16_to_float(b), bf16_to_float(c)));
  };
  auto single = [&](u64 a, u64 b, u64 c) -> u64 {
    return bits_of((float)f(as_f32(a), as_f32(b), as_f32(c)));
  };
  auto twice = [&](u64 a, u64 b, u64 c) -> u64 {
    return bits_of((double)f(as_f64(a), as_f64(b), as_f64(c)));
  };
  auto apply = [&](auto g) {
    if (operands == 3) map3(m, g);
    else map2(m, [&](u64 a, u64 b) { return g(a, b, (u64)0); });
    return true;
  };
  switch (m.at->type) {
    case F32: return apply(single);
    case F64: return apply(twice);
    case F16: return apply(half);
    case BF16: return apply(bf16);
    case F16X2: return apply([&](u64 a, u64 b, u64 c) { return packed<16>(half, a, b, c); });
    case BF16X2: return apply([&](u64 a, u64 b, u64 c) { return packed<16>(bf16, a, b, c); });
    case F32X2: return apply([&](u64 a, u64 b, u64 c) { return packed<32>(single, a, b, c); });
    default: return false;
  }
}

// Comparisons of `setp`, in the order of decode.py; UNORDERED is added where NaN compares true.
enum Comparison { EQ, NE, LT, LE, GT, GE, IS_NUMBER, IS_NAN, UNORDERED = 16 };

template <class T> bool compare(int comparison, T a, T b) {
  switch (comparison) {
    case EQ: return a == b;
    case NE: return a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    default: return a >= b;
  }
}

inline bool compare_floats(int comparison, double a, double b) {
  bool nan = a != a || b != b;
  if (comparison == IS_NUMBER) return !nan;
  if (comparison == IS_NAN) return nan;
  if (nan) return comparison >= UNORDERED;
  return compare(comparison % UNORDERED, a, b);
}

inline bool compare_values(int comparison, int type, u64 a, u64 b) {
  if (type >= F16) return compare_floats(comparison, number(type, a), number(type, b));
  if (is_signed(type)) return compare(comparison, (i64)extend(type, a), (i64)extend(type, b));
  return compare(comparison, extend(type, a), extend(type, b));
}

// setp: `a` compares; `b` combines with a predicate: 1 and, 2 or, 3 xor.
inline bool set_predicates(Machine& m) {
  const Instruction& at = *m.at;
  int type = at.type;
  u64 *a = m.operand(0), *b = m.operand(1);
  if (type == TF32 || type == E4M3X2 || type == F32X2) return false;
  if (type == F16X2 || type == BF16X2) {
    if (at.destination_count != 2 || at.b) return false;
    int half = type == F16X2 ? F16 : BF16;
    each_lane(m.active, [&](int lane) {
      for (int i = 0; i < 2; i++) {
        u64 x = a[lane] >> 16 * i & 0xffff, y = b[lane] >> 16 * i & 0xffff;
        if (!m.is_sink(i)) m.destination(i)[lane] = compare_values(at.a, half, x, y);
      }
    });
    return true;
  }
  u64* with = at.b ? m.source(2) : nullptr;
  each_lane(m.active, [&](int lane) {
    if (a[lane] == b[lane]) m.at_edge();
    bool result = compare_values(at.a, type, a[lane], b[lane]);
    bool other = with && with[lane];
    auto combined = [&](bool value) {
      switch (at.b) {
        case 1: return value && other;
        case 2: return value || other;
        case 3: return value != other;
        default: return value;
      }
    };
    if (!m.is_sink(0)) m.destination(0)[lane] = combined(result);
    if (!m.is_sink(1)) m.destination(1)[lane] = combined(!result);
  });
  return true;
}

inline double round_to_integer(double value, int rounding) {
  switch (rounding) {
    case ZERO: return std::trunc(value);
    case DOWN: return std::floor(value);
    case UP: return std::ceil(value);
    default: return std::nearbyint(value);
  }
}

// A number out of an integer type's range becomes its nearest end, NaN becomes zero.
inline u64 float_to_integer(int to, double value, int rounding) {
  if (value != value) return 0;
  value = round_to_integer(value, rounding);
  int bits = 8 * width(to);
  double low = is_signed(to) ? -std::ldexp(1., bits - 1) : 0;
  double end = std::ldexp(1., is_signed(to) ? bits - 1 : bits);
  u64 highest = is_signed(to) ? mask_of(to) >> 1 : mask_of(to);
  if (value >= end) return highest;
  value = std::max(value, low);
  return (value < 0 ? (u64)(i64)value : (u64)value) & mask_of(to);
}

// cvt between scalars: `a` is the source's type. The caller has set the rounding of the CPU.
inline u64 convert(const Instruction& at, u64 value) {
  int to = at.type, from = at.a;
  bool from_float = from >= F16, to_float = to >= F16;
  if (!from_float && to == S8) return (u16)(int8_t)value;  // extended to a register of 16 bits
  if (!from_float && !to_float) return extend(from, value) & mask_of(to);
  if (from_float && !to_float) return float_to_integer(to, number(from, value), at.rounding);
  if (to == TF32) {  // rounds half away from zero
    u32 bits = value;
    if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
    return bits & ~0x1fffu;
  }
  if (!from_float && to == F32)
    return is_signed(from) ? bits_of((float)(i64)extend(from, value))
                           : bits_of((float)extend(from, value));
  double x = number(from, value);
  if (at.c) x = round_to_integer(x, at.rounding);
  switch (to) {
    case F16: return float_to_half((float)x);
    case BF16: return float_to_bf16((float)x, at.rounding);
    case F32: return bits_of((float)x);
    default: return bits_of(x);
  }
}

// NaN only if both are.
template <class T> T minimum(T a, T b) {
  if (a != a) return b;
  return a < b || b != b ? a : b;
}

template <class T> T divide(T a, T b) {
  if (b == 0) return (T)-1;
  if (std::is_signed_v<T> && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T> T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == (T)-1) return 0;
  return a % b;
}

inline u64 multiply_high(int type, u64 a, u64 b) {
  switch (type) {
    case U16: case U32: return extend(type, a) * extend(type, b) >> 8 * width(type);
    case S16: case S32:
      return (u64)((i64)extend(type, a) * (i64)extend(type, b) >> 8 * width(type)) & mask_of(type);
    case U64: return (unsigned __int128)a * b >> 64;
    default: return (__int128)(i64)a * (i64)b >> 64;
  }
}

inline u64 shift_right(int type, u64 value, u32 by) {
  u32 bits = 8 * width(type);
  if (is_signed(type))
    return (u64)((i64)extend(type, value) >> std::min(by, bits - 1)) & mask_of(type);
  return by >= bits ? 0 : extend(type, value) >> by;
}

inline u64 extract_bits(int type, u64 value, u32 position, u32 length) {
  u32 bits = 8 * width(type);
  u64 sign = 0;
  if (is_signed(type) && length) sign = value >> std::min(position + length - 1, bits - 1) & 1;
  u64 result = 0;
  for (u32 i = 0; i < bits; i++) {
    bool inside = i < length && position + i < bits;
    result |= (inside ? value >> (position + i) & 1 : sign) << i;
  }
  return result;
}

inline u64 permute_bytes(u64 a, u64 b, u64 selectors) {
  u64 both = (a & 0xffffffff) | b << 32;
  u64 result = 0;
  for (int i = 0; i < 4; i++) {
    int selector = selectors >> 4 * i & 15;
    u8 byte = both >> 8 * (selector & 7);
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= (u64)byte << 8 * i;
  }
  return result;
}

inline u64 sign_bits(int type) {
  switch (type) {
    case F32: return 1ull << 31;
    case F64: return 1ull << 63;
    case F16: case BF16: return 0x8000;
    case F16X2: case BF16X2: return 0x80008000;
    default: return 0x8000000080000000;  // F32X2
  }
}

// Sets the CPU's rounding for the floating-point operations of one instruction.
struct RoundingScope {
  bool changed;
  explicit RoundingScope(int rounding) : changed(rounding != NEAREST) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (changed) std::fesetround(modes[rounding]);
  }
  ~RoundingScope() {
    if (changed) std::fesetround(FE_TONEAREST);
  }
};

inline bool Machine::arithmetic() {
  Machine& m = *this;
  RoundingScope scope(at->rounding);
  int type = at->type;
  u64 mask = mask_of(type);
  u32 bits = 8 * width(type);
  bool is_float = type >= F16;
  auto f32 = [&](auto f) {
    map1(m, [&](u64 a) { return bits_of((float)f(as_f32(a))); });
    return type == F32;
  };
  switch (at->opcode) {
    case MOV: map1(m, [](u64 a) { return a; }); return true;
    case SREG: {  // `immediate` is the special register, in the order of decode.py
      u64* d = destination(0);
      int k = at->immediate;
      u64 constants[] = {0,           0, 0, program_ids[0], program_ids[1], program_ids[2],
                         (u64)launch.grid[0], (u64)launch.grid[1], (u64)launch.grid[2],
                         (u64)warp_count * 32, 1, 1, 0, (u64)warp_number, shared_bytes};
      each_lane(active, [&](int lane) {
        d[lane] = k == 0 ? warp_number * 32 + lane : k == 12 ? lane : constants[k];
      });
      return true;
    }
    case PACK: {
      int part = bits / at->source_count;
      u64* d = destination(0);
      each_lane(active, [&](int lane) {
        u64 value = 0;
        for (int i = 0; i < at->source_count; i++)
          value |= (source(i)[lane] & ((1ull << part) - 1)) << part * i;
        d[lane] = value;
      });
      return true;
    }
    case UNPACK: {
      int part = bits / at->destination_count;
      each_lane(active, [&](int lane) {
        u64 value = source(0)[lane];
        for (int i = 0; i < at->destination_count; i++)
          if (!is_sink(i)) destination(i)[lane] = value >> part * i & ((1ull << part) - 1);
      });
      return true;
    }
    case ADD:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return a + b; });
      return integers(m, [](auto a, auto b) { return (u64)a + (u64)b; });
    case SUB:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return a - b; });
      return integers(m, [](auto a, auto b) { return (u64)a - (u64)b; });
    case MUL:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return a * b; });
      return integers(m, [](auto a, auto b) { return (u64)a * (u64)b; });
    case FMA:
      if (type == F32 || type == F64 || type == F32X2)
        return floats(m, 3, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
      return floats(m, 3, [](double a, double b, double c) { return a * b + c; });
    case DIV:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return a / b; });
      return integers(m, [](auto a, auto b) { return divide(a, b); });
    case REM: return integers(m, [](auto a, auto b) { return remainder_of(a, b); });
    case MIN:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return minimum(a, b); });
      return integers(m, [](auto a, auto b) { return a < b ? a : b; });
    case MAX:
      if (is_float) return floats(m, 2, [](auto a, auto b, auto) { return -minimum(-a, -b); });
      return integers(m, [](auto a, auto b) { return a > b ? a : b; });
    case MULHI:
      map2(m, [&](u64 a, u64 b) { return multiply_high(type, a, b); });
      return true;
    case MADHI:
      map3(m, [&](u64 a, u64 b, u64 c) { return (multiply_high(type, a, b) + c) & mask; });
      return true;
    case MULWIDE: {
      u64 wide = bits == 16 ? 0xffffffff : ~0ull;
      map2(m, [&](u64 a, u64 b) { return extend(type, a) * extend(type, b) & wide; });
      return true;
    }
    case MADWIDE: {
      u64 wide = bits == 16 ? 0xffffffff : ~0ull;
      map3(m, [&](u64 a, u64 b, u64 c) { return (extend(type, a) * extend(type, b) + c) & wide; });
      return true;
    }
    case MAD: map3(m, [&](u64 a, u64 b, u64 c) { return (a * b + c) & mask; }); return true;
    case ABS:
      if (is_float) map1(m, [&](u64 a) { return a & ~sign_bits(type); });
      else map1(m, [&](u64 a) { return ((i64)extend(type, a) < 0 ? 0 - a : a) & mask; });
      return true;
    case NEG:
      if (is_float) map1(m, [&](u64 a) { return a ^ sign_bits(type); });
      else map1(m, [&](u64 a) { return (0 - a) & mask; });
      return true;
    case AND: map2(m, [](u64 a, u64 b) { return a & b; }); return true;
    case OR: map2(m, [](u64 a, u64 b) { return a | b; }); return true;
    case XOR: map2(m, [](u64 a, u64 b) { return a ^ b; }); return true;
    case NOT: map1(m, [&](u64 a) { return ~a & (type == PRED ? 1 : mask); }); return true;
    case SHL:
      map2(m, [&](u64 a, u64 b) { return (u32)b >= bits ? 0 : a << (u32)b & mask; });
      return true;
    case SHR: map2(m, [&](u64 a, u64 b) { return shift_right(type, a, b); }); return true;
    case SHF_L: case SHF_R:  // `a`: 1 clamps the distance, 0 wraps it
      map3(m, [&](u64 a, u64 b, u64 c) -> u64 {
        u64 both = (a & 0xffffffff) | b << 32;
        u32 by = at->a ? std::min<u32>(c, 32) : c & 31;
        if (at->opcode == SHF_R) return (u32)(both >> by);
        return (u32)((both << by) >> 32);
      });
      return true;
    case BFE:
      map3(m, [&](u64 a, u64 b, u64 c) { return extract_bits(type, a, b & 255, c & 255); });
      return true;
    case POPC: map1(m, [](u64 a) { return std::popcount(a); }); return true;
    case CLZ: map1(m, [&](u64 a) { return std::countl_zero(a & mask) - 64 + bits; }); return true;
    case PRMT: map3(m, [](u64 a, u64 b, u64 c) { return permute_bytes(a, b, c); }); return true;
    case SELP:
      map3(m, [&](u64 a, u64 b, u64 c) {
        if (c) at_edge();
        return c ? a : b;
      });
      return true;
    case SETP: return set_predicates(m);
    case CVT:  // `a` is the source's type; `c`: 1 rounds to an integral number
      map1(m, [&](u64 a) { return convert(*at, a); });
      return true;
    case CVT_PACK:  // two fp32 numbers, the first one into the upper half; `c`: 1 is relu
      map2(m, [&](u64 a, u64 b) {
        auto half = [&](float value) -> u64 {
          if (at->c && !(value > 0) && value == value) value = 0;
          return type == F16X2 ? float_to_half(value) : float_to_bf16(value, at->rounding);
        };
        return half(as_f32(a)) << 16 | half(as_f32(b));
      });
      return true;
    case CVT_E4M3:
      map1(m, [](u64 a) {
        return (u64)float_to_half(e4m3_to_float(a >> 8)) << 16 | float_to_half(e4m3_to_float(a));
      });
      return true;
    case RCP: return f32([](float a) { return 1.f / a; });
    case SQRT: return f32([](float a) { return std::sqrt(a); });
    case RSQRT: return f32([](float a) { return 1.f / std::sqrt(a); });
    case EX2: return f32([](float a) { return std::exp2(a); });
    case LG2: return f32([](float a) { return std::log2(a); });
    case TANH: return f32([](float a) { return std::tanh(a); });
    case CREATE_POLICY: {
      u64* d = destination(0);
      each_lane(active, [&](int lane) { d[lane] = 0; });
      return true;
    }
    default: return false;
  }
}
