"""The axis legend: one letter, one meaning, in every signature and docstring.

| letter | axis |
| --- | --- |
| `n` | training examples |
| `m` | targets, the examples whose predictions are explained |
| `b` | examples of one batch |
| `p` | parameters (of one block, or of all that are selected) |
| `k` | projection dimension |
| `s` | positions that share a weight (tokens, pixels) |
| `i`, `o` | input and output width of a layer |
| `c` | checkpoints |
| `q` | side of a square factor: `k` (primal) or `n` (dual) |

Scores are `[n, m]`, projected gradients Phi `[n, k]`, the loss weight Q `[n, 1]`.
"""

from jaxtyping import Float, Float64
from torch import Tensor

ProjectedGradients = Float[Tensor, "n k"]
Square = Float64[Tensor, "q q"]
TargetColumns = Float64[Tensor, "q m"]
