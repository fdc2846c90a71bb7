"""The colours of every picture and page, once for light paper and once for dark.

Each role has one hex value per theme. Pictures are drawn with the light values; because those are all
different, an SVG can have each replaced by its CSS variable and then follows the reader's theme (see
`_canvas.to_svg`). The series come from the Okabe-Ito palette, darkened until a line has contrast 3 on white,
and are always doubled by marker and dash: no reader has to tell two things apart by hue alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LIGHT: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#f6f5f2",
        "panel": "#ffffff",
        "ink": "#1b2127",
        "soft": "#545e69",
        "line": "#d3d7dc",
        "grid": "#e8eaed",
        "heat": "#0a72b4",
        "against": "#d55f02",
        "chosen": "#b34700",
        "good": "#00664a",
        "s0": "#0072b2",
        "s1": "#d55e00",
        "s2": "#00856a",
        "s3": "#a2508a",
        "s4": "#8a6a00",
        "s5": "#5b6b7a",
    }
)

DARK: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#101418",
        "panel": "#171c21",
        "ink": "#e8ebee",
        "soft": "#a6b0ba",
        "line": "#39424b",
        "grid": "#262d34",
        "heat": "#3a86c8",
        "against": "#b75a1c",
        "chosen": "#ff9c54",
        "good": "#5fd3a8",
        "s0": "#5db2ee",
        "s1": "#ff9046",
        "s2": "#3fc79a",
        "s3": "#e39bc8",
        "s4": "#e0b83a",
        "s5": "#a7b4c0",
    }
)

SERIES: tuple[str, ...] = ("s0", "s1", "s2", "s3", "s4", "s5")
MARKERS: tuple[str, ...] = ("o", "s", "^", "D", "v", "P")

# The strongest tint behind text. Above it ink on a full cell would fall under contrast 4.5 in one of the
# themes.
HEAT_MAX = 0.75


def series(index: int) -> tuple[str, str]:
    """Role and marker of the `index`-th line of a picture; after six the same colours meet other markers."""
    turn, place = divmod(index, len(SERIES))
    return SERIES[place], MARKERS[(place + turn) % len(MARKERS)]


def css_variables(theme: Mapping[str, str]) -> str:
    """The theme as CSS custom properties; tinted roles also as bare `r g b` so that CSS can set their opacity."""
    plain = [f"--{role}:{value}" for role, value in theme.items()]
    tints = [f"--{role}-rgb:{' '.join(map(str, rgb(theme[role])))}" for role in ("heat", "against")]
    return ";".join(plain + tints)


def rgb(value: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers from 0 to 255."""
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def fractions(value: str) -> tuple[float, float, float]:
    """`#rrggbb` as three numbers from 0 to 1."""
    red, green, blue = rgb(value)
    return red / 255, green / 255, blue / 255
