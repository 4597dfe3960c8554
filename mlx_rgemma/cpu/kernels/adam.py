"""Adam's update."""

from __future__ import annotations

import numpy as np

from mlx_rgemma.cpu.kernels.compiler import exact_kernel

# Adam's update (arXiv:1412.6980, algorithm 1), every operation rounded as in MLX.
# Work items: elements.


@exact_kernel
def adam(first, last, numbers, parameter, m, v, gradient):
    """m and v change, and the new parameter takes the gradient's place.

    numbers: (8,), fp32: b1, 1 - b1, b2, 1 - b2, factors of the first moment and of the second's
    root, epsilon, factor of the parameter.
    """
    b1, rest1, b2, rest2 = numbers[0], numbers[1], numbers[2], numbers[3]
    rate, root, eps, scale_factor = numbers[4], numbers[5], numbers[6], numbers[7]
    parameter, m, v = parameter[first:last], m[first:last], v[first:last]
    gradient = gradient[first:last]
    for i in range(gradient.size):
        g = gradient[i]
        m_i = b1 * m[i] + rest1 * g
        v_i = b2 * v[i] + rest2 * (g * g)
        m[i] = m_i
        v[i] = v_i
        gradient[i] = parameter[i] * scale_factor - rate * m_i / (np.sqrt(v_i) * root + eps)
