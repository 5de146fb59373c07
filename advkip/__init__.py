"""advkip: can a model be robust because of its training data alone?

The package behind the notebooks. Read it in this order: `config` (an experiment), `data`,
`kernels` and `krr` (kernel regression with infinite-width kernels), `attacks`, `distill`
(Algorithm 1), `evaluate`, `records` and `figures`, `run` (params files to reports).
"""

__version__ = "0.1.0"
