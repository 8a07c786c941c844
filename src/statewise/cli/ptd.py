"""`statewise ptd`: HiPPO-LegS perturbed, then diagonalised: find it, keep it, and say how good it is."""

from __future__ import annotations

from pathlib import Path

from .console import terminal
from .errors import UserError, check_folder, user_errors
from .options import Options


def ptd(n: int = 64, gamma: float = 1000.0, seed: int = 0, plot: str | None = None) -> int:
    """Find the perturbed and diagonalised HiPPO-LegS that the mixers s4ptd and s5ptd start from, and compare it with
    HiPPO. Results are kept on disk: what was found once starts a model at once.

    Args:
        n: state size, even; of one block for s5ptd
        gamma: price of the perturbation; larger is closer to HiPPO and worse conditioned
        seed: of the search
        plot: PNG to write: transfer functions, and what becomes of a slow signal with a wave at the spike of S4D-LegS
    """
    if plot is not None and Path(plot).suffix.lower() != ".png":
        raise UserError(f"--plot: want a file name that ends in .png, got {plot!r}")
    if plot is not None:
        check_folder("--plot", plot)
    from ..maths import ptd as maths
    from ..maths.transfer import compare, disturb

    console = terminal()
    with user_errors(), console.status("Searching (large sizes take a while)"):
        try:
            found = maths.perturb(n, gamma, seed)
        except RuntimeError as error:
            raise UserError(str(error)) from error
    comparison, run = compare(n, gamma, seed), disturb(n, gamma, seed)
    rows = [
        ("condition of the eigenvectors", f"{found.condition:.1f}"),
        ("size of the perturbation, relative", f"{found.relative:.2e}"),
        ("largest real part", f"{float(found.Lambda.real.max()):.3f}"),
        (
            "smallest and largest frequency",
            f"{-float(found.Lambda.imag.max()):.2f}, {-float(found.Lambda.imag.min()):.1f}",
        ),
        ("largest |G| of HiPPO-LegS", f"{float(comparison.exact.abs().max()):.2e}"),
        ("largest deviation from it", f"{comparison.deviation('perturbed'):.2e}"),
        ("the same for S4D-LegS", f"{comparison.deviation('normal'):.2e}"),
        ("error on a slow signal", f"{run.error('perturbed'):.1%}, S4D-LegS {run.error('normal'):.1%}"),
        (
            "with a wave of 10 % at the spike",
            f"{run.error('perturbed', True):.1%}, S4D-LegS {run.error('normal', True):.1%}",
        ),
        ("kept in", str(maths.folder())),
    ]
    for name, value in rows:
        console.print(f"{name:<36}{value}", highlight=False, soft_wrap=True)
    if plot is not None:
        from ..analysis import save
        from ..analysis.hippo import plot_robustness

        with user_errors():
            save(plot_robustness(comparison, run), plot)
        console.print(f"wrote {plot}", highlight=False, soft_wrap=True)
    return 0


def main(argv: list[str]) -> int:
    options = Options("ptd", ptd)
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    return ptd(**options.parse(argv))
