"""How each type of layer is read, written, applied and quantized."""
