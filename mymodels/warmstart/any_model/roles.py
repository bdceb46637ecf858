"""Roles of tensors, from the names that models commonly use.

Roles have the names of MyGPT2's parameters (`model.layers.3.self_attn.q_proj.weight`), so that the transforms of
`warm_start` apply to them. Roles that MyGPT2 lacks (norms after the sum, experts, a head's transform) have names of their
own. A fused tensor has several roles.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION = r"(?:attn|attention|self_attn|self_attention|SelfAttention|multi_head_attention|mha|sa|self)"
_MLP = r"(?:mlp|ffn|DenseReluDense|feed_forward|ff|feedforward|moe|block_sparse_moe)"
# regex of a module's path inside a layer → its roles; the first full match counts
_IN_LAYER: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(?:.*\.)?(?:c_attn|qkv|qkv_proj|Wqkv|wqkv|in_proj|query_key_value|qkv_by_head|to_qkv|qkv_linear)", QKV),
    (r"(?:.*\.)?(?:q_proj|q_lin|query_proj|query|wq|to_q|q_linear|linear_q|Wq|W_q|w_q|q)", QKV[:1]),
    (r"(?:.*\.)?(?:k_proj|k_lin|key_proj|key|wk|to_k|k_linear|linear_k|Wk|W_k|w_k|k)", QKV[1:2]),
    (r"(?:.*\.)?(?:v_proj|v_lin|value_proj|value|wv|to_v|v_linear|linear_v|Wv|W_v|w_v|v)", QKV[2:]),
    (r"(?:.*\.)?(?:q_norm|q_layernorm|query_norm)", ("self_attn.q_norm",)),
    (r"(?:.*\.)?(?:k_norm|k_layernorm|key_norm)", ("self_attn.k_norm",)),
    (
        rf"(?:.*\.)?{_ATTENTION}\.(?:o_proj|out_proj|out_lin|c_proj|dense|output\.dense|wo|Wo|W_o|w_o|proj|to_out|"
        r"to_out\.0|out|o|output|out_linear|linear_out|o_linear)",
        ("self_attn.o_proj",),
    ),
    (r"o_proj", ("self_attn.o_proj",)),
    (r"attention\.output\.LayerNorm|sa_layer_norm|(?:.*\.)?attention\.(?:LayerNorm|ln)", ("attention_output_norm",)),
    (r"output\.LayerNorm|output_layer_norm|(?:.*\.)?full_layer_layer_norm", ("mlp_output_norm",)),
    (
        r"(?:.*\.)?(?:input_layernorm|ln_1|ln1|attn_norm|self_attn_layer_norm|norm1|norm_1|attention_norm|ln_attn|"
        r"layer_?norm1|layer_?norm_?before|attn_ln|pre_attention_norm)",
        ("input_layernorm",),
    ),
    (
        r"(?:.*\.)?(?:post_attention_layernorm|ln_2|ln2|mlp_norm|final_layer_norm|norm2|norm_2|ffn_norm|ln_mlp|"
        r"layer_?norm2|layer_?norm_?after|mlp_ln|ffn_ln|pre_feedforward_layernorm)|"
        r"intermediate\.LayerNorm|LayerNorm|ln",
        ("post_attention_layernorm",),
    ),
    (r"(?:.*\.)?post_feedforward_layernorm", ("mlp_output_norm",)),
    (rf"(?:.*\.)?{_MLP}\.(?:router|router\.layer|router\.classifier|gate\.wg)|router", ("mlp.router",)),
    (r"(?:.*\.)?(?:gate_up_proj|w13)", GATE_UP),
    (r"(?:.*\.)?(?:gate_proj|gate|wi_0)", GATE_UP[:1]),
    (
        r"(?:.*\.)?(?:c_fc|fc1|fc_1|lin1|intermediate\.dense|dense_h_to_4h|fc_in|linear1|linear_1|fc|up_proj|wi|wi_1|Wi|up|w3|"
        r"ffn)",
        GATE_UP[1:],
    ),
    (
        r"(?:.*\.)?(?:fc2|fc_2|lin2|dense_4h_to_h|fc_out|linear2|linear_2|down_proj|w2|down|ffn_output)|output\.dense|"
        rf"(?:.*\.)?{_MLP}\.(?:c_proj|proj|wo|Wo|out_proj|dense|output)",
        ("mlp.down_proj",),
    ),
    (r"(?:.*\.)?w1", GATE_UP[:1]),
    (rf"(?:.*\.)?{_MLP}(?:\.net)?\.0", GATE_UP[1:]),
    (rf"(?:.*\.)?{_MLP}(?:\.net)?\.[1-4]", ("mlp.down_proj",)),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    (
        r"(?:.*\.)?(?:wte|embed_tokens|word_embeddings?|tok_embeddings|tok_emb|token_embeddings?|token_emb|embed_in|tokens_embed|"
        r"tokens?|tok|shared)",
        "model.embed_tokens",
    ),
    (
        r"(?:.*\.)?(?:wpe|embed_positions|position_embeddings?|pos_emb|pos_embeddings?|positional_embeddings?|positions_embed|"
        r"positions?|pos|pos_embed)",
        "model.embed_positions",
    ),
    (r"(?:.*\.)?(?:token_type_embeddings|segment_embeddings)", "model.embed_types"),
    (r"(?:.*\.)?(?:embeddings\.(?:LayerNorm|norm)|word_embeddings_layernorm|embed_norm)", "model.embed_norm"),
    (r"(?:.*\.)?(?:embeddings_project|embedding_hidden_mapping_in|project_in)", "model.embed_project"),
    (r"(?:.*\.)?pooler\.dense", "model.pooler"),
    (
        r"(?:.*\.)?(?:cls\.predictions\.transform\.dense|lm_head\.dense|vocab_transform|generator_predictions\.dense|predictions\.dense)|head\.dense",
        "head.dense",
    ),
    (
        r"(?:.*\.)?(?:cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm|vocab_layer_norm|"
        r"generator_predictions\.LayerNorm|predictions\.LayerNorm)|head\.norm",
        "head.norm",
    ),
    (
        r"(?:.*\.)?(?:lm_head|embed_out|generator_lm_head|vocab_projector|cls\.predictions\.decoder|lm_head\.decoder|"
        r"cls\.predictions|predictions\.decoder|predictions)|decoder|output|unembed",
        "lm_head",
    ),
    (r"(?:.*\.)?(?:ln_f|final_layernorm|final_layer_norm|final_norm|norm_f|ln_final)", "model.norm"),
    (r"(?:(?:.*\.)?(?:model|transformer|decoder|encoder|backbone|net))?\.?norm", "model.norm"),
)
_OF_A_STACK = ("model.embed_positions.", "model.embed_norm.", "model.norm.")  # an encoder and a decoder have one each
_CROSS = re.compile(
    r"(?:^|\.)(?:encoder_attn|EncDecAttention|crossattention|cross_attn|cross_attention|multihead_attn)"
)
_EXPERT = re.compile(r"^(?:.*\.)?experts\.(\d+)\.(.+)$")
_STACKED_EXPERTS = re.compile(r"^(?:.*\.)?experts\.(gate_up_proj|down_proj|up_proj|gate_proj)$")
_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.+)$")
_OUT_BESIDE = re.compile(r"o_proj|out_proj|out_lin|wo|Wo|W_o|w_o|o|out|proj|to_out")  # beside query, key and value
# a parameter's own name → weight or bias; a kernel is stored [in, out]
LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "kernel": "weight", "scale": "weight"}
_INSIDE = [(re.compile(pattern), roles) for pattern, roles in _IN_LAYER]
_AROUND = [(re.compile(pattern), role) for pattern, role in _OUTSIDE]


class Role(NamedTuple):
    """The role of a tensor.

    Attributes:
        parts: the roles of the tensor's parts, in order; several for a fused tensor.
        module: the last part of the module's name, such as `c_attn`.
        leaf: the parameter's own name.
        layer: the layer's number; None outside the layers.
        stacked: whether the tensor holds all experts, [experts, rows, columns].
    """

    parts: tuple[str, ...]
    module: str
    leaf: str
    layer: int | None = None
    stacked: bool = False


def roles_by_name(names: Iterable[str]) -> dict[str, Role]:
    """Name → role, for names with a known role.

    Example:
        >>> roles_by_name(["transformer.h.0.ln_1.weight"])["transformer.h.0.ln_1.weight"].parts
        ('model.layers.0.input_layernorm.weight',)
    """
    split = {name: _split(name) for name in names}
    inside = {name: found for name, found in split.items() if found is not None}
    modules = {(stack, layer): set() for stack, layer, *_ in inside.values()}  # type: dict[tuple[str, int], set[str]]
    for stack, layer, path, _ in inside.values():
        modules[stack, layer].add(path)
    placed: dict[str, tuple[str, Role]] = {}
    for name, (stack, layer, path, leaf) in inside.items():
        role = _in_layer(path, leaf, modules[stack, layer])
        if role is not None:
            placed[name] = stack, role._replace(layer=layer)
    main = _stacks(stack for stack, _ in placed.values())
    roles: dict[str, Role] = {}
    for name, (stack, role) in placed.items():
        front = main.get(stack)
        if front is not None:
            parts = tuple(f"{front}model.layers.{role.layer}.{part}" for part in role.parts)
            roles[name] = role._replace(parts=parts)
    for name in split:
        if name not in roles and not _in_a_layer(name, main) and (found := _outside(name)):
            front = _stack_around(name, main) if found.parts[0].startswith(_OF_A_STACK) else ""
            roles[name] = found._replace(parts=tuple(front + part for part in found.parts))
    return roles


def _stack_around(name: str, stacks: dict[str, str]) -> str:
    """What the roles of an encoder or a decoder have in front, for a tensor beside its layers."""
    for stack, front in stacks.items():
        beside = stack.rpartition(".")[0]
        if front in ("encoder:", "decoder:") and beside and name.startswith(f"{beside}."):
            return front
    return ""


def _split(name: str) -> tuple[str, int, str, str] | None:
    """Stack, layer, path inside the layer, the parameter's own name."""
    found = _LAYER.match(name)
    if found is None:
        return None
    path, _, leaf = found[3].rpartition(".")
    if leaf in ("in_proj_weight", "in_proj_bias"):  # nn.MultiheadAttention
        path, leaf = f"{path}.in_proj".lstrip("."), leaf.removeprefix("in_proj_")
    if leaf not in LEAVES:
        path, leaf = found[3], ""
    return found[1] or "", int(found[2]), path, leaf


def _stacks(found: Iterable[str]) -> dict[str, str]:
    """Path of each list of layers → role prefix: "" for a single list, else encoder or decoder."""
    stacks = list(dict.fromkeys(found))
    if len(stacks) == 1:
        return {stacks[0]: ""}
    words = {stack: [word for word in ("encoder", "decoder") if word in stack] for stack in stacks}
    kinds = [w[0] for w in words.values() if len(w) == 1]
    if len(kinds) == len(stacks) == len(set(kinds)):
        return {stack: f"{words[stack][0]}:" for stack in stacks}
    return {stack: f"{stack}:" for stack in stacks}


def _in_a_layer(name: str, stacks: Iterable[str]) -> bool:
    found = _LAYER.match(name)
    return found is not None and (found[1] or "") in stacks


def _in_layer(path: str, leaf: str, modules: set[str]) -> Role | None:
    cross = _CROSS.search(path)
    if cross is not None:
        role = _in_layer(f"self_attn{path[cross.end() :]}", leaf, {"self_attn"})
        if role is None or not all(part.startswith("self_attn") for part in role.parts):
            return None
        return role._replace(parts=tuple(part.replace("self_attn", "cross_attn", 1) for part in role.parts))
    module = path.rpartition(".")[2]
    if (stacked := _STACKED_EXPERTS.match(path)) and leaf == "":
        parts = {"gate_up_proj": GATE_UP, "down_proj": ("mlp.down_proj",)}.get(stacked[1], (f"mlp.{stacked[1]}",))
        return Role(tuple(f"{part}.weight" for part in parts), module, leaf, stacked=True)
    if leaf == "":
        return None
    if expert := _EXPERT.match(path):
        others = {found[2] for m in modules if (found := _EXPERT.match(m)) and found[1] == expert[1]}
        role = _in_layer(expert[2], leaf, others)
        if role is None or not all(part.startswith("mlp.") for part in role.parts):
            return None
        return role._replace(parts=tuple(part.replace("mlp.", f"mlp.experts.{expert[1]}.", 1) for part in role.parts))
    has_experts = any("experts." in m for m in modules)
    parts = next((roles for pattern, roles in _INSIDE if pattern.fullmatch(path)), ())
    if not parts and _OUT_BESIDE.fullmatch(module):
        beside = [m for m in modules if m.rpartition(".")[0] == path.rpartition(".")[0]]
        projections = {role for m in beside for pattern, roles in _INSIDE[:4] if pattern.fullmatch(m) for role in roles}
        parts = ("self_attn.o_proj",) if projections >= set(QKV) else ()
    if not parts:
        return None
    if module == "gate" and has_experts:
        parts = ("mlp.router",)
    if module == "w1" and not any(m.rpartition(".")[2] == "w3" for m in modules):
        parts = GATE_UP[1:]
    after = any(m.endswith("full_layer_layer_norm") or m == "output.LayerNorm" for m in modules)
    if path.endswith(("attention.LayerNorm", "attention.ln")) and not after:  # ESM, Megatron: before the attention
        parts = ("input_layernorm",)
    if path in ("LayerNorm", "ln") and not modules & {"attention.LayerNorm", "attention.ln"}:
        return None
    gemma = any(m.endswith("pre_feedforward_layernorm") for m in modules)
    if gemma and module == "post_attention_layernorm":
        parts = ("attention_output_norm",)
    return Role(tuple(f"{part}.{LEAVES[leaf]}" for part in parts), module, leaf)


def _outside(name: str) -> Role | None:
    path, _, leaf = name.rpartition(".")
    if leaf not in LEAVES:
        if leaf in ("positional_embedding", "position_embedding", "pos_embed", "pos_emb", "wpe"):
            return Role(("model.embed_positions.weight",), leaf, "")
        return None
    if re.search(r"(^|\.)head\.(dense|norm)$", path):
        path = path[path.rindex("head.") :]
    for pattern, role in _AROUND:
        if pattern.fullmatch(path):
            if role == "lm_head" and path.endswith("predictions") and leaf != "bias":
                return None
            return Role((f"{role}.{LEAVES[leaf]}",), path.rpartition(".")[2], leaf)
    return None
