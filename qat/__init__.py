"""Low-bit state-space models by training with distillation (`qat.train`) or without (`qat.ptq`); `qat.evaluate` scores them."""
