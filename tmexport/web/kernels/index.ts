// What the page calls. Built by scripts/web/build.py.
export { add, finite, quantize, rmsNorm } from "./functions";
export { bytes, bytesRow, dense, halfRow, ternary } from "./products";
export { halves, packBytes, packTernary } from "./packing";
export { convolve, gate, scan, steps } from "./mamba2";
