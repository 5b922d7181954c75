"""The slow, obvious loop that defines what decoding gives. Everything faster is compared with it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.modeling.cache import FusedCache
from ultrafuser.modeling.model import UltraFuserForCausalLM


@torch.inference_mode()
def reference_tokens(
    model: UltraFuserForCausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    use_cache: bool = False,
) -> list[int]:
    """Decode one response: run all specialists over everything so far, fuse, choose, append.

    Stop texts are not looked for: they end a response, but change no token.

    Args:
        model: the fused model, in evaluation mode.
        prompts: token ids for each of the N specialists, as `ConversationEncoder.prompt` gives.
        params: how tokens are chosen.
        use_cache: keep keys and values between the steps: less slow, and a little less obvious.

    Returns:
        The response's tokens, the end token included.
    """
    sampler = Sampler(params, prompts[0])
    response: list[int] = []
    cache = model.new_cache() if use_cache else None
    while len(response) < params.max_new_tokens:
        logits = _next_logits(model, prompts, response, cache)
        token = sampler.next_token(logits)
        sampler.said([token])
        response.append(token)
        if token == model.config.end_token_id:
            break
    return response


def _next_logits(
    model: UltraFuserForCausalLM,
    prompts: Sequence[Sequence[int]],
    response: Sequence[int],
    cache: FusedCache | None,
) -> Tensor:
    """Fused logits, (1, V), of the token after the response."""
    if cache is not None and response:
        ids = torch.tensor([response[-1:]], device=model.device)
        return model(input_ids=ids, past_key_values=cache).logits[:, -1]
    texts = [torch.tensor([*prompt, *response], device=model.device) for prompt in prompts]
    length = max(len(text) for text in texts)
    # Padded on the left, so that all specialists predict the next token at the last position.
    ids = torch.stack([F.pad(text, (length - len(text), 0)) for text in texts])
    mask = torch.stack([F.pad(torch.ones_like(text), (length - len(text), 0)) for text in texts])
    output = model(
        specialist_input_ids=ids.unsqueeze(0),
        specialist_attention_mask=mask.unsqueeze(0),
        past_key_values=cache,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
