"""attention_decode: queries of a few rows against an FP8 KV cache, chunked (RoPE) or global (NoPE) layers."""
