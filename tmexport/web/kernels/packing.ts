// From a GGUF's blocks to the layout of products.ts, 16 rows at a time (a last tile's missing rows come as zeros).
// Each returns 0, or what is wrong: 1 a code that is none, 2 a scale that is not finite, 3 scales that differ in a group.

// @ts-ignore: decorator
@inline function code(block: usize, type: i32, e: i32): i32 {
  if (type == 42) return (load<u8>(block + 2 + (e >> 2)) >> (2 * (e & 3))) & 3; // Q2_0
  if (type == 35) return (load<u8>(block + 32 * (e >> 7) + (e & 31)) >> (2 * ((e >> 5) & 3))) & 3; // TQ2_0
  // TQ1_0, base 3, the first element most significant: 32 bytes of 5 elements, 16 of 5, 4 of 4
  let byte: u32, power: i32;
  if (e < 160) {
    byte = load<u8>(block + (e & 31));
    power = e >> 5;
  } else if (e < 240) {
    byte = load<u8>(block + 32 + ((e - 160) & 15));
    power = (e - 160) >> 4;
  } else {
    byte = load<u8>(block + 48 + ((e - 240) & 3));
    power = (e - 240) >> 2;
  }
  for (; power > 0; power--) byte = (byte * 3) & 255;
  return (byte * 3) >> 8;
}

// @ts-ignore: decorator
@inline function wrong(scale: u32): bool {
  return (scale & 0x7c00) == 0x7c00;
}

// Sixteen rows of `type` to k / 16 * 64 bytes of words and k / group * 32 of scales.
export function packTernary(rows: usize, type: i32, k: i32, group: i32, words: usize, scales: usize): i32 {
  const size = type == 42 ? 64 : 256;
  const bytes = type == 42 ? 18 : type == 35 ? 66 : 54;
  const scaleAt = type == 42 ? 0 : bytes - 2;
  const rowBytes = (k / size) * bytes;
  for (let row = 0; row < 16; row++, rows += rowBytes) {
    for (let b = 0; b * size < k; b++) {
      const block = rows + b * bytes;
      const scale = load<u16>(block + scaleAt);
      if (wrong(scale)) return 2;
      const at = scales + 32 * ((b * size) / group) + 2 * row;
      if ((b * size) % group && load<u16>(at) != scale) return 3;
      store<u16>(at, scale);
      for (let e = 0; e < size; e += 16) {
        let word: u32 = 0;
        for (let i = 0; i < 16; i++) {
          const c = code(block, type, e + i);
          if (c == 3) return 1;
          word |= <u32>c << (16 * (i & 1) + (i & ~1));
        }
        store<u32>(words + 4 * (b * size + e) + 4 * row, word);
      }
    }
  }
  return 0;
}

export function packBytes(rows: usize, k: i32, codes: usize, scales: usize): i32 {
  for (let row = 0; row < 16; row++) {
    for (let b = 0; b * 32 < k; b++, rows += 34) {
      const scale = load<u16>(rows);
      if (wrong(scale)) return 2;
      store<u16>(scales + 32 * b + 2 * row, scale);
      for (let i = 0; i < 32; i++) {
        store<u8>(codes + 32 * ((b * 32 + i) >> 1) + 2 * row + (i & 1), load<u8>(rows + 2 + i));
      }
    }
  }
  return 0;
}

// Whether n fp16 values are finite.
export function halves(values: usize, n: i32): i32 {
  for (let i = 0; i < n; i++) if (wrong(load<u16>(values + 2 * i))) return 2;
  return 0;
}
