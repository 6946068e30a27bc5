"""Forge's attention, which the other programs do not have."""

from modules import HOST
from modules.attention import attend

if HOST != "forge":
    raise ImportError(__name__)


def attention_function(q, k, v, heads, mask=None):
    return attend(q, k, v, heads)
