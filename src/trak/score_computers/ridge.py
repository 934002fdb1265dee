"""The default: TRAK with a ridge that is never left at zero by accident."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trak.arguments import Ridge, as_flag, as_ridge, multiple_of
from trak.encodings import RowSource, encoding_of, row_encoding
from trak.errors import InputError
from trak.score_computers.auto_ridge import Choice, choice, relative_ridge
from trak.score_computers.curvature import RULE, roots, weighted
from trak.score_computers.factor import Form, RidgeFactor, factorize, smaller_form
from trak.score_computers.gram import dual_gram, primal_gram
from trak.score_computers.linear import (
    BlockScorer,
    Kept,
    LinearScoreComputer,
    are_safe,
    product,
)
from trak.score_computers.loss_power import WAY, as_power
from trak.score_computers.path import way_of
from trak.score_computers.products import made_with, products_for
from trak.score_computers.ridge_sample import Situation
from trak.score_computers.stream import decoded, products_dtype

_LARGE = 100.0  # times the trace: a ridge beside which the Gram matrix loses digits


class RidgeScoreComputer(LinearScoreComputer):
    """`Phi (Phi^T Phi + lambda I)^-1 Phi_targets^T`, without further scaling.

    Solved in float64 by Cholesky, in the smaller of the primal and dual forms. Unlike
    `BasicScoreComputer` (upstream's), the inverse is not divided by its mean absolute
    entry, so that scores of several checkpoints are on one scale.

    Args:
        dtype: dtype of the stored rows.
        device: where to compute.
        logging_level: accepted as upstream's name.
        lambda_reg: the ridge: a number, added to the diagonal as it is; a multiple of the
            mean squared row norm of Phi (`trace(Phi^T Phi) / n`), such as `"3x"`; or
            `"auto"` or None for `trak.score_computers.auto_ridge.relative_ridge` times it.
        curvature: weigh the rows of the Gram matrix by the curvature of the loss, the `R`
            that TRAK leaves out: see `trak.score_computers.curvature.roots`.
        loss_power: exponent of the loss weights Q that scores are multiplied by, where they
            are probabilities: 0 to 1, or `"auto"` for
            `trak.score_computers.loss_power.power_of` and `path_of`.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        logging_level: int = logging.INFO,  # noqa: ARG002
        lambda_reg: Ridge = None,
        *,
        curvature: bool = False,
        loss_power: float | str = 1.0,
    ) -> None:
        super().__init__(dtype, device)
        self.lambda_reg = as_ridge(lambda_reg)
        self.curvature = as_flag("curvature", curvature)
        self.loss_power = as_power(loss_power)

    def finalize(self, rows: RowSource, situation: Situation | None = None) -> Kept:
        """Factors the Gram matrix plus ridge, in one pass over the rows.

        A cheaper one before it is for the automatic ridge, unless this was chosen already.

        Args:
            rows: Phi, `[n, k]`.
            situation: what the automatic ridge depends on, beside the rows.

        Returns:
            The Cholesky factor and its description.
        """
        situation = situation or Situation()
        auto, power, path = situation.multiple, situation.power, situation.path
        if auto is None:
            auto, power, path = self.choose(rows, situation)
        phi, rows = rows, self.weighted(rows, situation.losses)
        form = smaller_form(*rows.shape)
        where = self.where(phi)
        products = products_for(rows, [self.lambda_reg], auto, form, where)
        gram = self._gram(rows, form, products)
        used = {"power": power if self.loss_power is None else self.loss_power}
        if path and self.loss_power is None:
            kernel = gram if form == "dual" else None
            roots = self._roots(situation.losses)
            way = way_of(phi, kernel, roots, situation, where)
            used |= {"path": path, WAY: way}
        matrix, info = self._factored(gram, form, rows, self.lambda_reg, auto, products)
        return matrix, info if used == {"power": 1} else {**info, **used}

    def choose(self, rows: RowSource, situation: Situation) -> Choice:
        """The automatic ridge of one checkpoint, and what it tells of loss weights.

        Args:
            rows: Phi, `[n, k]`.
            situation: what it depends on, beside the rows.

        Returns:
            The ridge, the exponent of Q, and the share of what Q added up to.
        """
        situation = replace(situation, curvature=self.curvature)
        return choice(self.weighted(rows, situation.losses), situation)

    def at_ridges(
        self,
        kept: Kept,
        rows: RowSource,
        lambda_regs: Sequence[Ridge],
        loss: Any = None,
    ) -> list[Kept]:
        """Factors anew with other ridges, without a pass over the rows.

        The Gram matrix is had back from the factor. Where the factor's own ridge is so
        large that digits would be lost, or one of the others so small that it needs more
        digits than the factor was made with, it is computed again, in one pass.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            lambda_regs: ridges, as the constructor takes them.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            One factor and description a ridge.
        """
        factor = self.factor(kept, self.where(rows))
        trace = factor.mean_squared_norm * rows.shape[0]
        large = factor.ridge > _LARGE * trace
        rows = self.weighted(rows, loss)
        auto = kept[1].get("auto")
        if auto is None:  # of a store from before there was an automatic ridge
            auto = relative_ridge(rows, Situation())
        regs, form = [as_ridge(reg) for reg in lambda_regs], factor.form
        products = products_for(rows, regs, auto, form, self.where(rows))
        before = made_with(kept[1], rows)
        anew = large or products.itemsize > before.itemsize
        products = products if anew else before
        gram = self._gram(rows, form, products) if anew else factor.gram()
        return [self._factored(gram, form, rows, reg, auto, products) for reg in regs]

    def weights(self, kept: Kept, rows: RowSource, targets: Tensor) -> Tensor | None:
        """Solves for the targets, in the primal form.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            `[k, m]`, float64; None in the dual form.
        """
        factor = self.factor(kept, self.where(rows))
        if factor.form == "dual":
            return None
        return factor.solve(targets.to(factor.lower).T)

    def scorer(
        self, kept: Kept, rows: RowSource, targets: Tensor, loss: Any = None
    ) -> BlockScorer:
        """Solves for the targets.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            A function of first and end row that gives scores `[rows, m]`, float64.
        """
        factor = self.factor(kept, self.where(rows))
        if factor.form == "primal":
            return super().scorer(kept, rows, targets)
        rows = self.weighted(rows, loss)
        aims, usual = targets.to(factor.lower.device).T, products_dtype(rows)
        # bfloat16 is for the Gram matrix alone: scores are sums that nearly cancel
        products = torch.promote_types(made_with(kept[1], rows), torch.float32)
        if products is not usual and not are_safe(aims):
            products = usual
        scores = factor.solve(product(rows, aims.to(products)).double())
        scores = self.unweighted(scores, loss)
        return lambda start, stop: scores[start:stop]

    def solved(
        self, kept: Kept, rows: RowSource, vectors: Tensor, loss: Any = None
    ) -> Tensor:
        """`(Phi^T Phi + ridge I)^-1` times vectors.

        In the dual form by `K^-1 x = (x - Phi^T (Phi Phi^T + ridge I)^-1 Phi x) / ridge`
        (Woodbury), with Phi in memory.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            vectors: `[b, k]`.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            `[b, k]`, float64.

        Raises:
            InputError: if there is no ridge and fewer rows than columns.
        """
        factor = self.factor(kept, self.where(rows))
        vectors = vectors.to(factor.lower)
        if factor.form == "primal":
            return factor.solve(vectors.T).T
        if factor.ridge == 0:
            raise InputError(
                "Phi^T Phi has no inverse: there are fewer training examples than columns "
                "and lambda_reg is 0. Use a ridge (leave lambda_reg out)."
            )
        phi = decoded(self.weighted(rows, loss), torch.float64).to(factor.lower)
        inside = factor.solve(phi @ vectors.T).T @ phi
        return (vectors - inside) / factor.ridge

    def matches(self, info: dict[str, Any]) -> bool:
        """Whether what the store keeps was made with the present settings.

        Args:
            info: the description that `finalize` gave.

        Returns:
            False if the checkpoint must be finalized again.
        """
        found = {"loss_power": 1.0, **info}
        request = {"loss_power": 1.0, **self._request()}
        return "auto" in info and {name: found.get(name) for name in request} == request

    def features(self, kept: Kept, rows: RowSource, loss: Any = None) -> Tensor:
        """Upstream's features, `Phi (Phi^T Phi + ridge I)^-1`.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            `[n, k]`, float64.
        """
        factor = self.factor(kept, self.where(rows))
        device = factor.lower.device
        if factor.form == "primal":
            return factor.solve(decoded(rows, torch.float64).to(device).T).T
        phi = decoded(self.weighted(rows, loss), torch.float64).to(device)
        return self.unweighted(factor.solve(phi), loss)

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """The features for a given Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.
            xtx: what `get_xtx` returned.

        Returns:
            `Phi (Phi^T Phi + ridge I)^-1`, `[n, k]`, float64.
        """
        gram = xtx.to(torch.float64)
        auto = relative_ridge(grads, Situation())
        factor = self._factorize(gram, "primal", grads, self.lambda_reg, auto)
        return factor.solve(grads.to(torch.float64).T).T

    def _roots(self, loss: Any) -> Tensor | None:
        if loss is None and not self.curvature:
            return None
        if loss is None:
            raise InputError(
                "Rows weighted by curvature need the loss weights Q: pass loss=..., or "
                "make the score computer with curvature=False."
            )
        return roots(loss, curved=self.curvature)

    def weighted(self, rows: RowSource, loss: Any) -> RowSource:
        """The rows whose Gram matrix is factored.

        Args:
            rows: Phi, `[n, k]`.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            `R^(1/2) Phi`, or Phi itself.
        """
        return weighted(rows, self._roots(loss))

    def unweighted(self, values: Tensor, loss: Any) -> Tensor:
        """What a solve in the dual form is followed by.

        `Phi (Phi^T R Phi + ridge I)^-1` is
        `R^(-1/2) (R^(1/2) Phi Phi^T R^(1/2) + ridge I)^-1 R^(1/2) Phi`.

        Args:
            values: `[n, m]`.
            loss: Q, `[n, 1]`, or `Losses`, for rows that are weighted.

        Returns:
            `R^(-1/2)` times these, or the values themselves.
        """
        found = self._roots(loss)
        return values if found is None else values / found.to(values)

    def _gram(self, rows: RowSource, form: Form, products: torch.dtype) -> Tensor:
        gram = primal_gram if form == "primal" else dual_gram
        return gram(rows, self.where(rows), products)

    def _factorize(
        self,
        gram: Tensor,
        form: Form,
        rows: RowSource,
        lambda_reg: Ridge,
        auto: float,
    ) -> RidgeFactor:
        multiple = auto if lambda_reg is None else multiple_of(lambda_reg)
        if multiple is None:
            ridge = float(lambda_reg or 0.0)
        else:
            ridge = multiple * float(gram.trace()) / rows.shape[0]
        eps = row_encoding(rows).eps
        return factorize(gram, form=form, ridge=ridge, num_rows=rows.shape[0], row_eps=eps)

    def _factored(
        self,
        gram: Tensor,
        form: Form,
        rows: RowSource,
        lambda_reg: Ridge,
        auto: float,
        products: torch.dtype,
    ) -> Kept:
        factor = self._factorize(gram, form, rows, lambda_reg, auto)
        info = {
            **self._request(),
            "lambda_reg": lambda_reg,
            "auto": auto,
            "form": factor.form,
            "ridge": factor.ridge,
            "mean_squared_norm": factor.mean_squared_norm,
        }
        if products is not products_dtype(rows):
            info["products"] = encoding_of(products).name
        return factor.lower.cpu().numpy(), info

    def _request(self) -> dict[str, Any]:
        return {
            "computer": type(self).__name__,
            "lambda_reg": self.lambda_reg,
            "curvature": RULE if self.curvature else None,
            **({} if self.loss_power == 1 else {"loss_power": self.loss_power}),
        }

    def factor(self, kept: Kept, device: torch.device) -> RidgeFactor:
        """What `finalize` made, to solve with.

        Args:
            kept: the matrix and its description.
            device: where to solve.

        Returns:
            The factor.
        """
        matrix, info = kept
        lower = torch.as_tensor(matrix, device="cpu").to(device)
        form, ridge = info["form"], info["ridge"]
        return RidgeFactor(lower, form, ridge, info["mean_squared_norm"])
