"""reForge's attention, which the other programs do not have."""

from modules import HOST
from modules.attention import attend

if HOST != "reforge":
    raise ImportError(__name__)


def optimized_attention(q, k, v, heads, mask=None, attn_precision=None):
    return attend(q, k, v, heads)
