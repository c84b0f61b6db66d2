// The functions of docs/numerics.md on four fp32 lanes, operation for operation as runtime_ref/reference/functions.py.
// WebAssembly's SIMD has no fused multiply-add, and its sums, products, quotients and roots are IEEE's.

const MAGIC: f32 = 12582912.0; // 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, halves to even
const MAGIC_BITS: i32 = 0x4b400000;
const TINY: f32 = 7.888609052210118e-31; // 2^-100

// @ts-ignore: decorator
@inline function c(value: f32): v128 {
  return f32x4.splat(value);
}

// @ts-ignore: decorator
@inline function horner(p: v128, r: v128, coefficient: f32): v128 {
  return f32x4.add(f32x4.mul(p, r), c(coefficient));
}

// @ts-ignore: decorator
@inline export function exp4(value: v128): v128 {
  let x = f32x4.pmin(f32x4.pmax(value, c(-87.0)), c(88.0)); // NaN stays
  const shifted = f32x4.add(f32x4.mul(x, c(1.44269504088896341)), c(MAGIC));
  const n = f32x4.sub(shifted, c(MAGIC));
  let r = f32x4.sub(x, f32x4.mul(n, c(0.693359375)));
  r = f32x4.sub(r, f32x4.mul(n, c(-2.1219444e-4)));
  let p = horner(c(1.98756915e-4), r, 1.3981999507e-3);
  p = horner(p, r, 8.3334519073e-3);
  p = horner(p, r, 4.1665795894e-2);
  p = horner(p, r, 1.6666665459e-1);
  p = horner(p, r, 5.0000001201e-1);
  p = f32x4.add(f32x4.mul(p, f32x4.mul(r, r)), r);
  p = f32x4.add(p, c(1.0));
  const exponent = i32x4.sub(shifted, i32x4.splat(MAGIC_BITS - 127));
  return f32x4.mul(p, i32x4.shl(exponent, 23));
}

function log1p4(y: v128): v128 {
  const u = f32x4.add(c(1.0), y);
  const correction = f32x4.div(f32x4.sub(y, f32x4.sub(u, c(1.0))), u);
  const exponent = i32x4.sub(i32x4.shr_s(u, 23), i32x4.splat(127));
  let m = v128.or(v128.and(u, i32x4.splat(0x7fffff)), i32x4.splat(0x3f800000));
  const high = f32x4.gt(m, c(1.41421356));
  m = v128.bitselect(f32x4.mul(m, c(0.5)), m, high);
  const e = f32x4.convert_i32x4_s(i32x4.sub(exponent, high)); // `high` is -1 where it holds
  const r = f32x4.sub(m, c(1.0));
  const z = f32x4.mul(r, r);
  let p = horner(c(7.0376836292e-2), r, -1.151461031e-1);
  p = horner(p, r, 1.167699874e-1);
  p = horner(p, r, -1.2420140846e-1);
  p = horner(p, r, 1.4249322787e-1);
  p = horner(p, r, -1.6668057665e-1);
  p = horner(p, r, 2.0000714765e-1);
  p = horner(p, r, -2.4999993993e-1);
  p = horner(p, r, 3.3333331174e-1);
  p = f32x4.mul(f32x4.mul(p, r), z);
  p = f32x4.add(p, f32x4.mul(e, c(-2.1219444e-4)));
  p = f32x4.sub(p, f32x4.mul(c(0.5), z));
  return f32x4.add(f32x4.add(f32x4.add(r, p), f32x4.mul(e, c(0.693359375))), correction);
}

export function softplus4(x: v128): v128 {
  return v128.bitselect(x, log1p4(exp4(x)), f32x4.gt(x, c(20.0)));
}

// @ts-ignore: decorator
@inline export function silu4(x: v128): v128 {
  return f32x4.div(x, f32x4.add(c(1.0), exp4(f32x4.neg(x))));
}

// The tree over sum16's sixteen lanes, four vectors: + 8, + 4, + 2, + 1.
// @ts-ignore: decorator
@inline export function tree16(a0: v128, a1: v128, a2: v128, a3: v128): f32 {
  let s = f32x4.add(f32x4.add(a0, a2), f32x4.add(a1, a3));
  s = f32x4.add(s, i32x4.shuffle(s, s, 2, 3, 2, 3));
  return f32x4.extract_lane(s, 0) + f32x4.extract_lane(s, 1);
}

// Four fp16 scales, normal or zero, as fp32: exact.
// @ts-ignore: decorator
@inline export function scales4(at: usize): v128 {
  const bits = v128.load_zero<u64>(at);
  const wide = i32x4.extend_low_i16x8_u(bits);
  const sign = v128.and(i32x4.shl(wide, 16), i32x4.splat(<i32>0x80000000));
  const rest = i32x4.shl(v128.and(wide, i32x4.splat(0x7fff)), 13);
  return v128.or(f32x4.mul(rest, c(5.192296858534828e33)), sign); // 2^112
}

// @ts-ignore: decorator
@inline export function scale1(bits: u32): f32 {
  const rest = reinterpret<f32>((bits & 0x7fff) << 13) * <f32>5.192296858534828e33;
  return bits & 0x8000 ? -rest : rest;
}

// 1 where all n values, a multiple of 4, are finite.
export function finite(x: usize, n: i32): i32 {
  let bad = i32x4.splat(0);
  const inf = i32x4.splat(0x7f800000);
  for (let i = 0; i < n; i += 4) {
    bad = v128.or(bad, i32x4.ge_s(v128.and(v128.load(x + 4 * i), i32x4.splat(0x7fffffff)), inf));
  }
  return v128.any_true(bad) ? 0 : 1;
}

export function add(x: usize, y: usize, n: i32): void {
  for (let i = 0; i < n; i += 4) v128.store(x + 4 * i, f32x4.add(v128.load(x + 4 * i), v128.load(y + 4 * i)));
}

// out = rms_norm(x, weight) over n values; mean and root in fp64.
export function rmsNorm(x: usize, weight: usize, n: i32, eps: f32, out: usize): void {
  const lanes = memory.data(128, 16);
  memory.fill(lanes, 0, 128);
  const whole = n & ~15;
  for (let half = 0; half < 16; half += 4) {
    let low = f64x2.splat(0), high = f64x2.splat(0);
    for (let i = half; i < whole; i += 16) {
      const v = v128.load(x + 4 * i);
      const a = f64x2.promote_low_f32x4(v);
      const b = f64x2.promote_low_f32x4(i32x4.shuffle(v, v, 2, 3, 2, 3));
      low = f64x2.add(low, f64x2.mul(a, a));
      high = f64x2.add(high, f64x2.mul(b, b));
    }
    v128.store(lanes + 8 * half, low);
    v128.store(lanes + 8 * half + 16, high);
  }
  for (let i = whole; i < n; i++) {
    const v = <f64>load<f32>(x + 4 * i);
    const at = lanes + 8 * (i & 15);
    store<f64>(at, load<f64>(at) + v * v);
  }
  for (let half = 8; half >= 1; half >>= 1) {
    for (let j = 0; j < half; j++) {
      store<f64>(lanes + 8 * j, load<f64>(lanes + 8 * j) + load<f64>(lanes + 8 * (j + half)));
    }
  }
  const mean = load<f64>(lanes) / <f64>n;
  const inverse = <f32>(1.0 / sqrt<f64>(mean + <f64>eps));
  const s = f32x4.splat(inverse);
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    v128.store(out + 4 * i, f32x4.mul(f32x4.mul(v128.load(x + 4 * i), s), v128.load(weight + 4 * i)));
  }
  for (; i < n; i++) store<f32>(out + 4 * i, load<f32>(x + 4 * i) * inverse * load<f32>(weight + 4 * i));
}

// x [k] in blocks as int16 q [k], and for each block an fp32 scale and the sum of its q.
export function quantize(x: usize, k: i32, block: i32, q: usize, scales: usize, sums: usize): void {
  const levels: f32 = 32512.0;
  for (let b = 0; b * block < k; b++) {
    const from = x + 4 * b * block;
    let most = i32x4.splat(0);
    for (let i = 0; i < block; i += 4) {
      most = i32x4.max_s(most, v128.and(v128.load(from + 4 * i), i32x4.splat(0x7fffffff)));
    }
    most = i32x4.max_s(most, i32x4.shuffle(most, most, 2, 3, 2, 3));
    const bits = max(i32x4.extract_lane(most, 0), i32x4.extract_lane(most, 1));
    const amax = reinterpret<f32>(bits);
    const isFinite = bits < 0x7f800000;
    const used = isFinite && amax >= TINY;
    store<f32>(scales + 4 * b, used ? amax / levels : isFinite ? <f32>0.0 : f32.NaN);
    if (!used) {
      memory.fill(q + 2 * b * block, 0, 2 * block);
      store<i32>(sums + 4 * b, 0);
      continue;
    }
    const inverse = c(levels / amax);
    let sum = i32x4.splat(0);
    for (let i = 0; i < block; i += 8) {
      const low = rounded(v128.load(from + 4 * i), inverse);
      const high = rounded(v128.load(from + 4 * i + 16), inverse);
      v128.store(q + 2 * (b * block + i), i16x8.narrow_i32x4_s(low, high));
      sum = i32x4.add(sum, i32x4.add(low, high));
    }
    sum = i32x4.add(sum, i32x4.shuffle(sum, sum, 2, 3, 2, 3));
    store<i32>(sums + 4 * b, i32x4.extract_lane(sum, 0) + i32x4.extract_lane(sum, 1));
  }
}

// @ts-ignore: decorator
@inline function rounded(x: v128, inverse: v128): v128 {
  return i32x4.sub(f32x4.add(f32x4.mul(x, inverse), c(MAGIC)), i32x4.splat(MAGIC_BITS));
}
