"""Shapes of models of many kinds, as small as a plan allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from support.llama_plan import Shape
from support.state_space_shapes import CONFIGS, shape_of

D, F, V = 256, 512, 320


def keys(blocks: int, heads: int = 4, key_heads: int = 4, **more: object) -> dict[str, object]:
    return {
        "block_count": blocks,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def decoder(
    arch: str,
    blocks: int,
    *,
    heads: int = 4,
    key_heads: int = 4,
    tied: bool = False,
    width: int = D,
    inner: int = F,
    experts: int = 0,
    fused_qkv: bool = False,
    gate: bool = True,
    biases: bool = False,
    more: dict[str, object] | None = None,
) -> Shape:
    """A decoder; blocks are listed from the last to the first, so that order has to be made."""
    tensors: dict[str, tuple[int, ...]] = {"output_norm.weight": (width,)}
    kv_width = width // heads * key_heads if key_heads else width
    for block in reversed(range(blocks)):
        part: dict[str, tuple[int, ...]] = {"attn_norm.weight": (width,)}
        if fused_qkv:
            part["attn_qkv.weight"] = (width + 2 * kv_width, width)
        else:
            part |= {
                "attn_q.weight": (width, width),
                "attn_k.weight": (kv_width, width),
                "attn_v.weight": (kv_width, width),
            }
        part["attn_output.weight"] = (width, width)
        part["ffn_norm.weight"] = (width,)
        stack = (experts,) if experts else ()
        suffix = "_exps" if experts else ""
        if experts:
            part["ffn_gate_inp.weight"] = (experts, width)
        for name in ("ffn_gate", "ffn_up") if gate else ("ffn_up",):
            part[f"{name}{suffix}.weight"] = (*stack, inner, width)
        part[f"ffn_down{suffix}.weight"] = (*stack, width, inner)
        if biases:
            part |= {
                name.replace(".weight", ".bias"): (shape[-2],)
                for name, shape in list(part.items())
                if len(shape) == 2 and name != "ffn_gate_inp.weight"
            }
        tensors |= {f"blk.{block}.{name}": shape for name, shape in part.items()}
    tensors["token_embd.weight"] = (V, width)
    if not tied:
        tensors["output.weight"] = (V, width)
    values = keys(blocks, heads, key_heads) | {"embedding_length": width}
    if experts:
        values |= {"expert_count": experts, "expert_used_count": min(2, experts)}
    return Shape(arch, values | (more or {}), tensors)


def gpt2(blocks: int) -> Shape:
    model = decoder("gpt2", blocks, fused_qkv=True, gate=False, biases=True)
    return Shape("gpt2", model.keys, model.tensors | {"position_embd.weight": (128, D)})


def qwen2_moe(blocks: int) -> Shape:
    """Shared experts beside routed ones, and a router of one row."""
    model = decoder("qwen2moe", blocks, experts=6, biases=True)
    extra: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        extra |= {
            f"blk.{block}.ffn_gate_inp_shexp.weight": (D,),
            f"blk.{block}.ffn_gate_shexp.weight": (F, D),
            f"blk.{block}.ffn_up_shexp.weight": (F, D),
            f"blk.{block}.ffn_down_shexp.weight": (D, F),
        }
    more = {"expert_feed_forward_length": F, "expert_shared_feed_forward_length": F}
    return Shape("qwen2moe", model.keys | more, model.tensors | extra)


def glm5_next(blocks: int) -> Shape:
    """Latent attention, an indexer, hyper-connections: an architecture with rules of its own."""
    model = decoder("glm5-next", blocks, experts=4, key_heads=1)
    part: dict[str, tuple[int, ...]] = {
        "attn_q_a.weight": (128, D),
        "attn_q_b.weight": (D, 128),
        "attn_kv_a_mqa.weight": (288, D),
        "attn_kv_b.weight": (D, 256),
        "attn_k_b.weight": (4, 64, 128),
        "attn_v_b.weight": (4, 64, 128),
        "indexer.attn_q_b.weight": (D, D),
        "indexer.attn_k.weight": (64, D),
        "indexer.proj.weight": (4, D),
        "indexer_compressor_gate.weight": (64, D),
        "indexer_compressor_ape.weight": (64, D),
        "hc_attn_fn.weight": (24, D),
        "ssm_f_a.weight": (64, D),
        "ssm_f_b.weight": (D, 64),
        "ssm_g_a.weight": (64, D),
        "ssm_beta.weight": (4, D),
        "ssm_conv1d_q.weight": (D, 4),
        "nextn.eh_proj.weight": (D, 2 * D),
    }
    extra = {f"blk.{i}.{name}": shape for i in range(blocks) for name, shape in part.items()}
    return Shape("glm5-next", model.keys | LATENT | HYPER, model.tensors | extra)


def bailing_moe3(blocks: int) -> Shape:
    """Latent attention whose projections are three-dimensional without being experts."""
    model = decoder("bailingmoe3", blocks, experts=4, key_heads=1)
    extra: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        extra |= {
            f"blk.{block}.attn_k_b.weight": (4, 64, 128),
            f"blk.{block}.attn_v_b.weight": (4, 64, 128),
            f"blk.{block}.ffn_up_shexp.weight": (F, D),
        }
    more = {"leading_dense_block_count": 0, "expert_gating_func": 2, "kda.gate_lower_bound": -5.0}
    return Shape("bailingmoe3", model.keys | LATENT | more, model.tensors | extra)


LATENT: dict[str, object] = {
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "attention.q_lora_rank": 128,
    "attention.kv_lora_rank": 128,
    "ssm.conv_kernel": 4,
    "kda.head_dim": 64,
    "expert_feed_forward_length": F,
    "expert_shared_count": 1,
}
HYPER: dict[str, object] = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
    "attention.indexer.kpool": 2,
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 4,
    "hyper_connection.epsilon": 1e-6,
}


def per_layer_heads(blocks: int, key_heads: list[int]) -> Shape:
    """Heads given as arrays with one number per block."""
    model = decoder("deci", blocks, heads=8)
    cycle = [key_heads[block % len(key_heads)] for block in range(blocks)]
    heads = {"attention.head_count": [8] * blocks, "attention.head_count_kv": cycle}
    return Shape("deci", model.keys | heads, model.tensors)


def hybrid(blocks: int) -> Shape:
    """A dense model in which every fourth layer only has attention."""
    model = decoder("llama", blocks)
    kept = {
        name: shape
        for name, shape in model.tensors.items()
        if not any(
            name.startswith(f"blk.{block}.attn") for block in range(blocks) if block % 4 != 3
        )
    }
    return Shape("llama", model.keys, kept)


def delta_net(
    arch: str, blocks: int, *, experts: int = 0, mtp: int = 0, key_heads: int = 1
) -> Shape:
    """Gated delta nets with attention in every fourth layer, and in blocks behind the last one."""
    heads, state, values = 4, 64, 8
    value, qkv = values * state, (2 * heads + values) * state
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output.weight": (V, D)}
    for block in range(blocks):
        part: dict[str, tuple[int, ...]] = {"attn_norm.weight": (D,)}
        part["post_attention_norm.weight"] = (D,)
        if block % 4 == 3 or block >= blocks - mtp:
            part |= {
                "attn_q.weight": (2 * D, D),
                "attn_k.weight": (key_heads * 64, D),
                "attn_v.weight": (key_heads * 64, D),
                "attn_output.weight": (D, D),
            }
        else:
            part |= {
                "attn_qkv.weight": (qkv, D),
                "attn_gate.weight": (value, D),
                "ssm_conv1d.weight": (qkv, 4),
                "ssm_norm.weight": (state,),
                "ssm_out.weight": (D, value),
                "ssm_a": (values,),
                "ssm_dt.bias": (values,),
            }
            gates = ("ssm_ba",) if arch == "qwen3next" else ("ssm_alpha", "ssm_beta")
            part |= {f"{name}.weight": (2 * values // len(gates), D) for name in gates}
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            suffix = "_exps" if experts else ""
            part[f"ffn_{name}{suffix}.weight"] = (experts, *shape) if experts else shape
            if experts:
                part[f"ffn_{name}_shexp.weight"] = shape
        if experts:
            part |= {"ffn_gate_inp.weight": (experts, D), "ffn_gate_inp_shexp.weight": (D,)}
        if block >= blocks - mtp:
            part |= {"nextn.eh_proj.weight": (D, 2 * D), "nextn.enorm.weight": (D,)}
        tensors |= {f"blk.{block}.{name}": shape for name, shape in part.items()}
    more: dict[str, object] = {
        "rope.dimension_sections": [11, 11, 10, 0], "ssm.conv_kernel": 4, "ssm.state_size": state,
        "ssm.group_count": heads, "ssm.time_step_rank": values, "ssm.inner_size": value,
        "full_attention_interval": 4,
    }  # fmt: skip
    if experts:
        more |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": F}
    if mtp:
        more["nextn_predict_layers"] = mtp
    return Shape(arch, keys(blocks, 4, key_heads) | more, tensors)


MODELS: dict[str, Callable[[], Shape]] = {
    "llama-2": lambda: decoder("llama", 2),
    "llama-4-gqa": lambda: decoder("llama", 4, heads=8, key_heads=2),
    "llama-12": lambda: decoder("llama", 12),
    "llama-12-tied": lambda: decoder("llama", 12, tied=True),
    "llama-32-gqa": lambda: decoder("llama", 32, heads=8, key_heads=2),
    "llama-32": lambda: decoder("llama", 32, heads=8, key_heads=4),
    "llama-80": lambda: decoder("llama", 80, heads=8, key_heads=8),
    "llama-80-gqa": lambda: decoder("llama", 80, heads=8, key_heads=1),
    "llama-80-gqa2": lambda: decoder("llama", 80, heads=8, key_heads=4),
    "llama-narrow": lambda: decoder("llama", 12, width=320, inner=864, heads=5, key_heads=5),
    "llama-odd": lambda: decoder("llama", 12, width=144, inner=360, heads=4, key_heads=4),
    "llama-odd-tied": lambda: decoder(
        "llama", 12, width=144, inner=512, heads=4, key_heads=4, tied=True
    ),
    "mixtral-8": lambda: decoder("llama", 12, heads=8, key_heads=2, experts=8),
    "mixtral-8-of-80": lambda: decoder("llama", 80, heads=8, key_heads=2, experts=8),
    "mixtral-4": lambda: decoder("llama", 12, experts=4),
    "mixtral-2": lambda: decoder("llama", 12, experts=2),
    "qwen2-24-tied": lambda: decoder(
        "qwen2", 24, heads=14, key_heads=2, width=896, inner=512, tied=True, biases=True
    ),
    "qwen2-80": lambda: decoder("qwen2", 80, heads=8, key_heads=8, biases=True),
    "qwen2moe-12": lambda: qwen2_moe(12),
    "qwen3-11": lambda: decoder("qwen3", 11, heads=8, key_heads=2),
    "gemma2-26-tied": lambda: decoder(
        "gemma2", 26, heads=8, key_heads=4, tied=True,
        more={
            "attention.sliding_window": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3-32": lambda: decoder(
        "phi3", 32, fused_qkv=True, gate=False, more={"rope.dimension_count": 64}
    ),
    "gpt2-12": lambda: gpt2(12),
    "falcon-32": lambda: decoder(
        "falcon", 32, fused_qkv=True, gate=False, heads=8, key_heads=1
    ),
    "falcon-60": lambda: decoder("falcon", 60, fused_qkv=True, gate=False, key_heads=1),
    "hybrid-24": lambda: hybrid(24),
    "falcon-12-experts": lambda: decoder("falcon", 12, fused_qkv=True, gate=False, experts=8),
    "llama-81-mtp": lambda: decoder(
        "llama", 81, heads=8, key_heads=2, more={"nextn_predict_layers": 1}
    ),
    "llama-80-mtp": lambda: decoder(
        "llama", 80, heads=8, key_heads=2, more={"nextn_predict_layers": 1}
    ),
    "deci-12": lambda: per_layer_heads(12, [2, 8, 4]),
    "deci-12-none": lambda: per_layer_heads(12, [0, 2]),
    "deci-80": lambda: per_layer_heads(80, [8]),
    "jais2-68": lambda: decoder("jais2", 68, biases=True, gate=False),
    "glm5-next-6": lambda: glm5_next(6),
    "bailingmoe3-6": lambda: bailing_moe3(6),
    "qwen35-33-mtp": lambda: delta_net("qwen35", 33, mtp=1),
    "qwen35-12": lambda: delta_net("qwen35", 12, key_heads=2),
    "qwen35moe-9-mtp": lambda: delta_net("qwen35moe", 9, experts=8, mtp=1),
    "qwen3next-12": lambda: delta_net("qwen3next", 12, experts=16),
    "qwen3next-13-mtp": lambda: delta_net("qwen3next", 13, experts=4, mtp=1),
    "olmo-80": lambda: decoder("olmo", 80, heads=8, key_heads=4, tied=True),
    **{name: partial(shape_of, config) for name, config in CONFIGS.items()},
}  # fmt: skip
