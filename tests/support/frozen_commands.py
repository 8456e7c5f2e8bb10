"""Commands whose every output byte is frozen: NAME: COMMAND [> OUTPUT].

@X is an input of `support.frozen_inputs`, or what the command X made, and @X/FILE a file of it.
A command writes into a folder of its own name: OUTPUT is m.gguf unless it says otherwise, "-" for
commands that print only. With -q they print no JSON: a Modelfile's size depends on its path.

``PORTABLE`` commands give the same bytes on every machine. ``LOCAL`` ones run a model, where
floating-point sums depend on the processor, the threads and torch, or fit the parameters of
Llama 3's frequencies. ``NUMBERS`` print figures that are compared with a tolerance.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from support.frozen_inputs import is_input

Kind = Literal["portable", "local", "numbers"]

_TYPES = """
F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 NVFP4 IQ4_NL IQ4_XS MXFP4_MOE
Q3_K_L Q3_K_M Q3_K_S IQ3_M IQ3_S Q2_K Q2_0 TQ2_0 TQ1_0 Q1_0
"""
_WITH_IMPORTANCE = """
IQ3_XS IQ3_XXS Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S
Q6_K Q5_1 Q4_K_M Q4_1 Q4_0 NVFP4 IQ4_NL IQ4_XS MXFP4_MOE Q3_K_L IQ3_M Q2_K Q2_0 TQ1_0 Q1_0
"""

_PORTABLE = """
bits-3: quantize @mini --bits 3
bits-8: quantize @mini --bits 8
tensor-types: quantize @llama --type Q4_K_M --tensor-type ffn_down=Q6_K --tensor-type attn_.=Q5_0
ends-types: quantize @llama --type Q4_K_S --output-tensor-type Q8_0 --token-embedding-type Q5_K
leave-output: quantize @llama --type Q3_K_M --leave-output-tensor
keep: quantize @llama --type Q4_0 --keep first,last=Q8_0 --keep head,embeddings=Q5_K
pure-iq4_nl: quantize @llama --type IQ4_NL --pure
pure-q4_k: quantize @llama --type Q4_K_M --pure
split: quantize @mini --type Q4_0 --split-max-size 500K
override-kv: quantize @mini --type Q8_0 --override-kv general.name=str:other --override-kv \
llama.context_length=int:4096 --override-kv general.sampling.temp=float:0.7 \
--override-kv a.b=bool:true
pre: quantize @mini --type Q8_0 --pre qwen2
include-weights: quantize @mini --type Q4_K_M --imatrix @importance.dat --include-weights ffn
exclude-weights: quantize @mini --type IQ4_XS --imatrix @importance.dat --exclude-weights attn_v
recipe: quantize @mini --recipe @recipe.toml
recipe-flags: quantize @mini --recipe @recipe.toml --type IQ4_NL --tensor-type attn_k=Q5_1
llama-iq3_m: quantize @llama --type IQ3_M
moe-q4_k_m: quantize @moe --type Q4_K_M
moe-q2_k: quantize @moe --type Q2_K
moe-iq4_xs: quantize @moe --type IQ4_XS
moe-mxfp4: quantize @moe --type MXFP4_MOE
gemma-q4_k_m: quantize @gemma --type Q4_K_M
gemma-q3_k_s: quantize @gemma --type Q3_K_S
biases-q4_k_m: quantize @biases --type Q4_K_M
llama3-q5_0: quantize @llama3 --type Q5_0
mistral-q6_k: quantize @mistral --type Q6_K
mixtral-q5_1: quantize @mixtral --type Q5_1
qwen2-q8_0: quantize @qwen2 --type Q8_0
qwen3-iq4_nl: quantize @qwen3 --type IQ4_NL
qwen3moe-q4_0: quantize @qwen3moe --type Q4_0
stacked-q3_k_l: quantize @stacked --type Q3_K_L
gemma2-q4_1: quantize @gemma2 --type Q4_1
gemma3-q5_k_m: quantize @gemma3 --type Q5_K_M
phi-q4_k_s: quantize @phi --type Q4_K_S
phi-long-f16: quantize @phi-long --type F16
gpt2-q4_k_m: quantize @gpt2 --type Q4_K_M

from-gguf: quantize @F16 --type Q4_K_M
from-gguf-imatrix: quantize @F32 --type IQ2_XS --imatrix @importance.dat
from-split: quantize @to-split/m-00001-of-00006.gguf --type Q3_K_S
requantize: quantize @Q8_0 --type Q4_0 --allow-requantize
from-gptq: quantize @gptq-4 --type Q4_K_M
from-gptq-v2: quantize @gptq-v2 --type Q5_0
from-awq: quantize @awq --type Q4_1
from-ct: quantize @ct-4 --type Q6_K
from-w8a8: quantize @w8a8 --type Q8_0
from-mlx: quantize @mlx-4 --type F16
from-gptq-to-mlx: quantize @gptq-4 --to mlx --bits 6 > model

gptq-2: quantize @mini --to gptq --bits 2 --group-size 32 > model
gptq-3: quantize @mini --to gptq --bits 3 --group-size 64 --asymmetric > model
gptq-4: quantize @mini --to gptq > model
gptq-8: quantize @mini --to gptq --bits 8 --group-size channel --range minmax > model
gptq-imatrix: quantize @mini --to gptq --bits 3 --imatrix @importance.dat > model
gptq-v2: quantize @mini --to gptq-v2 --asymmetric > model
gptq-moe: quantize @mixtral --to gptq --group-size 32 > model
gptq-phi: quantize @phi --to gptq --group-size 32 --keep o_proj --dtype F16 > model
awq: quantize @mini --to awq > model
awq-imatrix: quantize @mini --to awq --group-size 64 --imatrix @importance.dat > model
awq-channel: quantize @mini --to awq --group-size channel --range minmax > model
awq-gemma: quantize @gemma2 --to awq --group-size 32 > model
ct-2: quantize @mini --to compressed-tensors --bits 2 --group-size 32 > model
ct-3: quantize @mini --to compressed-tensors --bits 3 --asymmetric > model
ct-4: quantize @mini --to compressed-tensors > model
ct-5: quantize @mini --to compressed-tensors --bits 5 --group-size channel --dtype F32 > model
ct-8: quantize @mini --to compressed-tensors --bits 8 --group-size tensor --range minmax > model
ct-imatrix: quantize @mini --to compressed-tensors --imatrix @importance.dat \
--exclude-weights ffn > model
ct-stacked: quantize @stacked --to compressed-tensors --group-size 32 > model
ct-shards: quantize @mini --to compressed-tensors --keep attn --max-shard-size 1M > model
w8a8: quantize @mini --to compressed-tensors --activations int8 > model
w8a8-tensor: quantize @qwen2 --to compressed-tensors --activations int8 --group-size tensor > model
mlx-2: quantize @mini --to mlx --bits 2 --group-size 32 > model
mlx-3: quantize @mini --to mlx --bits 3 > model
mlx-4: quantize @mini --to mlx > model
mlx-5: quantize @mini --to mlx --bits 5 --range minmax > model
mlx-6: quantize @mini --to mlx --bits 6 --group-size 128 > model
mlx-8: quantize @mini --to mlx --bits 8 > model
mlx-imatrix: quantize @mini --to mlx --bits 3 --imatrix @importance.dat > model
mlx-moe: quantize @qwen3moe --to mlx --group-size 32 --keep down_proj > model
hf-q4_k_m: quantize @mini --to hf --type Q4_K_M > model
hf-iq2_xxs: quantize @mini --to hf --type IQ2_XXS --imatrix @importance.dat --dtype F32 > model
hf-f16: quantize @mini --to hf --type F16 > model
hf-gpt2: quantize @gpt2 --to hf --type Q5_0 > model

to-gguf: export @mini --to gguf
to-gguf-f16: export @qwen3moe --to gguf --dtype f16 --card
to-split: export @F16 --to gguf --split-max-size 2M
merge: export @to-split/m-00002-of-00006.gguf --to gguf
decode: export @Q4_K_M --to gguf --dtype f32
codes-gptq: export @gptq-4 --to gguf
codes-ct: export @ct-2 --to gguf
codes-w8a8: export @w8a8-tensor --to gguf --requantize
codes-awq: export @awq --to gguf --requantize
codes-mlx: export @mlx-4 --to gguf --requantize
codes-mxfp4: export @packed-mxfp4 --to gguf
back-f32: export @F32 --to hf > model
back-q4_k_m: export @Q4_K_M --to hf --split-max-size 3M > model
back-bf16: export @IQ4_NL --to hf --dtype bf16 --config @mini --tokenizer @mini > model
back-mixtral: export @mixtral-q5_1 --to hf > model
back-qwen2: export @qwen2-q8_0 --to hf > model
back-qwen3moe: export @qwen3moe-q4_0 --to hf --dtype f32 > model
back-gemma2: export @gemma2-q4_1 --to hf > model
back-gemma3: export @gemma3-q5_k_m --to hf > model
back-phi: export @phi-long-f16 --to hf > model
back-gpt2: export @gpt2-q4_k_m --to hf > model
pure-q4_0: quantize @mini --type Q4_0 --pure
pure-q4_1: quantize @mini --type Q4_1 --pure
pure-q5_0: quantize @mini --type Q5_0 --pure
pure-q8_0: quantize @mini --type Q8_0 --pure
pure-mxfp4: quantize @mini --type MXFP4_MOE --pure
packed-ct: export @pure-q5_0 --to compressed-tensors > model
packed-mxfp4: export @pure-mxfp4 --to compressed-tensors > model
packed-gptq: export @pure-q4_0 --to gptq > model
packed-gptq-v2: export @pure-q8_0 --to gptq-v2 > model
packed-awq: export @pure-q4_0 --to awq > model
packed-mlx: export @pure-q4_1 --to mlx > model
packed-rounded: export @pure-q4_1 --to awq --requantize > model
packed-moe: export @qwen3moe-q4_0 --to mlx > model
imatrix: export @importance.dat --to imatrix
dat: export @imatrix --to dat > m.dat
ollama: export @Q4_K_M --to ollama -q > m.Modelfile
card: export @Q4_K_M --to card > m.md
verify: export @Q4_K_M --verify > -
verify-folder: export @gptq-3 --verify > -
export-plan: export @Q4_K_M --to hf --dry-run > -

inspect-mini: inspect @mini --tensors > -
inspect-moe: inspect @moe > -
inspect-gguf: inspect @Q4_K_M --tensors --kv --sort size > -
inspect-split: inspect @split/m-00001-of-00006.gguf > -
inspect-gptq: inspect @gptq-3 --tensors --filter mlp > -
inspect-mlx: inspect @mlx-5 > -
inspect-w8a8: inspect @w8a8 > -
inspect-importance: inspect @importance.dat > -
plan: quantize @moe --type IQ3_S --dry-run > -
plan-importance: quantize @mini --type IQ1_M --imatrix @importance.dat --dry-run > -
plan-gptq: quantize @mini --to gptq --bits 3 --dry-run > -
plan-hf: quantize @gpt2 --to hf --type Q4_K_M --dry-run > -
print-recipe: quantize @mini --recipe @recipe.toml --quality high --print-recipe > -
print-folder: quantize @mini --to awq --method awq,gptq --sweeps 2 --keep k_proj --print-recipe > -
"""

_LOCAL = """
back-llama3: export @llama3-q5_0 --to hf --dtype f32 > model
calibrate: calibrate @mini --data @text.txt --ctx 64 --chunks 8
calibrate-more: calibrate @small --data @text.txt --ctx 128 --seed 3 --chunks 5 --collect \
abs_max,mean_abs,hessian --dtype float32
calibrate-moe: calibrate @mixtral --data @text.txt --ctx 128 --chunks 6 --collect abs_max
calibrate-gemma: calibrate @gemma2 --data @text.txt --ctx 128 --chunks 4
calibrate-gpt2: calibrate @gpt2 --data @text.txt --ctx 128 --chunks 4
calibrate-default: calibrate @small --chunks 4
calibrate-dat: calibrate @phi --data @text.txt --ctx 128 --chunks 4 --legacy > m.dat
calibrate-other: calibrate @mini --data @text.txt --ctx 64 --chunks 4 --seed 1
calibrate-merge: calibrate --merge @calibrate --merge @calibrate-other
calibrate-stats: calibrate @calibrate-more --stats > -
dat-moe: export @calibrate-moe --to dat > m.dat
calibrated: quantize @mini --type IQ2_S --imatrix @calibrate
calibrated-moe: quantize @mixtral --type Q4_0 --imatrix @calibrate-moe
calibrate-inline: quantize @small --type Q4_1 --calibrate @text.txt --chunks 4
gptq-q4_0: quantize @small --type Q4_0 --method gptq --calibrate @text.txt --chunks 6
gptq-q4_k: quantize @llama --type Q4_K_M --method gptq --calibrate @text.txt --chunks 4
gptq-iq3_s: quantize @llama --type IQ3_S --method gptq --fisher-windows 2 \
--calibrate @text.txt --chunks 4
gptq-q2_k: quantize @llama --type Q2_K --method gptq --fisher-windows 2 \
--calibrate @text.txt --chunks 4 --propagate
gptq-iq2_xs: quantize @llama --type IQ2_XS --method gptq --fisher-windows 2 \
--calibrate @text.txt --chunks 4
gptq-tq2_0: quantize @llama --type TQ2_0 --method gptq --fisher-windows 2 \
--calibrate @text.txt --chunks 4
gptq-mxfp4: quantize @small --type MXFP4_MOE --pure --method gptq --calibrate @text.txt --chunks 4
gptq-moe-type: quantize @mixtral --type IQ4_NL --method gptq --calibrate @text.txt --chunks 4
gptq-order: quantize @small --type Q5_0 --method gptq --column-order activation --damping 0.1 \
--calibrate @text.txt --chunks 4
gptq-sweeps: quantize @small --type Q4_0 --method gptq --sweeps 3 --fisher-windows 0 \
--calibrate @text.txt --chunks 4
gptq-share: quantize @small --type Q4_0 --method gptq --sweeps 0 --random-share 0 \
--calibrate @text.txt --chunks 4
allocate: quantize @llama --type Q4_K_S --method gptq --allocate --fisher-windows 2 \
--calibrate @text.txt --chunks 4
target-size: quantize @llama --type Q4_K_M --method gptq --target-size 1300K \
--calibrate @text.txt --chunks 4
quality-high: quantize @mini --type Q4_K_M --quality high --fisher-windows 2 \
--calibrate @text.txt --chunks 3
tune: quantize @small --type Q4_0 --method tune --tune-steps 6 --calibrate @text.txt --chunks 4
gptq-tune: quantize @small --type IQ4_NL --method gptq,tune --tune-steps 4 \
--calibrate @text.txt --chunks 4
tune-e2e: quantize @small --type Q4_0 --method gptq --tune e2e --e2e-steps 4 \
--calibrate @text.txt --chunks 4
awq-q4_0: quantize @small --type Q4_0 --method awq --calibrate @text.txt --chunks 4
smoothquant-q4_0: quantize @small --type Q4_0 --method smoothquant --calibrate @text.txt --chunks 4
rotate-q4_0: quantize @small --type Q4_0 --method rotate --calibrate @text.txt --chunks 4
rotate-gptq: quantize @qwen3 --type Q4_0 --method rotate,gptq --calibrate @text.txt --chunks 4
awq-moe: quantize @mixtral --type Q4_0 --method awq,gptq --calibrate @text.txt --chunks 4
awq-gemma-type: quantize @gemma2 --type Q4_0 --method awq --calibrate @text.txt --chunks 4
gptq-phi-type: quantize @phi --type Q4_0 --method awq,gptq --calibrate @text.txt --chunks 4
gptq-gpt2: quantize @gpt2 --type Q4_0 --method awq,gptq --calibrate @text.txt --chunks 4
to-gptq: quantize @small --to gptq --group-size 32 --method gptq --calibrate @text.txt \
--chunks 4 > model
to-gptq-order: quantize @small --to gptq-v2 --asymmetric --group-size 64 --method gptq \
--column-order activation --calibrate @text.txt --chunks 4 > model
to-awq: quantize @small --to awq --group-size 32 --method awq,gptq --calibrate @text.txt \
--chunks 4 > model
to-awq-range: quantize @small --to awq --group-size 32 --method awq --range mse \
--calibrate @text.txt --chunks 4 > model
to-ct-rotate: quantize @small --to compressed-tensors --group-size 64 --method rotate,gptq \
--calibrate @text.txt --chunks 4 > model
to-ct-smooth: quantize @small --to compressed-tensors --activations int8 --method smoothquant \
--calibrate @text.txt --chunks 4 > model
to-ct-moe: quantize @stacked --to compressed-tensors --group-size 32 --method gptq --propagate \
--calibrate @text.txt --chunks 4 > model
to-mlx: quantize @small --to mlx --bits 3 --group-size 32 --method gptq --calibrate @text.txt \
--chunks 4 > model
to-hf: quantize @small --to hf --type Q4_0 --method awq --calibrate @text.txt --chunks 4 > model
to-calibrate: quantize @small --to awq --group-size 32 --calibrate @text.txt --chunks 4 > model
mini-best: quantize @mini --type Q3_K_S --method awq,gptq --fisher-windows 2 \
--calibrate @text.txt --chunks 3
card-eval: export @Q4_K_M --to card --eval @ppl-llama/stdout > m.md
"""

_NUMBERS = """
ppl-llama: eval-ppl @Q4_K_M --engine llama.cpp --data @text.txt --ctx 128 --chunks 4 > -
ppl-reference: eval-ppl @Q4_0 --engine llama.cpp --reference @BF16 --data @text.txt --ctx 128 \
--chunks 4 > -
ppl-torch: eval-ppl @mini @gptq-4 --engine torch --data @text.txt --ctx 128 --chunks 4 > -
ppl-stride: eval-ppl @Q4_K_M --engine torch --reference @mini --data @text.txt --ctx 128 \
--stride 64 --chunks 4 > -
verify-against: export @Q4_K_M --verify --against @mini > -
verify-awq: export @awq --verify --against @mini > -
inspect-stats: inspect @mini --stats --filter ffn > -
"""


@dataclass(frozen=True)
class Command:
    """A command line with @ references, and what its output is called ("" when it has none)."""

    name: str
    words: tuple[str, ...]
    output: str
    kind: Kind

    @property
    def references(self) -> list[str]:
        """Names of the inputs and the commands that it reads."""
        return [word[1:].partition("/")[0] for word in self.words if word.startswith("@")]


def _read(block: str, kind: Kind) -> dict[str, Command]:
    found = {}
    for line in block.strip().splitlines():
        if not line:
            continue
        name, _, rest = line.partition(": ")
        text, _, output = rest.partition(" > ")
        words = tuple(shlex.split(text))
        made = "" if output == "-" else output or "m.gguf"
        found[name] = Command(name, words, made, kind)
    return found


def _quantize_types() -> str:
    plain = [f"{kind}: quantize @mini --type {kind}" for kind in _TYPES.split()]
    weighted = [
        f"{kind}-imatrix: quantize @mini --type {kind} --imatrix @importance.dat"
        for kind in _WITH_IMPORTANCE.split()
    ]
    return "\n".join(plain + weighted)


COMMANDS: dict[str, Command] = (
    _read(_quantize_types(), "portable")
    | _read(_PORTABLE, "portable")
    | _read(_LOCAL, "local")
    | _read(_NUMBERS, "numbers")
)
"""Every command by its name."""


def resolve(word: str) -> str:
    """The path, from the folder where all commands run, that a word with an @ means."""
    name, slash, rest = word.removeprefix("@").partition("/")
    if not word.startswith("@"):
        return word
    if is_input(name):
        return name + slash + rest
    return f"{name}/{rest or COMMANDS[name].output}"


def select(pattern: str = "", kind: str | None = None) -> list[str]:
    """Names of such commands in which the regular expression is found, after their inputs."""
    chosen = [
        each
        for each in COMMANDS.values()
        if kind in (None, each.kind) and re.search(pattern, each.name)
    ]
    read = {name for each in chosen for name in each.references if is_input(name)}
    return [*sorted(read), *(each.name for each in chosen)]
