"""moe_top1: the chosen expert of each row, FC13 + SwiGLU + FC2, score applied to the input (Llama 4)."""
