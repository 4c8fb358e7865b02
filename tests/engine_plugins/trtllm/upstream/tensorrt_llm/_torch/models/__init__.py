"""As upstream: importing the models fills the registry."""

from tensorrt_llm._torch.models import modeling_llama as modeling_llama
