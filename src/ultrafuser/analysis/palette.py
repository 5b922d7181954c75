"""One colour a specialist, the same in figures, the HTML token view and the terminal."""

import colorsys
from collections.abc import Iterable, Sequence

from ultrafuser.errors import UltrafuserError

# Okabe and Ito's colour-blind-safe set without black. The order is ours: the first three, mixed in equal
# parts, give a neutral grey, so that an undecided gate looks undecided.
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def specialist_colours(num: int) -> list[str]:
    """Colours for `num` specialists, in their order.

    Args:
        num: number of specialists N, at least 1.

    Returns:
        N distinct colours as `#rrggbb`: the Okabe-Ito set up to 7; beyond, evenly spaced hues.

    Raises:
        UltrafuserError: if `num` is below 1.
    """
    if num < 1:
        raise UltrafuserError(
            f"The number of specialists must be at least 1, got {num}. Give at least one name."
        )
    if num <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:num])
    # Neighbouring hues alternate in lightness, which keeps them apart where hue alone would not.
    wheel = (colorsys.hls_to_rgb(index / num, (0.42, 0.68)[index % 2], 0.75) for index in range(num))
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in rgb) for rgb in wheel]


def mix_colours(colours: Sequence[str], weights: Iterable[float]) -> str:
    """Mix colours as light mixes: a weighted mean of linear intensities, not of encoded values.

    Averaging the encoded values of blue and orange gives a green that belongs to another specialist;
    averaging light gives a grey.

    Args:
        colours: N colours as `#rrggbb`.
        weights: N non-negative numbers with a positive sum; they are normalised.

    Returns:
        The mixture as `#rrggbb`.

    Raises:
        UltrafuserError: if the lengths differ, a weight is negative, or the sum is not positive and finite.
    """
    shares = [float(weight) for weight in weights]
    total = sum(shares)
    if len(shares) != len(colours) or not 0 < total < float("inf") or min(shares) < 0:
        raise UltrafuserError(
            f"Mixing {len(colours)} colours needs as many non-negative weights with a positive sum, "
            f"got {shares}. Pass one gate weight for each specialist."
        )
    channels = []
    for start in (1, 3, 5):
        light = sum(
            share * _decode(int(colour[start : start + 2], 16) / 255)
            for share, colour in zip(shares, colours, strict=True)
        )
        channels.append(round(255 * _encode(light / total)))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def tint(colours: Sequence[str], weights: Sequence[float]) -> tuple[str, float]:
    """Background of a token: the mix of the specialists' colours, fainter the less the gate decided.

    Args:
        colours: N colours as `#rrggbb`.
        weights: N gate weights, summing to 1.

    Returns:
        The colour as `#rrggbb`, and its opacity over the page in [0.25, 0.7].
    """
    undecided = 1 / len(colours)
    decided = (max(weights) - undecided) / (1 - undecided) if len(colours) > 1 else 1.0
    return mix_colours(colours, weights), 0.25 + 0.45 * min(max(decided, 0.0), 1.0)


def _decode(value: float) -> float:
    """From an sRGB value in [0, 1] to linear intensity (IEC 61966-2-1)."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _encode(light: float) -> float:
    """From linear intensity in [0, 1] to an sRGB value."""
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055
