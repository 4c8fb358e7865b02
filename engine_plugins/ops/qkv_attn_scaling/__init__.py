"""qkv_attn_scaling: FC_QKV with RoPE, or NoPE temperature scaling of Q, in the epilogue."""
