// Products of a matrix [n, k] and one token's activations; 16 rows are interleaved, so that every lane owns a row.
// Ternary: for 16 columns, one 32-bit word a row: the codes + 1 of columns 2 j and 2 j + 1 in bits 2 j and 16 + 2 j.
// Q8_0: for a pair of columns, two bytes a row. Scales: fp16, 16 rows after one another, tile by tile, block by block.
import { scale1, scales4, tree16 } from "./functions";

// @ts-ignore: decorator
@inline function term(sum: v128, codes: v128, mask: i32, q: v128): v128 {
  return i32x4.add(sum, i32x4.dot_i16x8_s(v128.and(codes, i32x4.splat(mask)), q));
}

// Four of a word's eight pairs of columns are read where they lie, as codes times 4^j: a plane's sum stays below
// 2 * 4^3 * 32512 * 64 < 2^31.
// @ts-ignore: decorator
@inline function plane(
  words: usize, q: usize, group: i32, j: i32, t0: v128, t1: v128, t2: v128, t3: v128, totals: usize
): void {
  const mask = 0x00030003 << (2 * j);
  let a0 = i32x4.splat(0), a1 = i32x4.splat(0), a2 = i32x4.splat(0), a3 = i32x4.splat(0);
  const end = q + 2 * group;
  q += 4 * j;
  for (; q < end; q += 32, words += 64) {
    const q0 = v128.load32_splat(q), q1 = v128.load32_splat(q + 16);
    let w = v128.load(words);
    a0 = term(term(a0, w, mask, q0), i16x8.shr_u(w, 8), mask, q1);
    w = v128.load(words + 16);
    a1 = term(term(a1, w, mask, q0), i16x8.shr_u(w, 8), mask, q1);
    w = v128.load(words + 32);
    a2 = term(term(a2, w, mask, q0), i16x8.shr_u(w, 8), mask, q1);
    w = v128.load(words + 48);
    a3 = term(term(a3, w, mask, q0), i16x8.shr_u(w, 8), mask, q1);
  }
  v128.store(totals, i32x4.add(t0, i32x4.shr_s(a0, 2 * j)));
  v128.store(totals + 16, i32x4.add(t1, i32x4.shr_s(a1, 2 * j)));
  v128.store(totals + 32, i32x4.add(t2, i32x4.shr_s(a2, 2 * j)));
  v128.store(totals + 48, i32x4.add(t3, i32x4.shr_s(a3, 2 * j)));
}

// @ts-ignore: decorator
@inline function meet(y: usize, isum: v128, scales: usize, activation: v128): void {
  const product = f32x4.mul(f32x4.convert_i32x4_s(isum), f32x4.mul(scales4(scales), activation));
  v128.store(y, f32x4.add(v128.load(y), product));
}

// y [16 tiles] = codes times activations in blocks of `group`: q int16 [k], qScales fp32, qSums int32.
export function ternary(
  words: usize, scales: usize, tiles: i32, k: i32, group: i32, q: usize, qScales: usize, qSums: usize, y: usize
): void {
  const totals = memory.data(64, 16);
  memory.fill(y, 0, 64 * tiles);
  for (let tile = 0; tile < tiles; tile++, y += 64) {
    for (let b = 0; b * group < k; b++, scales += 32, words += 4 * group) {
      const at = q + 2 * b * group;
      const start = i32x4.splat(-load<i32>(qSums + 4 * b));
      plane(words, at, group, 0, start, start, start, start, totals);
      plane(words, at, group, 1, v128.load(totals), v128.load(totals, 16), v128.load(totals, 32), v128.load(totals, 48), totals);
      plane(words, at, group, 2, v128.load(totals), v128.load(totals, 16), v128.load(totals, 32), v128.load(totals, 48), totals);
      plane(words, at, group, 3, v128.load(totals), v128.load(totals, 16), v128.load(totals, 32), v128.load(totals, 48), totals);
      const activation = f32x4.splat(load<f32>(qScales + 4 * b));
      for (let v = 0; v < 4; v++) meet(y + 16 * v, v128.load(totals + 16 * v), scales + 8 * v, activation);
    }
  }
}

// The same with Q8_0's codes, in blocks of 32.
export function bytes(
  codes: usize, scales: usize, tiles: i32, k: i32, q: usize, qScales: usize, y: usize
): void {
  memory.fill(y, 0, 64 * tiles);
  for (let tile = 0; tile < tiles; tile++, y += 64) {
    for (let b = 0; b * 32 < k; b++, scales += 32) {
      let a0 = i32x4.splat(0), a1 = i32x4.splat(0), a2 = i32x4.splat(0), a3 = i32x4.splat(0);
      const from = q + 64 * b;
      for (let pair = from; pair < from + 64; pair += 4, codes += 32) {
        const x = v128.load32_splat(pair);
        a0 = i32x4.add(a0, i32x4.dot_i16x8_s(v128.load8x8_s(codes), x));
        a1 = i32x4.add(a1, i32x4.dot_i16x8_s(v128.load8x8_s(codes + 8), x));
        a2 = i32x4.add(a2, i32x4.dot_i16x8_s(v128.load8x8_s(codes + 16), x));
        a3 = i32x4.add(a3, i32x4.dot_i16x8_s(v128.load8x8_s(codes + 24), x));
      }
      const activation = f32x4.splat(load<f32>(qScales + 4 * b));
      meet(y, a0, scales, activation);
      meet(y + 16, a1, scales + 8, activation);
      meet(y + 32, a2, scales + 16, activation);
      meet(y + 48, a3, scales + 24, activation);
    }
  }
}

// Values as they are, row after row, n of k: y = sum16(w * x). half: they are fp16.
export function dense(values: usize, n: i32, k: i32, half: i32, x: usize, y: usize): void {
  for (let row = 0; row < n; row++) {
    let a0 = f32x4.splat(0), a1 = f32x4.splat(0), a2 = f32x4.splat(0), a3 = f32x4.splat(0);
    for (let i = 0; i < k; i += 16) {
      const at = x + 4 * i;
      if (half) {
        a0 = f32x4.add(a0, f32x4.mul(scales4(values), v128.load(at)));
        a1 = f32x4.add(a1, f32x4.mul(scales4(values + 8), v128.load(at, 16)));
        a2 = f32x4.add(a2, f32x4.mul(scales4(values + 16), v128.load(at, 32)));
        a3 = f32x4.add(a3, f32x4.mul(scales4(values + 24), v128.load(at, 48)));
        values += 32;
      } else {
        a0 = f32x4.add(a0, f32x4.mul(v128.load(values), v128.load(at)));
        a1 = f32x4.add(a1, f32x4.mul(v128.load(values, 16), v128.load(at, 16)));
        a2 = f32x4.add(a2, f32x4.mul(v128.load(values, 32), v128.load(at, 32)));
        a3 = f32x4.add(a3, f32x4.mul(v128.load(values, 48), v128.load(at, 48)));
        values += 64;
      }
    }
    store<f32>(y + 4 * row, tree16(a0, a1, a2, a3));
  }
}

// One row of Q8_0 or of fp16 values as fp32, for the embedding.
export function bytesRow(codes: usize, scales: usize, k: i32, row: i32, out: usize): void {
  const lane = row & 15;
  codes += (row >> 4) * 16 * k + 2 * lane;
  scales += (row >> 4) * k + 2 * lane;
  for (let i = 0; i < k; i++) {
    const code = <f32>load<i8>(codes + 32 * (i >> 1) + (i & 1));
    store<f32>(out + 4 * i, code * scale1(load<u16>(scales + 32 * (i >> 5))));
  }
}

export function halfRow(values: usize, k: i32, row: i32, out: usize): void {
  for (let i = 0; i < k; i++) store<f32>(out + 4 * i, scale1(load<u16>(values + 2 * (row * k + i))));
}
