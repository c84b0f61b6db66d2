// The parts of runtime_ref/reference/mamba2.py and convolution.py that are not products, for one token.
import { exp4, silu4, softplus4, tree16 } from "./functions";

// x [channels] becomes silu of the causal convolution; weight [taps, channels], state [taps - 1, channels], oldest first.
export function convolve(weight: usize, bias: usize, state: usize, x: usize, channels: i32, taps: i32): void {
  const row = 4 * channels;
  for (let c = 0; c < row; c += 16) {
    const now = v128.load(x + c);
    let total = v128.load(bias + c);
    for (let tap = 0; tap < taps - 1; tap++) {
      total = f32x4.add(total, f32x4.mul(v128.load(weight + tap * row + c), v128.load(state + tap * row + c)));
    }
    total = f32x4.add(total, f32x4.mul(v128.load(weight + (taps - 1) * row + c), now));
    v128.store(x + c, silu4(total));
    for (let tap = 0; tap + 2 < taps; tap++) v128.store(state + tap * row + c, v128.load(state + (tap + 1) * row + c));
    if (taps > 1) v128.store(state + (taps - 2) * row + c, now);
  }
}

// dt [heads] = softplus(dt + bias), decay = exp(dt * a); both are padded to a multiple of 4.
export function steps(dt: usize, bias: usize, a: usize, decay: usize, heads: i32): void {
  for (let h = 0; h < 4 * heads; h += 16) {
    const step = softplus4(f32x4.add(v128.load(dt + h), v128.load(bias + h)));
    v128.store(dt + h, step);
    v128.store(decay + h, exp4(f32x4.mul(step, v128.load(a + h))));
  }
}

// y [heads, width]: h = h * decay + (dt * x) * b; y = sum16(h * c) + d * x. n, the length of a row, is a multiple of 4.
export function scan(
  state: usize, x: usize, b: usize, c: usize, dt: usize, decay: usize, d: usize, y: usize,
  heads: i32, width: i32, n: i32, groups: i32
): void {
  const each = heads / groups;
  for (let head = 0; head < heads; head++) {
    const from = 4 * n * (head / each);
    const fade = v128.load32_splat(decay + 4 * head);
    const step = load<f32>(dt + 4 * head), skip = load<f32>(d + 4 * head);
    for (let p = 0; p < width; p++, x += 4, y += 4, state += 4 * n) {
      const input = load<f32>(x);
      store<f32>(y, row(state, b + from, c + from, n, fade, f32x4.splat(step * input)) + skip * input);
    }
  }
}

// @ts-ignore: decorator
@inline function advance(state: usize, b: usize, fade: v128, step: v128): v128 {
  const h = f32x4.add(f32x4.mul(v128.load(state), fade), f32x4.mul(step, v128.load(b)));
  v128.store(state, h);
  return h;
}

// @ts-ignore: decorator
@inline function row(state: usize, b: usize, c: usize, n: i32, fade: v128, step: v128): f32 {
  let a0 = f32x4.splat(0), a1 = f32x4.splat(0), a2 = f32x4.splat(0), a3 = f32x4.splat(0);
  const whole: usize = 4 * (n & ~15), end: usize = 4 * n;
  let i: usize = 0;
  for (; i < whole; i += 64) {
    a0 = f32x4.add(a0, f32x4.mul(advance(state + i, b + i, fade, step), v128.load(c + i)));
    a1 = f32x4.add(a1, f32x4.mul(advance(state + i + 16, b + i + 16, fade, step), v128.load(c + i + 16)));
    a2 = f32x4.add(a2, f32x4.mul(advance(state + i + 32, b + i + 32, fade, step), v128.load(c + i + 32)));
    a3 = f32x4.add(a3, f32x4.mul(advance(state + i + 48, b + i + 48, fade, step), v128.load(c + i + 48)));
  }
  if (i < end) a0 = f32x4.add(a0, f32x4.mul(advance(state + i, b + i, fade, step), v128.load(c + i)));
  if (i + 16 < end) a1 = f32x4.add(a1, f32x4.mul(advance(state + i + 16, b + i + 16, fade, step), v128.load(c + i + 16)));
  if (i + 32 < end) a2 = f32x4.add(a2, f32x4.mul(advance(state + i + 32, b + i + 32, fade, step), v128.load(c + i + 32)));
  return tree16(a0, a1, a2, a3);
}

// y = y * silu(z).
export function gate(y: usize, z: usize, n: i32): void {
  for (let i = 0; i < 4 * n; i += 16) v128.store(y + i, f32x4.mul(v128.load(y + i), silu4(v128.load(z + i))));
}
